//! Rate-limited logging for whatever a guest can trigger.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Messages that one place may log per [`PERIOD`].
const BURST: u32 = 10;
const PERIOD: Duration = Duration::from_secs(30);

/// Lets ten messages through per half minute and counts the rest.
#[derive(Debug)]
pub struct RateLimit {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    period_start: Option<Instant>,
    passed: u32,
    suppressed: u64,
}

impl RateLimit {
    /// A limit that has let nothing through yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: parking_lot::const_mutex(State {
                period_start: None,
                passed: 0,
                suppressed: 0,
            }),
        }
    }

    /// Whether a message may be logged at `now`; if so, how many were held back since the last.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        let expired = state
            .period_start
            .is_none_or(|start| now.duration_since(start) >= PERIOD);
        if expired {
            state.period_start = Some(now);
            state.passed = 0;
        }
        if state.passed == BURST {
            state.suppressed += 1;
            return None;
        }
        state.passed += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self::new()
    }
}

/// `log::warn!` for guest-triggered conditions: at most a burst of messages per half minute from
/// each place, with the number of those held back.
#[macro_export]
macro_rules! warn_limited {
    ($($key:ident $(:$capture:tt)? = $value:expr),* ; $($message:tt)+) => {{
        static LIMIT: $crate::rate_log::RateLimit = $crate::rate_log::RateLimit::new();
        if let Some(suppressed) = LIMIT.admit(std::time::Instant::now()) {
            log::warn!($($key $(:$capture)? = $value,)* suppressed; $($message)+);
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_passes_then_messages_are_counted_until_the_period_ends() {
        let limit = RateLimit::new();
        let start = Instant::now();
        let admitted = (0..25).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(admitted, 10);
        assert_eq!(limit.admit(start + PERIOD), Some(15));
        assert_eq!(limit.admit(start + PERIOD), Some(0));
    }
}
