//! Guest memory that knows its holes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::page::{PageIndex, PageRun};
use crate::ports::{DirectPages, PageStore, PortError};

/// [`crate::PAGE_BYTES`] as a length.
const PAGE: usize = 4096;

/// Memory that stores only pages that were written.
pub struct FakeMemory {
    regions: Vec<PageRun>,
    pages: Mutex<BTreeMap<u64, Vec<u8>>>,
    hole_reads: AtomicU64,
    live_batches: AtomicU64,
    after_read: Mutex<Option<ReadHook>>,
}

/// What a test does when pages were read.
type ReadHook = Box<dyn FnMut(PageRun) + Send>;

impl FakeMemory {
    /// One region: `count` untouched pages from page 0.
    ///
    /// # Panics
    /// When `count` is 0.
    #[must_use]
    pub fn new(count: u64) -> Self {
        Self::with_regions(vec![PageRun::new(PageIndex(0), count).expect("some pages")])
    }

    /// Untouched pages of these regions, ascending.
    #[must_use]
    pub fn with_regions(regions: Vec<PageRun>) -> Self {
        Self {
            regions,
            pages: Mutex::default(),
            hole_reads: AtomicU64::new(0),
            live_batches: AtomicU64::new(0),
            after_read: Mutex::default(),
        }
    }

    /// A page's contents; `None` for a hole.
    #[must_use]
    pub fn page(&self, page: PageIndex) -> Option<Vec<u8>> {
        self.pages().get(&page.0).cloned()
    }

    /// Changes a page in one step, as a guest would; a hole begins as zeroes.
    pub fn change(&self, page: PageIndex, change: impl FnOnce(&mut [u8])) {
        change(self.pages().entry(page.0).or_insert_with(|| vec![0; PAGE]));
    }

    /// Gives a page back to the host: it is a hole again.
    pub fn discard(&self, page: PageIndex) {
        self.pages().remove(&page.0);
    }

    /// Pages that hold data, ascending.
    #[must_use]
    pub fn touched(&self) -> Vec<PageIndex> {
        self.pages().keys().map(|page| PageIndex(*page)).collect()
    }

    /// Pages that were read although they were holes: real memory would have been allocated.
    #[must_use]
    pub fn hole_reads(&self) -> u64 {
        self.hole_reads.load(Ordering::SeqCst)
    }

    /// Batches of pages that went into a socket in place.
    #[must_use]
    pub fn live_batches(&self) -> u64 {
        self.live_batches.load(Ordering::SeqCst)
    }

    /// Calls `hook` each time right after pages were read.
    ///
    /// # Panics
    /// When a test thread panicked in a hook.
    pub fn after_read(&self, hook: impl FnMut(PageRun) + Send + 'static) {
        *self.after_read.lock().expect("no test thread panicked") = Some(Box::new(hook));
    }

    /// The first page whose contents differ from those of `other`.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<PageIndex> {
        let (ours, theirs) = (self.pages(), other.pages());
        let zeroes = vec![0; PAGE];
        let differs =
            |page: &&u64| ours.get(page).unwrap_or(&zeroes) != theirs.get(page).unwrap_or(&zeroes);
        let mut numbers = ours.keys().chain(theirs.keys());
        numbers.find(differs).map(|page| PageIndex(*page))
    }

    fn check(&self, run: PageRun) -> Result<(), PortError> {
        let holds = |region: &PageRun| region.start <= run.start && run.end() <= region.end();
        if self.regions.iter().any(holds) {
            return Ok(());
        }
        Err(PortError::OutsideMemory {
            start: run.start.0,
            end: run.end().0,
        })
    }

    fn pages(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.pages.lock().expect("no test thread panicked")
    }
}

impl PageStore for FakeMemory {
    fn regions(&self) -> Vec<PageRun> {
        self.regions.clone()
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
                None => {
                    self.hole_reads.fetch_add(1, Ordering::SeqCst);
                    chunk.fill(0);
                }
            }
        }
        drop(pages);
        let mut hook = self.after_read.lock().expect("no test thread panicked");
        if let Some(hook) = hook.as_mut() {
            hook(run);
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

    fn direct(&self) -> Option<&dyn DirectPages> {
        Some(self)
    }
}

fn room_for(run: PageRun) -> Vec<u8> {
    vec![0; usize::try_from(run.bytes()).expect("a test's memory")]
}

impl DirectPages for FakeMemory {
    fn zeroes(&self, run: PageRun) -> Result<u64, PortError> {
        self.check(run)?;
        let pages = self.pages();
        let is_zero = |page: &u64| {
            pages
                .get(page)
                .is_none_or(|data| crate::codec::is_zero(data))
        };
        let found = (run.start.0..run.end().0).enumerate();
        let found = found.filter(|(_, page)| is_zero(page));
        Ok(found.fold(0, |word, (at, _)| word | 1 << at))
    }

    fn send(&self, head: &[u8], runs: &[PageRun], socket: BorrowedFd<'_>) -> io::Result<()> {
        self.live_batches.fetch_add(1, Ordering::SeqCst);
        let mut socket = File::from(socket.try_clone_to_owned()?);
        socket.write_all(head)?;
        for run in runs {
            let mut pages = room_for(*run);
            self.read(*run, &mut pages).map_err(io::Error::other)?;
            socket.write_all(&pages)?;
        }
        Ok(())
    }

    fn prefers_receive(&self) -> bool {
        true
    }

    fn receive(&self, runs: &[PageRun], socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut socket = File::from(socket.try_clone_to_owned()?);
        for run in runs {
            let mut pages = room_for(*run);
            socket.read_exact(&mut pages)?;
            self.write(*run, &pages).map_err(io::Error::other)?;
        }
        Ok(())
    }
}
