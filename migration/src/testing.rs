//! Fakes of the ports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::bitmap::DirtyBitmap;
use crate::page::{PageIndex, PageRun};
use crate::ports::{Clock, DirtyTracker, PageStore, PortError};

/// [`crate::PAGE_BYTES`] as a length.
const PAGE: usize = 4096;

/// Memory of one region that stores only pages that were written.
#[derive(Debug)]
pub struct FakeMemory {
    region: PageRun,
    pages: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl FakeMemory {
    /// `count` untouched pages from page 0.
    ///
    /// # Panics
    /// When `count` is 0.
    #[must_use]
    pub fn new(count: u64) -> Self {
        Self {
            region: PageRun::new(PageIndex(0), count).expect("some pages"),
            pages: Mutex::default(),
        }
    }

    fn check(&self, run: PageRun) -> Result<(), PortError> {
        if run.end() <= self.region.end() {
            return Ok(());
        }
        Err(PortError::OutsideMemory {
            start: run.start.0,
            end: run.end().0,
        })
    }

    fn pages(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.pages.lock().expect("no test thread panicked")
    }
}

impl PageStore for FakeMemory {
    fn regions(&self) -> Vec<PageRun> {
        vec![self.region]
    }

    fn data_runs(&self, run: PageRun) -> Result<Vec<PageRun>, PortError> {
        self.check(run)?;
        let pages = self.pages();
        let touched = pages.range(run.start.0..run.end().0);
        Ok(touched
            .filter_map(|(page, _)| PageRun::new(PageIndex(*page), 1))
            .collect())
    }

    fn read(&self, run: PageRun, buf: &mut [u8]) -> Result<(), PortError> {
        self.check(run)?;
        let pages = self.pages();
        for (chunk, page) in buf.chunks_mut(PAGE).zip(run.start.0..) {
            match pages.get(&page) {
                Some(data) => chunk.copy_from_slice(data),
                None => chunk.fill(0),
            }
        }
        Ok(())
    }

    fn write(&self, run: PageRun, buf: &[u8]) -> Result<(), PortError> {
        self.check(run)?;
        let mut pages = self.pages();
        for (chunk, page) in buf.chunks(PAGE).zip(run.start.0..) {
            pages.insert(page, chunk.to_vec());
        }
        Ok(())
    }
}

/// A log that a test writes.
#[derive(Debug, Default)]
pub struct FakeTracker {
    dirty: Mutex<BTreeSet<u64>>,
    logging: AtomicBool,
    broken: AtomicBool,
}

impl FakeTracker {
    /// The guest writes to a page. Unseen while logging is off.
    pub fn touch(&self, page: PageIndex) {
        if self.is_logging() {
            self.dirty().insert(page.0);
        }
    }

    /// Whether logging is on.
    #[must_use]
    pub fn is_logging(&self) -> bool {
        self.logging.load(Ordering::SeqCst)
    }

    /// Makes every harvest fail from now on, or none.
    pub fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::SeqCst);
    }

    fn dirty(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.dirty.lock().expect("no test thread panicked")
    }
}

impl DirtyTracker for FakeTracker {
    fn start(&self) -> Result<(), PortError> {
        self.logging.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn harvest(&self, bitmap: &mut DirtyBitmap) -> Result<(), PortError> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(PortError::Host {
                what: "dirty log",
                source: std::io::Error::other("broken by the test"),
            });
        }
        for page in std::mem::take(&mut *self.dirty()) {
            if let Some(run) = PageRun::new(PageIndex(page), 1) {
                bitmap.insert(run);
            }
        }
        Ok(())
    }

    fn rearm(&self, _: PageRun) -> Result<(), PortError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), PortError> {
        self.logging.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// A clock that moves only when told to.
#[derive(Debug)]
pub struct FakeClock(Mutex<Instant>);

impl FakeClock {
    /// A clock that shows the present time.
    #[must_use]
    pub fn new() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    /// Moves it forward.
    ///
    /// # Panics
    /// When a test thread panicked while holding the clock.
    pub fn advance(&self, by: Duration) {
        *self.0.lock().expect("no test thread panicked") += by;
    }
}

impl Default for FakeClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Instant {
        *self.0.lock().expect("no test thread panicked")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contract that every tracker keeps: writes while logging appear exactly once.
    #[test]
    fn writes_while_logging_appear_in_exactly_one_harvest() {
        let tracker = FakeTracker::default();
        tracker.touch(PageIndex(1));
        tracker.start().unwrap();
        tracker.touch(PageIndex(5));
        let mut bitmap = DirtyBitmap::new(PageIndex(0), 10);
        tracker.harvest(&mut bitmap).unwrap();
        assert_eq!(
            bitmap.runs().map(|run| run.start.0).collect::<Vec<_>>(),
            [5]
        );
        let mut bitmap = DirtyBitmap::new(PageIndex(0), 10);
        tracker.harvest(&mut bitmap).unwrap();
        assert_eq!(bitmap.count(), 0);
    }

    #[test]
    fn memory_reads_back_and_knows_its_holes() {
        let memory = FakeMemory::new(8);
        let run = PageRun::new(PageIndex(3), 1).unwrap();
        memory.write(run, &[7; PAGE]).unwrap();
        let all = PageRun::new(PageIndex(0), 8).unwrap();
        assert_eq!(memory.data_runs(all).unwrap(), [run]);
        let mut buf = vec![1; 8 * PAGE];
        memory.read(all, &mut buf).unwrap();
        assert_eq!(buf.iter().filter(|byte| **byte == 7).count(), PAGE);
        let outside = PageRun::new(PageIndex(7), 2).unwrap();
        assert!(memory.read(outside, &mut buf).is_err());
    }
}
