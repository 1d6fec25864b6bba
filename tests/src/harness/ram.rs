//! The guest's memory, seen from outside through the VMM's own descriptor of it.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use drover_guest::heartbeat;

use super::process;

/// Addresses from here on lie above the hole (docs/boot.md); the file has no hole.
const HIGH_RAM_START: u64 = 4 << 30;
const LOW_RAM_END: u64 = 3 << 30;

const PAGE_BYTES: usize = 4096;

/// How memory files of guests are called: on a tmpfs, and without one.
const MEMORY_FILES: [&str; 2] = ["/guest-ram", "/memfd:guest-ram"];

/// A VM's memory. It stays readable after the VM has ended, but for QEMU's.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    /// Where it begins in the file.
    base: u64,
    size_bytes: u64,
}

/// The guest's heartbeat record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Whether the guest has written the record.
    pub alive: bool,
    /// One more at each update.
    pub counter: u64,
    /// The time stamp counter at the update.
    pub tsc: u64,
    /// Its frequency, as far as the guest knows it.
    pub tsc_khz: u64,
    /// Number of the current command, from 1.
    pub command: u32,
    /// See [`heartbeat::State`].
    pub state: u32,
    /// What the current command has done.
    pub progress: u64,
}

impl GuestMemory {
    /// The memory of the VM in process `pid`.
    ///
    /// # Errors
    /// When the process has no guest memory, or has not given it its size yet.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let folder = format!("/proc/{pid}/fd");
        for entry in std::fs::read_dir(&folder).with_context(|| folder.clone())? {
            let path = entry?.path();
            let target = std::fs::read_link(&path).unwrap_or_default();
            let target = target.to_string_lossy();
            if MEMORY_FILES.iter().any(|name| target.starts_with(name)) {
                let file = File::open(&path).with_context(|| path.display().to_string())?;
                let size_bytes = file.metadata()?.len();
                ensure!(size_bytes > 0, "guest memory has no size yet");
                return Ok(Self {
                    file,
                    base: 0,
                    size_bytes,
                });
            }
        }
        bail!("process {pid} has no guest memory")
    }

    /// The memory of the VM in process `pid`, which is in no file, as QEMU's is by default: the
    /// mapping of exactly `size_bytes`.
    ///
    /// # Errors
    /// When the process has no mapping of `size_bytes`.
    pub fn anonymous(pid: u32, size_bytes: u64) -> anyhow::Result<Self> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let mut ranges = maps
            .lines()
            .filter(|line| line.contains(" rw-p "))
            .filter_map(|line| {
                let (start, end) = line.split_whitespace().next()?.split_once('-')?;
                let start = u64::from_str_radix(start, 16).ok()?;
                Some((start, u64::from_str_radix(end, 16).ok()? - start))
            });
        let found = ranges.find(|(_, length)| *length == size_bytes);
        let (base, _) = found.with_context(|| format!("process {pid} has no guest memory"))?;
        Ok(Self {
            file: File::open(format!("/proc/{pid}/mem"))?,
            base,
            size_bytes,
        })
    }

    /// Reads at a guest-physical address.
    ///
    /// # Errors
    /// When there is no RAM.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> anyhow::Result<()> {
        let offset = match gpa {
            0..LOW_RAM_END => gpa,
            HIGH_RAM_START.. => gpa - HIGH_RAM_START + LOW_RAM_END,
            _ => bail!("{gpa:#x} is in the hole"),
        };
        let read = self.file.read_exact_at(bytes, self.base + offset);
        read.with_context(|| format!("guest memory at {gpa:#x}"))
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes that the host has given pages for; the rest are holes.
    ///
    /// # Errors
    /// When the host does not say.
    pub fn populated_bytes(&self) -> anyhow::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Bytes per page that the host gives it if it can.
    ///
    /// # Errors
    /// When the host does not say.
    pub fn preferred_page_bytes(&self) -> anyhow::Result<u64> {
        Ok(self.file.metadata()?.blksize())
    }

    /// Where it differs from another VM's, as offsets in the file of words of 8 bytes; both stand
    /// still.
    ///
    /// # Errors
    /// When memory cannot be read, or their sizes differ.
    pub fn differences(&self, other: &Self) -> anyhow::Result<Vec<u64>> {
        let size = self.size_bytes();
        ensure!(other.size_bytes() == size, "their sizes differ");
        let mut found = Vec::new();
        let mut pages = [[0; PAGE_BYTES]; 2];
        for offset in (0..size).step_by(PAGE_BYTES) {
            for (memory, page) in [self, other].into_iter().zip(&mut pages) {
                memory.file.read_exact_at(page, memory.base + offset)?;
            }
            let [one, two] = &pages;
            if one != two {
                let words = one.chunks(8).zip(two.chunks(8)).zip((offset..).step_by(8));
                found.extend(words.filter(|((a, b), _)| a != b).map(|(_, at)| at));
            }
        }
        Ok(found)
    }

    /// The guest's heartbeat record.
    ///
    /// # Errors
    /// When memory cannot be read.
    pub fn heartbeat(&self) -> anyhow::Result<Heartbeat> {
        let mut record = [0; heartbeat::SIZE];
        self.read(heartbeat::GPA, &mut record)?;
        let word = |offset: usize| {
            let bytes = record
                .get(offset..offset + 8)
                .and_then(|b| b.try_into().ok());
            bytes.map(u64::from_le_bytes).context("short record")
        };
        let low = |value: u64| value & u64::from(u32::MAX);
        Ok(Heartbeat {
            alive: word(heartbeat::MAGIC_OFFSET)? == heartbeat::MAGIC,
            counter: word(heartbeat::COUNTER_OFFSET)?,
            tsc: word(heartbeat::TSC_OFFSET)?,
            tsc_khz: word(heartbeat::TSC_KHZ_OFFSET)?,
            command: u32::try_from(word(heartbeat::STATE_OFFSET)? >> 32)?,
            state: u32::try_from(low(word(heartbeat::STATE_OFFSET)?))?,
            progress: word(heartbeat::PROGRESS_OFFSET)?,
        })
    }

    /// Waits until the heartbeat record is as wanted.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_heartbeat(
        &self,
        limit: Duration,
        wanted: impl Fn(&Heartbeat) -> bool,
    ) -> anyhow::Result<Heartbeat> {
        let look = || match self.heartbeat() {
            Ok(beat) if !wanted(&beat) => None,
            result => Some(result),
        };
        let found = process::wait_until(Instant::now() + limit, look).transpose()?;
        let seconds = limit.as_secs();
        found.with_context(|| format!("after {seconds} s it is {:?}", self.heartbeat()))
    }

    /// Waits until the heart beats on.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn wait_beat(&self, limit: Duration) -> anyhow::Result<Heartbeat> {
        let before = self.heartbeat()?;
        self.wait_heartbeat(limit, |now| now.alive && now.counter != before.counter)
    }

    /// Watches for a while whether the heart stands still.
    ///
    /// # Errors
    /// When it beats.
    pub fn check_still(&self, time: Duration) -> anyhow::Result<()> {
        let before = self.heartbeat()?;
        std::thread::sleep(time);
        let after = self.heartbeat()?;
        if before != after {
            bail!("the guest runs: {before:?}, then {after:?}");
        }
        Ok(())
    }
}
