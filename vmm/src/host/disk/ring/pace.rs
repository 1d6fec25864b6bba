//! Which requests run at once on the queue's thread.
//!
//! A buffered write to most file systems never completes within `io_uring_enter`: the kernel
//! hands it to a worker thread, one at a time for each file, and a write that copies 4 KiB to
//! the page cache costs several times what pwrite(2) does. The same holds for tmpfs, reads
//! included. So such requests are executed directly, as long as they are quick. When one is not
//! (the host throttles writers, or memory has to be found first), the ring takes over for a
//! while: then the queue's thread can serve other requests meanwhile.

use std::time::{Duration, Instant};

/// Longest request that is executed directly, about 0.1 ms of copying: longer ones would keep the
/// queue's thread from others.
pub(super) const MAX_BYTES: u64 = 1 << 20;
/// A direct request that takes longer than this was not served from memory.
const SLOW: Duration = Duration::from_millis(2);
/// How long the ring is used after a slow request.
const PENALTY: Duration = Duration::from_millis(100);

/// Remembers whether direct execution has been slow lately.
#[derive(Debug, Default)]
pub(super) struct Pace {
    ring_until: Option<Instant>,
}

impl Pace {
    /// Whether a request may be executed directly at `now`.
    pub(super) fn admits(&mut self, now: Instant) -> bool {
        if self.ring_until.is_some_and(|until| now < until) {
            return false;
        }
        self.ring_until = None;
        true
    }

    /// Takes note of a direct request that was executed from `start` to `end`.
    pub(super) fn note(&mut self, start: Instant, end: Instant) {
        if end.saturating_duration_since(start) >= SLOW {
            self.ring_until = Some(end + PENALTY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_request_sends_the_next_ones_to_the_ring_for_a_while() {
        let mut pace = Pace::default();
        let start = Instant::now();
        assert!(pace.admits(start));
        pace.note(start, start + SLOW / 2);
        assert!(pace.admits(start + SLOW / 2));
        let end = start + SLOW;
        pace.note(start, end);
        assert!(!pace.admits(end));
        assert!(!pace.admits(end + PENALTY - Duration::from_nanos(1)));
        assert!(pace.admits(end + PENALTY));
        assert!(pace.admits(end), "a clock that jumps back does no harm");
    }
}
