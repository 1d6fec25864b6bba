//! The time, as a test has it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::ports::Clock;

/// A clock that moves only when told to.
#[derive(Debug)]
pub struct FakeClock(Mutex<Instant>);

impl FakeClock {
    /// A clock that shows the present time.
    #[must_use]
    pub fn new() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    /// Moves it forward.
    ///
    /// # Panics
    /// When a test thread panicked while holding the clock.
    pub fn advance(&self, by: Duration) {
        *self.0.lock().expect("no test thread panicked") += by;
    }
}

impl Default for FakeClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Instant {
        *self.0.lock().expect("no test thread panicked")
    }
}
