//! How long a thread looks for work before it sleeps.
//!
//! Waking a thread takes longer than many a request: a guest that has one request in flight would
//! wait for the thread more than for the disk. So the thread looks on for a while after it has
//! worked, if experience says that work comes soon.

use std::time::{Duration, Instant};

/// Longest time to look.
const MAX_WINDOW: Duration = Duration::from_micros(50);
/// Where it begins when sleep turns out to be short.
const MIN_WINDOW: Duration = Duration::from_micros(8);
/// Finds in a row before descriptors have their turn, too.
const MAX_FINDS: u32 = 64;

/// Adapts to how long the thread has slept lately.
#[derive(Debug, Default)]
pub(super) struct Polling {
    /// Zero: not at all.
    window: Duration,
}

impl Polling {
    /// Calls `poll` until it has found nothing for the length of the window.
    pub(super) fn spin(&self, mut poll: impl FnMut() -> bool) {
        if self.window.is_zero() {
            return;
        }
        let mut finds = 0;
        let mut idle_since = Instant::now();
        while finds < MAX_FINDS {
            if poll() {
                finds += 1;
                idle_since = Instant::now();
            } else if idle_since.elapsed() >= self.window {
                return;
            }
            std::hint::spin_loop();
        }
    }

    /// The thread has slept for so long. A sleep that looking longer would have spared lengthens
    /// the window; a long one ends it, for an idle device must cost nothing.
    pub(super) fn woken_after(&mut self, slept: Duration) {
        self.window = if slept > MAX_WINDOW {
            Duration::ZERO
        } else {
            (self.window * 2).clamp(MIN_WINDOW, MAX_WINDOW)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_grows_with_short_sleeps_and_closes_with_a_long_one() {
        let mut polling = Polling::default();
        let mut widths = Vec::new();
        for _ in 0..5 {
            polling.woken_after(MAX_WINDOW);
            widths.push(polling.window);
        }
        assert_eq!(widths[0], MIN_WINDOW);
        assert!(widths.is_sorted());
        assert_eq!(widths[4], MAX_WINDOW);
        polling.woken_after(MAX_WINDOW + Duration::from_nanos(1));
        assert_eq!(polling.window, Duration::ZERO);
    }

    #[test]
    fn closed_window_does_not_look_and_a_busy_one_lets_others_have_their_turn() {
        let mut looks = 0;
        Polling::default().spin(|| {
            looks += 1;
            true
        });
        assert_eq!(looks, 0);
        let open = Polling { window: MAX_WINDOW };
        open.spin(|| {
            looks += 1;
            true
        });
        assert_eq!(looks, MAX_FINDS);
    }

    #[test]
    fn look_ends_when_nothing_was_found_for_the_window() {
        let polling = Polling { window: MIN_WINDOW };
        let start = Instant::now();
        let mut left = 3;
        polling.spin(|| {
            left -= i32::from(left > 0);
            left > 0
        });
        assert_eq!(left, 0);
        assert!(start.elapsed() >= MIN_WINDOW);
    }
}
