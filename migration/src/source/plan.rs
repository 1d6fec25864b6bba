//! What the data connections are told to do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::bitmap::DirtyBitmap;
use crate::page::PageIndex;

/// What a connection's thread is to do next.
#[derive(Clone)]
pub(super) enum Task {
    /// Send its share of a round.
    Round(Arc<RoundPlan>),
    /// Find out whether all that was sent has come to the peer's host; given up when nothing more
    /// comes there for this long.
    Settle(Duration),
}

/// What is to be sent in a round.
pub(super) struct RoundPlan {
    pub(super) number: u32,
    /// Pages that may differ from what was sent, by region.
    pub(super) dirty: Vec<DirtyBitmap>,
    /// Whether the guest runs, so that pages are re-armed before they are read.
    pub(super) running: bool,
    /// Whether the connection says that it is done afterwards.
    pub(super) last: bool,
    /// Whether pages are kept for deltas.
    pub(super) remember: bool,
    /// Whether the destination has thrown its versions away, so that each page travels whole, also
    /// one of zeroes.
    pub(super) whole: bool,
    pub(super) cut: Cut,
}

/// The end of a round before all of its pages were sent.
#[derive(Default)]
pub(super) struct Cut {
    is_made: AtomicBool,
    /// Pages of the plan that were not sent, by region; empty as long as there are none.
    unsent: Mutex<Vec<DirtyBitmap>>,
}

impl Cut {
    /// From now on pages are not sent, but noted.
    pub(super) fn make(&self) {
        self.is_made.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_made(&self) -> bool {
        self.is_made.load(Ordering::Relaxed)
    }

    fn unsent(&self) -> MutexGuard<'_, Vec<DirtyBitmap>> {
        // Bitmaps, whole after every statement.
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages of the batch at `base` have to be sent by somebody else.
    pub(super) fn note(
        &self,
        plan: &[DirtyBitmap],
        region: usize,
        (base, pages): (PageIndex, u64),
    ) {
        let mut unsent = self.unsent();
        if unsent.is_empty() {
            let clean = |bitmap: &DirtyBitmap| DirtyBitmap::new(bitmap.base(), bitmap.pages());
            *unsent = plan.iter().map(clean).collect();
        }
        if let Some(bitmap) = unsent.get_mut(region) {
            bitmap.set_word_at(base, pages);
        }
    }

    /// Adds the pages that were not sent to `dirty`.
    pub(super) fn merge_into(&self, dirty: &mut [DirtyBitmap]) {
        for (bitmap, unsent) in dirty.iter_mut().zip(self.unsent().iter()) {
            bitmap.merge(unsent);
        }
    }
}
