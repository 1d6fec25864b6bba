//! What an IOMMU notes of devices' writes to memory: the kernel's mock IOMMU (drivers/iommu/iommufd/selftest.c,
//! `CONFIG_IOMMUFD_TEST`), which says what it is told to. No device writes here.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, ensure};
use vfio::DmaLog;
use vfio::kernel::iommu_log;

use crate::lab::ctx::Ctx;

/// `IOMMU_IOAS_ALLOC` and `IOMMU_IOAS_MAP` (include/uapi/linux/iommufd.h), `IOMMU_TEST_CMD`
/// (drivers/iommu/iommufd/iommufd_test.h, as what follows).
const IOAS_ALLOC: u64 = 0x3b81;
const IOAS_MAP: u64 = 0x3b85;
const TEST_CMD: u64 = 0x3ba0;

const OP_MOCK_DOMAIN: u32 = 2;
const OP_MOCK_DOMAIN_REPLACE: u32 = 10;
const OP_DIRTY: u32 = 13;

/// `MOCK_APERTURE_START`.
const START: u64 = 16 << 20;
const BYTES: u64 = 64 << 20;
const PAGE: u64 = 4096;
const PAGES: usize = (BYTES / PAGE) as usize;
/// `MOCK_IO_PAGE_SIZE`, half of the CPU's.
const MOCK_PAGE: u64 = PAGE / 2;

/// Two words of 32 bits as one.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn low(pair: u64) -> u32 {
    u32::try_from(pair & u64::from(u32::MAX)).unwrap_or_default()
}

/// A structure in words; the first one says how long it is.
fn call(iommufd: &OwnedFd, request: u64, words: &mut [u64]) -> anyhow::Result<()> {
    // SAFETY: the structure has at least the size that it begins with, and what it points to outlives the call.
    #[allow(unsafe_code)]
    let status = unsafe { libc::ioctl(iommufd.as_raw_fd(), request, words.as_mut_ptr()) };
    let error = std::io::Error::last_os_error();
    ensure!(status == 0, "{request:#x} {words:x?}: {error}");
    Ok(())
}

/// `struct iommu_test_cmd`: the operation, the object that it is for, and the words behind.
fn test(iommufd: &OwnedFd, op: u32, id: u32, words: [u64; 6]) -> anyhow::Result<[u64; 6]> {
    let mut all = [pair(72, op), id.into(), 0, 0, 0, 0, 0, 0, 0];
    all[2..8].copy_from_slice(&words);
    call(iommufd, TEST_CMD, &mut all)?;
    let [_, _, words @ .., _] = all;
    Ok(words)
}

/// A mock device with memory and page tables that note what it writes.
struct Mock {
    iommufd: OwnedFd,
    log: Box<dyn DmaLog>,
    tables: u32,
    _memory: Vec<u8>,
}

impl Mock {
    fn new() -> anyhow::Result<Self> {
        let mut options = std::fs::File::options();
        let opened = options.read(true).write(true).open("/dev/iommu");
        let iommufd: OwnedFd = opened.context("/dev/iommu")?.into();
        let mut alloc = [pair(12, 0), 0];
        call(&iommufd, IOAS_ALLOC, &mut alloc)?;
        let [_, ioas] = alloc;
        let ioas = u32::try_from(ioas)?;
        let [mocks, device, ..] = test(&iommufd, OP_MOCK_DOMAIN, ioas, [0; 6])?;
        let (mock, device) = (low(mocks), low(device));
        let memory = vec![0_u8; usize::try_from(BYTES + PAGE)?];
        let at = (memory.as_ptr().expose_provenance() as u64).next_multiple_of(PAGE);
        // A fixed address, to be read and written.
        let mut map = [pair(40, 7), pair(ioas, 0), at, BYTES, START];
        call(&iommufd, IOAS_MAP, &mut map)?;
        let (log, tables) = iommu_log(iommufd.try_clone()?, ioas, device)?;
        let replaced = [tables.into(), 0, 0, 0, 0, 0];
        test(&iommufd, OP_MOCK_DOMAIN_REPLACE, mock, replaced)?;
        Ok(Self {
            iommufd,
            log,
            tables,
            _memory: memory,
        })
    }

    /// As if a device had written the first half of these pages; how many of them it was told of.
    fn write(&self, pages: &[usize]) -> anyhow::Result<u64> {
        let mut bitmap = vec![0_u64; PAGES * 2 / 64];
        for page in pages {
            bitmap[page * 2 / 64] |= 1 << (page * 2 % 64);
        }
        let at = bitmap.as_mut_ptr().expose_provenance() as u64;
        let words = [0, START, BYTES, MOCK_PAGE, at, 0];
        let [.., told] = test(&self.iommufd, OP_DIRTY, self.tables, words)?;
        Ok(told)
    }

    /// What is reported of so many pages from that one on.
    fn report(&self, first: usize, count: usize) -> anyhow::Result<Vec<usize>> {
        let mut bitmap = vec![0_u64; count.div_ceil(64)];
        let (first_byte, bytes) = (START + first as u64 * PAGE, count as u64 * PAGE);
        self.log.report(first_byte, bytes, &mut bitmap)?;
        let is_set = |page: &usize| bitmap[page / 64] & 1 << (page % 64) != 0;
        Ok((0..count).filter(is_set).map(|page| first + page).collect())
    }
}

/// The log of page tables that note writes, over an IOMMU that writes as it is told to.
pub(super) fn by_the_iommu(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mock = Mock::new()?;
    let all: Vec<_> = (0..PAGES).collect();
    let some = [0, 1, 63, 64, 5000, PAGES - 1];
    ensure!(mock.write(&some).is_err(), "it notes what nobody asked for");
    ctx.say("started, read, ended; three times");
    for _ in 0..3 {
        mock.log.start(&[(START, BYTES)])?;
        ensure!(mock.report(0, PAGES)?.is_empty(), "nothing was written");
        ensure!(mock.write(&some)? == 6, "it notes what is written");
        ensure!(
            mock.report(0, PAGES)? == some,
            "{:?}",
            mock.report(0, PAGES)
        );
        ensure!(mock.report(0, PAGES)?.is_empty(), "it was told already");
        ctx.say("in parts: nothing is told twice, or never");
        mock.write(&some)?;
        ensure!(mock.report(2, 62)? == [63]);
        ensure!(mock.report(0, 2)? == [0, 1]);
        mock.write(&[64])?;
        ensure!(mock.report(64, PAGES - 64)? == some[3..]);
        ensure!(mock.report(0, PAGES)?.is_empty());
        mock.write(&all)?;
        ensure!(mock.report(0, PAGES)? == all);
        mock.write(&some)?;
        mock.log.stop()?;
        ensure!(mock.write(&some).is_err(), "it still notes");
    }
    ctx.say("ranges with more than memory");
    mock.log.start(&[(START, BYTES * 2)])?;
    mock.write(&some)?;
    ensure!(mock.report(0, PAGES * 2)? == some);
    mock.log
        .stop()
        .context("the log of more than memory does not end")
}
