//! A log of writes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::bitmap::DirtyBitmap;
use crate::page::{PageIndex, PageRun};
use crate::ports::{DirtyTracker, PortError};

/// What a test does when the log is read.
type Hook = Box<dyn FnOnce() + Send>;

/// What a test does when pages are re-armed.
type RearmHook = Box<dyn FnMut(PageRun) + Send>;

/// A log that a test writes. As the real ones, it does not see further writes to a harvested page
/// until that is re-armed.
#[derive(Default)]
pub struct FakeTracker {
    /// Never held together with a hook.
    state: Mutex<Log>,
    hook: Mutex<Option<Hook>>,
    after_rearm: Mutex<Option<RearmHook>>,
    harvests: AtomicU64,
    logging: AtomicBool,
    broken: AtomicBool,
    start_fails: AtomicBool,
    /// A round has begun.
    rearmed: AtomicBool,
}

#[derive(Default)]
struct Log {
    dirty: BTreeSet<u64>,
    /// Harvested and not re-armed.
    unarmed: BTreeSet<u64>,
}

impl FakeTracker {
    /// The guest has written to a page. Unseen while logging is off.
    pub fn touch(&self, page: PageIndex) {
        let mut state = self.state();
        if self.is_logging() && !state.unarmed.contains(&page.0) {
            state.dirty.insert(page.0);
        }
    }

    /// Whether logging is on.
    #[must_use]
    pub fn is_logging(&self) -> bool {
        self.logging.load(Ordering::SeqCst)
    }

    /// How often it was read, every region counted.
    #[must_use]
    pub fn harvests(&self) -> u64 {
        self.harvests.load(Ordering::SeqCst)
    }

    /// Makes every harvest fail from now on, or none.
    pub fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::SeqCst);
    }

    /// Makes every start fail from now on, or none.
    pub fn set_start_fails(&self, fails: bool) {
        self.start_fails.store(fails, Ordering::SeqCst);
    }

    /// Calls `hook` right before the next harvest that follows a round.
    ///
    /// # Panics
    /// When a test thread panicked while holding the log.
    pub fn before_harvest(&self, hook: impl FnOnce() + Send + 'static) {
        *self.hook.lock().expect("no test thread panicked") = Some(Box::new(hook));
    }

    /// Calls `hook` each time right after pages were re-armed, which nobody has read yet.
    ///
    /// # Panics
    /// When a test thread panicked in a hook.
    pub fn after_rearm(&self, hook: impl FnMut(PageRun) + Send + 'static) {
        *self.after_rearm.lock().expect("no test thread panicked") = Some(Box::new(hook));
    }

    fn state(&self) -> MutexGuard<'_, Log> {
        self.state.lock().expect("no test thread panicked")
    }
}

fn refusal(what: &'static str) -> PortError {
    PortError::Host {
        what,
        source: std::io::Error::other("broken by the test"),
    }
}

impl DirtyTracker for FakeTracker {
    fn start(&self) -> Result<(), PortError> {
        if self.start_fails.load(Ordering::SeqCst) {
            return Err(refusal("dirty log cannot be started"));
        }
        *self.state() = Log::default();
        self.rearmed.store(false, Ordering::SeqCst);
        self.logging.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn harvest(&self, bitmap: &mut DirtyBitmap) -> Result<(), PortError> {
        if self.rearmed.load(Ordering::SeqCst) {
            let hook = self.hook.lock().expect("no test thread panicked").take();
            if let Some(hook) = hook {
                hook();
            }
        }
        self.harvests.fetch_add(1, Ordering::SeqCst);
        if self.broken.load(Ordering::SeqCst) {
            return Err(refusal("dirty log"));
        }
        let mut state = self.state();
        let end = bitmap.base().0 + bitmap.pages();
        let found: Vec<_> = state.dirty.range(bitmap.base().0..end).copied().collect();
        for page in found {
            state.dirty.remove(&page);
            state.unarmed.insert(page);
            if let Some(run) = PageRun::new(PageIndex(page), 1) {
                bitmap.insert(run);
            }
        }
        Ok(())
    }

    fn rearm(&self, run: PageRun) -> Result<(), PortError> {
        self.rearmed.store(true, Ordering::SeqCst);
        let armed = |page: &u64| !(run.start.0..run.end().0).contains(page);
        self.state().unarmed.retain(armed);
        let mut hook = self.after_rearm.lock().expect("no test thread panicked");
        if let Some(hook) = hook.as_mut() {
            hook(run);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), PortError> {
        self.logging.store(false, Ordering::SeqCst);
        Ok(())
    }
}
