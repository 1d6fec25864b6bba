//! Guest RAM whose pages come when they are touched.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devices::GuestRam;
use devices::virtio::balloon::RamReclaim;
use migration::ports::{LazyMemory, PageStore, PortError};
use migration::{DirtyBitmap, PageIndex, PageRun};
use vm_memory::GuestAddress;

use super::RamPages;
use crate::memory::{RamDiscard, Userfault, UserfaultError};

/// How long a page may resist being thrown away: somebody may hold it for a moment.
const DISCARD_TIME: Duration = Duration::from_millis(500);

/// Guest RAM in a post-copy.
pub(crate) struct LazyRam {
    /// Closed, everybody who waits would go on with zeroes, and a device would write them to a
    /// disk. So it is not, once the guest runs on it, before every page is there.
    faults: Option<Userfault>,
    pages: RamPages,
    /// Whether every page is there.
    whole: Arc<AtomicBool>,
    /// Whether the guest has been started.
    in_use: Arc<AtomicBool>,
}

impl LazyRam {
    /// Throws the pages of `missing` away. Whoever touches one of them, or one that was never
    /// there, waits from now on. Of the flags, the first says whether a guest runs on it; the second
    /// is set when every page is there.
    ///
    /// # Errors
    /// [`PortError`]; the pages are gone all the same.
    pub(crate) fn new(
        ram: &Arc<GuestRam>,
        missing: &[DirtyBitmap],
        (in_use, whole): (Arc<AtomicBool>, Arc<AtomicBool>),
    ) -> Result<Self, PortError> {
        let pages = RamPages::new(Arc::clone(ram));
        discard(ram, missing)?;
        let faults = Userfault::register(Arc::clone(ram)).map_err(port_error)?;
        Ok(Self {
            faults: Some(faults),
            pages,
            whole,
            in_use,
        })
    }

    fn faults(&self) -> &Userfault {
        self.faults.as_ref().expect("there until it is dropped")
    }
}

/// Throws pages away. One that is part of a huge page which cannot be split at the moment would
/// stay, full of zeroes, and never be asked for.
fn discard(ram: &Arc<GuestRam>, missing: &[DirtyBitmap]) -> Result<(), PortError> {
    let reclaim = RamDiscard::new(Arc::clone(ram), None);
    let failed = |source: io::Error| PortError::Host {
        what: "stale pages of guest memory cannot be thrown away",
        source,
    };
    let deadline = Instant::now() + DISCARD_TIME;
    let runs = missing.iter().flat_map(DirtyBitmap::runs);
    let mut left: Vec<PageRun> = runs.collect();
    loop {
        for run in &left {
            let start = run.start.gpa().unwrap_or(u64::MAX);
            reclaim
                .discard(GuestAddress(start), run.bytes())
                .map_err(failed)?;
        }
        // A look of its own each time: what was data before is remembered as such.
        let pages = RamPages::new(Arc::clone(ram));
        let stay: Result<Vec<_>, _> = left.iter().map(|run| pages.data_runs(*run)).collect();
        left = stay?.concat();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let count: u64 = left.iter().map(|run| run.count).sum();
            let text = format!("{count} pages are held by somebody");
            return Err(failed(io::Error::other(text)));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn port_error(error: UserfaultError) -> PortError {
    match error {
        UserfaultError::OutsideMemory { start, end } => PortError::OutsideMemory { start, end },
        UserfaultError::Host { what, source } => PortError::Host { what, source },
        error @ (UserfaultError::NotAllowed(_)
        | UserfaultError::Unsupported(_)
        | UserfaultError::HugePages) => PortError::Machine {
            what: "memory that comes when it is touched",
            source: Box::new(error),
        },
    }
}

impl LazyMemory for LazyRam {
    fn next_fault(&self, timeout: Duration) -> Result<Option<PageIndex>, PortError> {
        self.faults().next_fault(timeout).map_err(port_error)
    }

    fn place(&self, run: PageRun, buf: &[u8]) -> Result<(), PortError> {
        self.faults().fill(run, buf).map(drop).map_err(port_error)
    }

    fn place_zeroes(&self, run: PageRun) -> Result<(), PortError> {
        self.faults().fill_zero(run).map(drop).map_err(port_error)
    }

    fn complete(&self) -> Result<(), PortError> {
        for region in self.pages.regions() {
            self.faults().unregister(region).map_err(port_error)?;
        }
        self.whole.store(true, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for LazyRam {
    fn drop(&mut self) {
        if self.in_use.load(Ordering::SeqCst) && !self.whole.load(Ordering::SeqCst) {
            std::mem::forget(self.faults.take());
        }
    }
}
