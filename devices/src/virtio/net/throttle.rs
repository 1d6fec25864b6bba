//! One direction's rate limit.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use vmm_sys_util::timerfd::TimerFd;

use crate::counters::Counter;
use crate::rate::RateLimiter;
use crate::warn_limited;

/// A limit shared by all queue pairs, with the timer of one thread that waits for it.
pub(super) struct Throttle {
    limiter: Arc<Mutex<RateLimiter>>,
    timer: TimerFd,
    waiting: bool,
}

impl Throttle {
    pub(super) fn new(limiter: Arc<Mutex<RateLimiter>>) -> io::Result<Self> {
        Ok(Self {
            limiter,
            timer: TimerFd::new()?,
            waiting: false,
        })
    }

    /// Becomes readable when the wait is over.
    pub(super) fn timer(&self) -> &TimerFd {
        &self.timer
    }

    /// Whether the next packet has to wait. If so, the timer runs.
    pub(super) fn must_wait(&mut self, waits: &Counter) -> bool {
        if self.waiting {
            return true;
        }
        let Some(delay) = self.limiter.lock().delay(Instant::now()) else {
            return false;
        };
        if let Err(error) = self.timer.reset(delay, None) {
            warn_limited!(error:% = error; "rate limit timer, the limit is not applied");
            return false;
        }
        waits.add(1);
        self.waiting = true;
        true
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Pays for a packet.
    pub(super) fn charge(&self, bytes: u64) {
        self.limiter.lock().charge(bytes);
    }

    /// The timer is readable.
    pub(super) fn expired(&mut self) {
        if self.timer.wait().is_ok() {
            self.waiting = false;
        }
    }
}
