//! How far the first round has come.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::stream::Shared;
use crate::page::{PAGE_BYTES, PageRun};

/// How much of the guest's memory went in which time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Bytes of memory that were dealt with, holes included.
    pub done_bytes: u64,
    /// Bytes of memory in all.
    pub memory_bytes: u64,
    /// Bytes written to the connections for that.
    pub wire_bytes: u64,
    /// How long it took.
    pub took: Duration,
}

impl Pace {
    /// Of a first round that began at `began`.
    pub(super) fn since(began: Instant, shared: &Shared<'_>) -> Self {
        let (regions, totals) = (shared.pages.regions(), &shared.totals);
        Self {
            done_bytes: totals.done_pages.load(Ordering::Relaxed) * PAGE_BYTES,
            memory_bytes: regions.iter().map(PageRun::bytes).sum(),
            wire_bytes: totals.wire_bytes.load(Ordering::Relaxed),
            took: began.elapsed(),
        }
    }
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let rate = mib(self.wire_bytes) / self.took.as_secs_f64().max(1e-6);
        write!(
            f,
            "{:.0} of {:.0} MiB went in {:.2} s, at {rate:.1} MiB/s over the connections",
            mib(self.done_bytes),
            mib(self.memory_bytes),
            self.took.as_secs_f64()
        )
    }
}
