//! An NVMe controller driven through VFIO, as far as its admin queue: real DMA, real interrupts.
//!
//! Registers, commands and completions: NVM Express Base Specification 2.0, 3.1, 3.3 and 5.17.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use devices::pci::HostMemory;
use vfio::kernel::RegionMapping;
use vfio::testing::shared_page;
use vfio::{DmaAccess, DmaFile, DmaRange, Iova, RegionIndex, VfioBackend};

use crate::harness::process::wait_until;

const BAR0: RegionIndex = RegionIndex::Bar(0);
/// Controller configuration and status, and the admin queues.
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
/// The admin queues' doorbells, with a stride of 4.
const SQ_DOORBELL: u64 = 0x1000;
const CQ_DOORBELL: u64 = 0x1004;
/// Enabled, entries of 64 and 16 bytes.
const ENABLE: u32 = 0x0046_0001;
const READY: u32 = 1;
const FATAL: u32 = 2;
/// Memory and bus mastering, in the command register.
const MEMORY_AND_MASTER: u16 = 6;

/// Where the controller sees the queues and the data.
const QUEUES_AT: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;
/// A page without anything in it.
const EMPTY: [u8; 0x1000] = [0; 0x1000];
const LIMIT: Duration = Duration::from_secs(10);

/// Bytes of the disk behind the controller.
pub(super) const DISK_BYTES: u64 = 512 << 20;

/// Pages that a controller and this process both see.
struct Page {
    range: DmaRange,
    file: File,
    _mapping: RegionMapping,
}

impl Page {
    fn new(number: u64) -> anyhow::Result<Self> {
        let (file, mapping) = shared_page().context("no shared memory")?;
        let range = DmaRange {
            iova: Iova(QUEUES_AT + number * PAGE),
            len: PAGE,
            host_address: mapping.address(),
        };
        Ok(Self {
            range,
            file,
            _mapping: mapping,
        })
    }
}

/// A controller and its admin queues. Dropping it leaves the controller as it is, and its memory
/// mapped as long as the function is open.
pub struct AdminQueue<'b> {
    backend: &'b dyn VfioBackend,
    submissions: Page,
    completions: Page,
    data: Page,
    /// Commands so far.
    count: u16,
}

impl<'b> AdminQueue<'b> {
    /// Commands that the queues have room for; a completion's phase changes with each turn.
    pub const ENTRIES: u16 = 16;

    /// Lets the function reach the queues. `number` tells several functions' queues apart.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn new(backend: &'b dyn VfioBackend, number: u64) -> anyhow::Result<Self> {
        let queue = Self {
            backend,
            submissions: Page::new(number * 3)?,
            completions: Page::new(number * 3 + 1)?,
            data: Page::new(number * 3 + 2)?,
            count: 0,
        };
        queue.map_for(backend)?;
        Ok(queue)
    }

    fn pages(&self) -> [&Page; 3] {
        [&self.submissions, &self.completions, &self.data]
    }

    /// Lets this or another function reach the queues.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn map_for(&self, backend: &dyn VfioBackend) -> anyhow::Result<()> {
        for page in self.pages() {
            let file = DmaFile {
                file: page.file.as_fd(),
                offset: 0,
            };
            backend
                .dma()
                .map(page.range, DmaAccess::ReadWrite, Some(file))?;
        }
        Ok(())
    }

    /// Ends that.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn unmap_for(&self, backend: &dyn VfioBackend) -> anyhow::Result<()> {
        for page in self.pages() {
            backend.dma().unmap(page.range)?;
        }
        Ok(())
    }

    fn read(&self, register: u64) -> anyhow::Result<u32> {
        let mut bytes = [0; 4];
        self.backend.read(BAR0, register, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn write(&self, register: u64, value: u32) -> anyhow::Result<()> {
        Ok(self.backend.write(BAR0, register, &value.to_le_bytes())?)
    }

    fn status_becomes(&self, wanted: u32) -> anyhow::Result<()> {
        let is_so = || {
            let status = self.read(CSTS);
            let done = status.as_ref().map_or(true, |status| {
                status & READY == wanted || status & FATAL != 0
            });
            done.then_some(status)
        };
        let status = wait_until(Instant::now() + LIMIT, is_so);
        let status =
            status.with_context(|| format!("the controller's ready bit stays off {wanted}"))??;
        ensure!(
            status & (READY | FATAL) == wanted,
            "the controller's status is {status:#x}, not {wanted}"
        );
        Ok(())
    }

    /// Whether the controller is on.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn is_on(&self) -> anyhow::Result<bool> {
        Ok(self.read(CC)? & 1 == 1)
    }

    /// Turns the controller on with empty queues.
    ///
    /// # Errors
    /// When the backend refuses, or the controller is not ready in time.
    pub fn start(&mut self) -> anyhow::Result<()> {
        self.count = 0;
        let command = MEMORY_AND_MASTER.to_le_bytes();
        self.backend.write(RegionIndex::Config, 4, &command)?;
        self.write(CC, 0)?;
        self.status_becomes(0)?;
        for page in self.pages() {
            page.file.write_all_at(&EMPTY, 0)?;
        }
        let last = u32::from(Self::ENTRIES - 1);
        self.write(AQA, last | last << 16)?;
        for (register, page) in [(ASQ, &self.submissions), (ACQ, &self.completions)] {
            let low = u32::try_from(page.range.iova.0)?;
            self.write(register, low)?;
            self.write(register + 4, 0)?;
        }
        self.write(CC, ENABLE)?;
        self.status_becomes(READY)
    }

    /// Asks the controller what it is; the answer comes by DMA and is told by vector 0.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn ask(&mut self) -> anyhow::Result<()> {
        self.ask_to(self.data.range.iova)
    }

    /// The same, with the answer to another place.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn ask_to(&mut self, place: Iova) -> anyhow::Result<()> {
        let slot = self.count % Self::ENTRIES;
        let mut command = [0_u8; 64];
        // Identify, with the command's number; where to; the controller itself.
        command[0] = 0x06;
        command[2..4].copy_from_slice(&self.count.to_le_bytes());
        command[24..32].copy_from_slice(&place.0.to_le_bytes());
        command[40] = 1;
        let at = u64::from(slot) * 64;
        self.data.file.write_all_at(&[0; 64], 0)?;
        self.submissions.file.write_all_at(&command, at)?;
        self.count += 1;
        self.write(SQ_DOORBELL, u32::from(self.count % Self::ENTRIES))
    }

    /// The answer: serial number and model.
    ///
    /// # Errors
    /// When the command is not completed, or not well.
    pub fn answer(&self) -> anyhow::Result<(String, String)> {
        self.completed()?;
        let mut data = [0; 64];
        self.data.file.read_exact_at(&mut data, 0)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        Ok((text(&data[4..24]), text(&data[24..64])))
    }

    /// Whether the last command is completed, well or not.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        self.status().is_ok()
    }

    /// That the last command is completed, and well.
    ///
    /// # Errors
    /// When it is not.
    pub fn completed(&self) -> anyhow::Result<()> {
        let status = self.status()?;
        let number = self.count - 1;
        ensure!(status == 0, "command {number} failed: status {status:#x}");
        Ok(())
    }

    /// The status of the last command, once it is completed.
    fn status(&self) -> anyhow::Result<u16> {
        let number = self.count - 1;
        let mut completion = [0; 16];
        let at = u64::from(number % Self::ENTRIES) * 16;
        self.completions.file.read_exact_at(&mut completion, at)?;
        let phase = u16::from((number / Self::ENTRIES).is_multiple_of(2));
        let status = u16::from_le_bytes([completion[14], completion[15]]);
        ensure!(
            status & 1 == phase,
            "command {number} is not completed: {completion:02x?}"
        );
        Ok(status >> 1)
    }

    /// Tells the controller that all completions are read; its legacy line falls.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn acknowledge(&self) -> anyhow::Result<()> {
        self.write(CQ_DOORBELL, u32::from(self.count % Self::ENTRIES))
    }
}
