//! The bandwidth limit of all connections together.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::progress::MigrationHandle;

/// What may be sent at once after a time of silence.
const BURST: Duration = Duration::from_millis(20);

/// Longest nap: a limit that is lifted takes effect soon.
const NAP: Duration = Duration::from_millis(50);

/// Shares a limit among threads: each takes what it is about to send.
pub(super) struct Pacer<'a> {
    handle: &'a MigrationHandle,
    /// When everything taken so far will have been sent, at the limit's speed.
    next: Mutex<Instant>,
}

impl<'a> Pacer<'a> {
    pub(super) fn new(handle: &'a MigrationHandle) -> Self {
        Self {
            handle,
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits until `bytes` may be sent; returns whether that took time.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let Some(limit) = self.handle.tuning().bandwidth_bytes_per_s else {
            return false;
        };
        let nanos = bytes as u128 * 1_000_000_000 / u128::from(limit.max(1));
        let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let until = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let earliest = Instant::now().checked_sub(BURST).unwrap_or(*next);
            let begin = (*next).max(earliest);
            *next = begin + time;
            begin
        };
        let mut waited = false;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let limited = self.handle.tuning().bandwidth_bytes_per_s.is_some();
            if left.is_zero() || !limited || self.handle.is_cancelled() {
                return waited;
            }
            waited = true;
            std::thread::sleep(left.min(NAP));
        }
    }
}
