//! Memory while pages are missing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::bitmap::DirtyBitmap;
use crate::page::{PageIndex, PageRun};
use crate::ports::{LazyMemory, PageStore, PortError};
use crate::wire::message::Complete;

/// Memory while pages are missing.
pub(super) struct Missing {
    pub(super) lazy: Arc<dyn LazyMemory>,
    runs: Vec<PageRun>,
    /// By region. Held while a page is placed: nobody may take one that is on its way for one that
    /// was never sent. Lock order: `asked`, then one of these.
    regions: Vec<Mutex<DirtyBitmap>>,
    left: AtomicU64,
    /// Pages that somebody waits for, and since when. The host tells of each once: who is told sees to
    /// it, or the next one who can.
    asked: Mutex<BTreeMap<PageIndex, Instant>>,
    faults: AtomicU64,
    waited_us: AtomicU64,
    longest_us: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Bitmaps and maps are whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Missing {
    pub(super) fn new(missing: Vec<DirtyBitmap>, lazy: Arc<dyn LazyMemory>) -> Self {
        let run = |bitmap: &DirtyBitmap| PageRun::new(bitmap.base(), bitmap.pages());
        Self {
            lazy,
            runs: missing.iter().filter_map(run).collect(),
            left: AtomicU64::new(missing.iter().map(DirtyBitmap::count).sum()),
            asked: Mutex::default(),
            regions: missing.into_iter().map(Mutex::new).collect(),
            faults: AtomicU64::new(0),
            waited_us: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
        }
    }

    /// Pages that have not come yet.
    pub(super) fn left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    /// Lets everybody touch everything again.
    pub(super) fn complete(&self) -> Result<(), PortError> {
        self.lazy.complete()
    }

    /// What it was like for the guest.
    pub(super) fn summary(&self) -> Complete {
        Complete {
            faults: self.faults.load(Ordering::Relaxed),
            waited_us: self.waited_us.load(Ordering::Relaxed),
            longest_us: self.longest_us.load(Ordering::Relaxed),
        }
    }

    fn region(&self, run: PageRun) -> Result<MutexGuard<'_, DirtyBitmap>, PortError> {
        let holds = |(_, region): &(&Mutex<_>, &PageRun)| {
            region.start <= run.start && run.end() <= region.end()
        };
        let mut regions = self.regions.iter().zip(&self.runs);
        let region = regions.find(holds).map(|(region, _)| lock(region));
        region.ok_or(PortError::OutsideMemory {
            start: run.start.0,
            end: run.end().0,
        })
    }

    /// Whether a page that somebody waits for is to be fetched; if it was never sent, it is zeroes.
    pub(super) fn is_to_be_fetched(&self, page: PageIndex) -> Result<bool, PortError> {
        let run = PageRun {
            start: page,
            count: 1,
        };
        let region = self.region(run)?;
        if region.contains(page) {
            return Ok(true);
        }
        self.lazy.place_zeroes(run)?;
        Ok(false)
    }

    /// Which those are.
    pub(super) fn list(&self) -> Vec<DirtyBitmap> {
        let regions = self.regions.iter();
        regions.map(|region| lock(region).clone()).collect()
    }

    /// Somebody waits for a page; whether that is news.
    pub(super) fn note_asked(&self, page: PageIndex) -> bool {
        let mut asked = lock(&self.asked);
        let is_new = !asked.contains_key(&page);
        asked.entry(page).or_insert_with(Instant::now);
        is_new
    }

    /// Nobody waits for it any more.
    pub(super) fn forget_asked(&self, page: PageIndex) {
        lock(&self.asked).remove(&page);
    }

    /// Pages that somebody waits for.
    pub(super) fn asked(&self) -> Vec<PageIndex> {
        lock(&self.asked).keys().copied().collect()
    }

    /// Pages have come: nobody waits for those any more.
    pub(super) fn note_answers(&self) {
        lock(&self.asked).retain(|page, since| {
            let run = PageRun {
                start: *page,
                count: 1,
            };
            let waits = self.region(run).is_ok_and(|region| region.contains(*page));
            if !waits {
                self.note_fault(*since);
            }
            waits
        });
    }

    fn note_fault(&self, since: Instant) {
        let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.waited_us.fetch_add(micros, Ordering::Relaxed);
        self.longest_us.fetch_max(micros, Ordering::Relaxed);
    }
}

/// As decoders see it: what is not missing any more is the guest's and stays as it is.
impl PageStore for Missing {
    fn regions(&self) -> Vec<PageRun> {
        self.runs.clone()
    }

    fn data_runs(&self, run: PageRun) -> Result<Vec<PageRun>, PortError> {
        Ok(vec![run])
    }

    /// Only changes against an older version need it, and there is none.
    fn read(&self, run: PageRun, _: &mut [u8]) -> Result<(), PortError> {
        Err(PortError::OutsideMemory {
            start: run.start.0,
            end: run.end().0,
        })
    }

    fn write(&self, run: PageRun, buf: &[u8]) -> Result<(), PortError> {
        let mut region = self.region(run)?;
        let wanted: Vec<_> = region.runs_within(run).collect();
        for part in wanted {
            let page = crate::codec::PAGE;
            let first = usize::try_from(part.start.0 - run.start.0).unwrap_or(usize::MAX);
            let count = usize::try_from(part.count).unwrap_or(usize::MAX);
            let bytes = buf.get(first * page..(first + count) * page);
            self.lazy.place(part, bytes.unwrap_or_default())?;
            region.remove(part);
            self.left.fetch_sub(part.count, Ordering::SeqCst);
        }
        Ok(())
    }
}
