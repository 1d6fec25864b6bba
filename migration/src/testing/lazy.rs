//! Memory whose pages come when they are touched, and a guest that touches them.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::FakeMemory;
use crate::bitmap::DirtyBitmap;
use crate::page::{PageIndex, PageRun};
use crate::ports::{LazyMemory, PageStore, PortError};

/// [`crate::PAGE_BYTES`] as a length.
const PAGE: usize = 4096;

#[derive(Default)]
struct State {
    faults: VecDeque<PageIndex>,
    whole: bool,
    /// The guest stands still; where it waits for a page, it goes on waiting.
    held: bool,
    /// It has nothing more to do.
    closed: bool,
    changed: BTreeSet<PageIndex>,
    /// The guest has touched every page.
    done: bool,
}

/// Fake memory in a post-copy.
pub struct FakeLazy {
    memory: Arc<FakeMemory>,
    state: Mutex<State>,
    changed: Condvar,
}

impl FakeLazy {
    pub(super) fn new(memory: &Arc<FakeMemory>, missing: &[DirtyBitmap]) -> Self {
        for run in missing.iter().flat_map(DirtyBitmap::runs) {
            (run.start.0..run.end().0).for_each(|page| memory.discard(PageIndex(page)));
        }
        Self {
            memory: Arc::clone(memory),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test thread panicked")
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, time);
        waited.expect("no test thread panicked").0
    }

    /// A guest that touches every page, the last one first, and changes every third. The host tells of
    /// each that it waits for once.
    pub(super) fn touch_everything(&self) {
        let regions = self.memory.regions().into_iter();
        let pages: Vec<_> = regions.flat_map(|run| run.start.0..run.end().0).collect();
        for page in pages.into_iter().rev().map(PageIndex) {
            let mut state = self.state();
            let mut asked = false;
            loop {
                if state.closed {
                    return;
                }
                let waits = self.memory.page(page).is_none() && !state.whole;
                if !waits && !state.held {
                    break;
                }
                if waits && !asked && !state.held {
                    state.faults.push_back(page);
                    self.changed.notify_all();
                    asked = true;
                }
                state = self.wait(state, Duration::from_secs(1));
            }
            if page.0.is_multiple_of(3) {
                self.memory.change(page, |bytes| bytes.flip());
                state.changed.insert(page);
            }
        }
        self.state().done = true;
        self.changed.notify_all();
    }

    /// The guest stands still, or goes on.
    pub(super) fn hold(&self, held: bool) {
        self.state().held = held;
        self.changed.notify_all();
    }

    /// The guest waits no more.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// Waits until the guest has touched every page, if it can.
    pub fn wait_touched(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        while !state.done && Instant::now() < deadline {
            state = self.wait(state, Duration::from_millis(5));
        }
        state.done
    }

    /// Ends the guest and undoes what it has changed: what is left is what came, unless a page came
    /// twice.
    pub fn undo(&self) {
        self.close();
        for page in std::mem::take(&mut self.state().changed) {
            self.memory.change(page, |bytes| bytes.flip());
        }
    }
}

/// A change that undoes itself.
trait Flip {
    fn flip(&mut self);
}

impl Flip for [u8] {
    fn flip(&mut self) {
        for byte in self.iter_mut().take(1) {
            *byte ^= 0xff;
        }
    }
}

impl LazyMemory for FakeLazy {
    fn next_fault(&self, timeout: Duration) -> Result<Option<PageIndex>, PortError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match state.faults.pop_front() {
                Some(page) => return Ok(Some(page)),
                None if left.is_zero() => return Ok(None),
                None => state = self.wait(state, left),
            }
        }
    }

    fn place(&self, run: PageRun, buf: &[u8]) -> Result<(), PortError> {
        let _state = self.state();
        for (page, bytes) in (run.start.0..run.end().0).zip(buf.chunks(PAGE)) {
            let at = PageRun {
                start: PageIndex(page),
                count: 1,
            };
            if self.memory.page(at.start).is_none() {
                self.memory.write(at, bytes)?;
            }
        }
        self.changed.notify_all();
        Ok(())
    }

    fn place_zeroes(&self, run: PageRun) -> Result<(), PortError> {
        let bytes = usize::try_from(run.bytes()).unwrap_or(0);
        self.place(run, &vec![0; bytes])
    }

    fn complete(&self) -> Result<(), PortError> {
        self.state().whole = true;
        self.changed.notify_all();
        Ok(())
    }
}
