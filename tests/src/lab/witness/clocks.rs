//! A watch over the guest's clocks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::lab::tsc;

/// Between two looks of one watcher.
const TICK: Duration = Duration::from_millis(10);

/// The clocks at one moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    monotonic: Instant,
    realtime: SystemTime,
    tsc: u64,
}

impl Look {
    fn now() -> Self {
        Self {
            monotonic: Instant::now(),
            realtime: SystemTime::now(),
            tsc: tsc::now(),
        }
    }
}

/// What the clocks did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Looks.
    pub looks: u64,
    /// The largest step from one look to the next, of `CLOCK_MONOTONIC`.
    pub monotonic: Duration,
    /// The same of `CLOCK_REALTIME`.
    pub realtime: Duration,
    /// By how much `CLOCK_MONOTONIC` and the time stamp counter differed most about one step. A
    /// guest that had to wait, however long, sees both go on alike.
    pub apart: Duration,
    /// Looks at which a clock was behind the look before: monotonic, realtime, TSC.
    pub backward: [u64; 3],
}

/// The clocks, seen by several threads: each look is later than the one before, on whatever vCPU
/// that was.
#[derive(Debug)]
pub struct Watch {
    khz: u64,
    state: Mutex<(Option<Look>, Steps)>,
}

impl Watch {
    /// A watch over clocks of which the time stamp counter counts `khz` thousand times a second.
    #[must_use]
    pub fn new(khz: u64) -> Self {
        Self {
            khz: khz.max(1),
            state: Mutex::default(),
        }
    }

    /// Looks until `stop`; `ticks` counts this thread's looks.
    pub fn run(&self, ticks: &AtomicU64, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            self.look();
            ticks.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(TICK);
        }
    }

    /// What they did so far.
    pub fn steps(&self) -> Steps {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    fn look(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Look::now();
        if let Some(before) = state.0 {
            state.1.note(before, now, self.khz);
        }
        state.0 = Some(now);
    }
}

impl Steps {
    fn note(&mut self, before: Look, now: Look, khz: u64) {
        self.looks += 1;
        // An `Instant` hides a step back from a subtraction, but not from a comparison.
        let monotonic = now.monotonic.saturating_duration_since(before.monotonic);
        self.monotonic = self.monotonic.max(monotonic);
        let ticks = u128::from(now.tsc.saturating_sub(before.tsc));
        let nanos = u64::try_from(ticks * 1_000_000 / u128::from(khz)).unwrap_or(u64::MAX);
        let apart = monotonic.abs_diff(Duration::from_nanos(nanos));
        self.apart = self.apart.max(apart);
        let realtime = now.realtime.duration_since(before.realtime);
        self.realtime = self.realtime.max(realtime.clone().unwrap_or_default());
        let back = [
            now.monotonic < before.monotonic,
            realtime.is_err(),
            now.tsc < before.tsc,
        ];
        for (count, back) in self.backward.iter_mut().zip(back) {
            *count += u64::from(back);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_back_are_counted_by_clock_and_the_largest_step_kept() {
        let mut steps = Steps::default();
        let first = Look::now();
        let ms = Duration::from_millis;
        let at = |monotonic, realtime, tsc| Look {
            monotonic: first.monotonic + ms(monotonic),
            realtime: first.realtime + ms(realtime),
            tsc,
        };
        // One tick of the counter is a millisecond.
        steps.note(at(0, 1000, 5), at(5000, 6000, 5005), 1);
        assert_eq!((steps.monotonic, steps.apart), (ms(5000), ms(0)));
        steps.note(at(5000, 6000, 5005), at(5300, 6001, 5004), 1);
        steps.note(at(5300, 6001, 5004), at(5299, 6000, 5404), 1);
        assert_eq!((steps.monotonic, steps.realtime), (ms(5000), ms(5000)));
        assert_eq!((steps.looks, steps.apart), (3, ms(400)));
        assert_eq!(steps.backward, [1, 1, 1]);
    }
}
