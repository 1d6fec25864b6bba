//! Guest RAM by pages.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use devices::GuestRam;
use devices::memory::WriteLog;
use migration::codec::is_zero;
use migration::ports::{DirectPages, PageStore, PortError};
use migration::{PAGE_BYTES, PageIndex, PageRun};
use parking_lot::Mutex;
use smallvec::SmallVec;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::memory::{DataMap, receive_pages, send_pages};

/// CPUs of a host on which a migration's threads need not wait for each other.
const SPARE_CPUS: usize = 8;

/// [`PAGE_BYTES`] as a length.
const PAGE: usize = 4096;

/// Where words of a page are looked at first.
const PROBES: [u64; 4] = [0, 1024, 2048, 4088];

/// Guest RAM as the engine reads and writes it.
pub struct RamPages {
    memory: Arc<GuestRam>,
    data: DataMap,
    /// Held by the thread that writes through the file: the kernel lets one at a time.
    writing: Mutex<()>,
    /// Whether a thread that finds another writing has a CPU to go the longer way meanwhile.
    has_spare_cpus: bool,
    /// Whether the host gives memory in huge pages: they take one fault for hundreds of pages, and
    /// a page is cheaper written through the mapping than through the file.
    is_huge: bool,
}

impl RamPages {
    /// Pages of `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuestRam>) -> Self {
        // What a file's block size says (stat(2)): a huge page's where it takes them.
        let block_bytes = |region: &GuestRegionMmap<WriteLog>| {
            let metadata = region.file_offset()?.file().metadata();
            Some(metadata.ok()?.blksize())
        };
        let is_huge = memory
            .iter()
            .all(|region| block_bytes(region) > Some(PAGE_BYTES));
        Self {
            memory,
            is_huge,
            data: DataMap::default(),
            writing: Mutex::new(()),
            has_spare_cpus: std::thread::available_parallelism()
                .is_ok_and(|cpus| cpus.get() >= SPARE_CPUS),
        }
    }

    fn outside(run: PageRun) -> PortError {
        PortError::OutsideMemory {
            start: run.start.0,
            end: run.end().0,
        }
    }

    fn address(run: PageRun) -> Result<GuestAddress, PortError> {
        run.start
            .gpa()
            .map(GuestAddress)
            .ok_or_else(|| Self::outside(run))
    }
}

impl PageStore for RamPages {
    fn regions(&self) -> Vec<PageRun> {
        let regions = self.memory.iter();
        regions
            .filter_map(|region| {
                let start = PageIndex::containing(region.start_addr().raw_value());
                PageRun::new(start, region.len() / PAGE_BYTES)
            })
            .collect()
    }

    fn data_runs(&self, run: PageRun) -> Result<Vec<PageRun>, PortError> {
        let address = Self::address(run)?;
        let region = self
            .memory
            .find_region(address)
            .ok_or_else(|| Self::outside(run))?;
        let offset = address.0 - region.start_addr().raw_value();
        if offset + run.bytes() > region.len() {
            return Err(Self::outside(run));
        }
        let failed = |source: io::Error| PortError::Host {
            what: "holes of guest memory could not be found",
            source,
        };
        let file = region
            .file_offset()
            .ok_or_else(|| failed(io::Error::other("the region has no file behind it")))?;
        let start = file.start() + offset;
        let ranges = self
            .data
            .ranges(file.file(), start, run.bytes())
            .map_err(failed)?;
        let page = |position: u64| run.start.0 + (position - start) / PAGE_BYTES;
        Ok(ranges
            .into_iter()
            .filter_map(|range| {
                let (first, last) = (page(range.start), page(range.end - 1));
                PageRun::new(PageIndex(first), last - first + 1)
            })
            .collect())
    }

    fn read(&self, run: PageRun, buf: &mut [u8]) -> Result<(), PortError> {
        let read = self.memory.read_slice(buf, Self::address(run)?);
        read.map_err(|_| Self::outside(run))
    }

    /// Through the file behind memory where its pages are small: a page that was a hole is then
    /// neither cleared before it is overwritten nor mapped before somebody uses it, which takes
    /// longer than the copy itself. Of several threads one can do so at a time; the others go
    /// through the mapping, on a host that has the CPUs.
    fn write(&self, run: PageRun, buf: &[u8]) -> Result<(), PortError> {
        let mut address = Self::address(run)?;
        let mut rest = buf;
        let turn = match (self.is_huge, self.has_spare_cpus) {
            (true, _) => None,
            (false, true) => self.writing.try_lock(),
            (false, false) => Some(self.writing.lock()),
        };
        while !rest.is_empty() {
            let region = self.memory.find_region(address);
            let region = region.ok_or_else(|| Self::outside(run))?;
            let offset = address.0 - region.start_addr().raw_value();
            let left = usize::try_from(region.len() - offset).unwrap_or(usize::MAX);
            let (part, after) = rest.split_at(rest.len().min(left));
            write_region(region, offset, part, turn.is_some())?;
            address = GuestAddress(address.0 + part.len() as u64);
            rest = after;
        }
        Ok(())
    }

    fn direct(&self) -> Option<&dyn DirectPages> {
        Some(self)
    }
}

impl DirectPages for RamPages {
    fn zeroes(&self, run: PageRun) -> Result<u64, PortError> {
        let mut bytes = [0; PAGE];
        let mut found = 0;
        for (at, number) in (run.start.0..run.end().0).enumerate() {
            let page = PageRun {
                start: PageIndex(number),
                count: 1,
            };
            let address = Self::address(page)?;
            // A few words settle nearly every page that is not, without a copy of it.
            let probes = PROBES.iter().map(|offset| {
                let word: Result<u64, _> = self.memory.read_obj(address.unchecked_add(*offset));
                word.map_err(|_| Self::outside(page))
            });
            let words: SmallVec<[u64; PROBES.len()]> = probes.collect::<Result<_, _>>()?;
            if words.iter().all(|word| *word == 0) {
                self.read(page, &mut bytes)?;
                found |= u64::from(is_zero(&bytes)) << at;
            }
        }
        Ok(found)
    }

    fn send(&self, head: &[u8], runs: &[PageRun], socket: BorrowedFd<'_>) -> io::Result<()> {
        send_pages(&self.memory, head, runs, socket)
    }

    fn prefers_receive(&self) -> bool {
        self.is_huge
    }

    fn receive(&self, runs: &[PageRun], socket: BorrowedFd<'_>) -> io::Result<()> {
        receive_pages(&self.memory, runs, socket)
    }
}

fn write_region(
    region: &GuestRegionMmap<WriteLog>,
    offset: u64,
    bytes: &[u8],
    through_file: bool,
) -> Result<(), PortError> {
    let failed = |source| PortError::Host {
        what: "guest memory could not be written",
        source,
    };
    // hugetlbfs has no write(2).
    match region.file_offset() {
        Some(file) if through_file && region.is_hugetlbfs() != Some(true) => {
            let at = file.start() + offset;
            file.file().write_all_at(bytes, at).map_err(failed)?;
            region
                .bitmap()
                .mark_dirty(usize::try_from(offset).unwrap_or(usize::MAX), bytes.len());
            Ok(())
        }
        _ => {
            let written = region.write_slice(bytes, MemoryRegionAddress(offset));
            written.map_err(|error| failed(io::Error::other(error)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Layout, RamOptions, allocate};

    #[test]
    fn holes_are_found_without_touching_them() {
        let layout = Layout::new(4 << 30, 4096, 40).unwrap();
        let memory = Arc::new(allocate(&layout, &RamOptions::default()).unwrap());
        let high = GuestAddress((4 << 30) + 0x5000);
        memory.write_obj(1_u8, GuestAddress(0x20_0000)).unwrap();
        memory.write_obj(1_u8, high).unwrap();
        let pages = RamPages::new(Arc::clone(&memory));
        let regions = pages.regions();
        assert_eq!(regions.iter().map(PageRun::bytes).sum::<u64>(), 4 << 30);
        let found: Vec<_> = regions
            .iter()
            .flat_map(|region| pages.data_runs(*region).unwrap())
            .collect();
        let contains = |gpa: u64| {
            let page = PageIndex::containing(gpa);
            found
                .iter()
                .any(|run| (run.start..run.end()).contains(&page))
        };
        assert!(contains(0x20_0000) && contains(high.0));
        // Backing pages may be huge; still nearly everything is a hole.
        assert!(
            found.iter().map(PageRun::bytes).sum::<u64>() <= 4 << 20,
            "{found:?}"
        );
        let again: u64 = regions
            .iter()
            .flat_map(|region| pages.data_runs(*region).unwrap())
            .map(|run| run.bytes())
            .sum();
        assert_eq!(again, found.iter().map(PageRun::bytes).sum::<u64>());
    }

    #[test]
    fn pages_read_back_and_the_hole_below_4_gib_is_not_memory() {
        let layout = Layout::new(4 << 30, 4096, 40).unwrap();
        // Of small pages, and of huge ones where the host gives them.
        for transparent_hugepages in [false, true] {
            let options = RamOptions {
                transparent_hugepages,
                ..RamOptions::default()
            };
            let memory = Arc::new(allocate(&layout, &options).unwrap());
            check_pages(RamPages::new(memory));
        }
    }

    fn check_pages(mut pages: RamPages) {
        let run = PageRun::new(PageIndex(0x10_0000), 2).unwrap();
        pages.write(run, &[5; 8192]).unwrap();
        let mut buf = [0; 8192];
        pages.read(run, &mut buf).unwrap();
        assert_eq!(buf, [5; 8192]);
        // Another thread is writing through the file.
        pages.has_spare_cpus = true;
        let turn = pages.writing.lock();
        pages.write(run, &[6; 8192]).unwrap();
        drop(turn);
        pages.read(run, &mut buf).unwrap();
        assert_eq!(buf, [6; 8192]);
        for start in [3 << 18, (3 << 18) - 1, 5 << 18] {
            let run = PageRun::new(PageIndex(start), 2).unwrap();
            assert!(pages.read(run, &mut buf).is_err(), "{start:#x}");
            assert!(pages.data_runs(run).is_err(), "{start:#x}");
        }
    }
}
