//! The bandwidth limit of all connections together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::progress::MigrationHandle;

/// What may be sent at once after a time of silence.
const BURST: Duration = Duration::from_millis(20);

/// Longest nap: a limit that is changed takes effect soon.
const NAP: Duration = Duration::from_millis(50);

/// Shares a limit among threads: each takes what it is about to send.
pub(super) struct Pacer<'a> {
    handle: &'a MigrationHandle,
    debt: Mutex<Debt>,
    /// Nobody waits any more.
    is_over: AtomicBool,
}

/// What was taken and, at the limit's speed, has not been sent yet.
struct Debt {
    /// Byte nanoseconds per second, below zero after a silence.
    amount: i128,
    /// When it was reckoned.
    at: Instant,
}

const NANOS: i128 = 1_000_000_000;

impl Debt {
    /// Reckons what was sent meanwhile; returns how long the rest takes.
    fn settle(&mut self, limit: u64, now: Instant) -> Duration {
        let limit = i128::from(limit.max(1));
        let nanos = |time: Duration| i128::try_from(time.as_nanos()).unwrap_or(i128::MAX >> 64);
        let sent = nanos(now.saturating_duration_since(self.at)) * limit;
        self.amount = (self.amount - sent).max(-nanos(BURST) * limit);
        self.at = now;
        let left = u64::try_from(self.amount.max(0) / limit);
        Duration::from_nanos(left.unwrap_or(u64::MAX))
    }
}

impl<'a> Pacer<'a> {
    pub(super) fn new(handle: &'a MigrationHandle) -> Self {
        Self {
            handle,
            debt: Mutex::new(Debt {
                amount: 0,
                at: Instant::now(),
            }),
            is_over: AtomicBool::new(false),
        }
    }

    /// Waits until `bytes` may be sent; returns whether that took time.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let mut waited = false;
        while let Some(limit) = self.handle.tuning().bandwidth_bytes_per_s
            && !self.handle.is_cancelled()
            && !self.is_over.load(Ordering::Acquire)
        {
            let left = {
                let mut debt = self.debt.lock().unwrap_or_else(PoisonError::into_inner);
                let left = debt.settle(limit, Instant::now());
                if left.is_zero() {
                    debt.amount += bytes as i128 * NANOS;
                    return waited;
                }
                left
            };
            waited = true;
            std::thread::sleep(left.min(NAP));
        }
        waited
    }

    /// Lets everybody go who waits.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Tuning;

    fn handle(limit: u64) -> MigrationHandle {
        MigrationHandle::new(Tuning {
            bandwidth_bytes_per_s: Some(limit),
            max_downtime: Duration::from_millis(20),
        })
    }

    #[test]
    fn debt_goes_down_with_time_at_the_limit_of_that_time() {
        let begin = Instant::now();
        let mut debt = Debt {
            amount: 1000 * NANOS,
            at: begin,
        };
        assert_eq!(debt.settle(100, begin), Duration::from_secs(10));
        let later = begin + Duration::from_secs(4);
        assert_eq!(debt.settle(100, later), Duration::from_secs(6));
        // A higher limit is in force from the next look on.
        assert_eq!(debt.settle(600, later), Duration::from_secs(1));
        let later = later + Duration::from_secs(60);
        assert_eq!(debt.settle(600, later), Duration::ZERO);
        // Silence does not pile up.
        assert_eq!(debt.amount, -600 * NANOS / 50);
        assert_eq!(debt.settle(0, later), Duration::ZERO);
    }

    #[test]
    fn who_waits_hears_of_a_new_limit_and_of_the_end() {
        for mend in [
            |handle: &MigrationHandle, _: &Pacer<'_>| {
                handle.retune(|tuning| tuning.bandwidth_bytes_per_s = Some(u64::MAX));
            },
            |_: &MigrationHandle, pacer: &Pacer<'_>| pacer.end(),
            |handle: &MigrationHandle, _: &Pacer<'_>| handle.cancel(),
        ] {
            let handle = handle(1);
            let pacer = Pacer::new(&handle);
            assert!(!pacer.take(1 << 20));
            let begin = Instant::now();
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| pacer.take(1));
                mend(&handle, &pacer);
                waiting.join().unwrap();
            });
            assert!(begin.elapsed() < Duration::from_secs(5));
        }
    }
}
