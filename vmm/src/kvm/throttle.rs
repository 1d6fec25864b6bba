//! Slowing vCPUs down, so that a migration can catch up with a guest that writes too fast.
//!
//! Time is cut into periods. At the end of its share of one, a vCPU is called out of the guest and
//! rests on its own thread until the period is over; an order ends the rest.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::kick::{self, Target};

/// Short enough that a guest's timers and peers do not notice more than a slow machine.
const PERIOD: Duration = Duration::from_millis(10);

/// Full speed.
pub(super) const FULL: u8 = 100;

/// Until when a vCPU rests.
#[derive(Debug)]
pub(super) struct Brake {
    base: Instant,
    /// Since `base`; 0: it does not rest.
    until_nanos: AtomicU64,
}

impl Brake {
    pub(super) fn new() -> Self {
        Self {
            base: Instant::now(),
            until_nanos: AtomicU64::new(0),
        }
    }

    /// How much longer the vCPU is to rest. Without a throttle this costs one load.
    pub(super) fn rest(&self) -> Option<Duration> {
        let until = self.until_nanos.load(Ordering::Acquire);
        if until == 0 {
            return None;
        }
        let until = self.base + Duration::from_nanos(until);
        let left = until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    fn pull(&self, until: Instant) {
        let nanos = until.saturating_duration_since(self.base).as_nanos();
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        self.until_nanos.store(nanos, Ordering::Release);
    }

    fn release(&self) {
        self.until_nanos.store(0, Ordering::Release);
    }
}

/// A vCPU as the throttle sees it.
pub(super) struct Throttled {
    pub(super) brake: Arc<Brake>,
    pub(super) target: Target,
}

/// The thread that cuts time. Dropping it lets all vCPUs run at full speed.
pub(super) struct Throttle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    vcpus: Vec<Throttled>,
    /// Share of the time that each vCPU gets, in percent.
    percents: Vec<AtomicU8>,
    ends: AtomicBool,
}

impl Throttle {
    /// Starts with all vCPUs at full speed.
    ///
    /// # Errors
    /// The host's, when it has no thread left.
    pub(super) fn start(vcpus: Vec<Throttled>) -> std::io::Result<Self> {
        let percents = vcpus.iter().map(|_| AtomicU8::new(FULL)).collect();
        let shared = Arc::new(Shared {
            vcpus,
            percents,
            ends: AtomicBool::new(false),
        });
        let theirs = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name("throttle".to_owned());
        let thread = builder.spawn(move || theirs.cut_time())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Gives vCPU `index` its share, 1 to 100.
    pub(super) fn set(&self, index: usize, percent: u8) {
        if let Some(share) = self.shared.percents.get(index) {
            share.store(percent.clamp(1, FULL), Ordering::Relaxed);
        }
    }

    /// Whether no vCPU is slowed down.
    pub(super) fn is_idle(&self) -> bool {
        let mut percents = self.shared.percents.iter();
        percents.all(|percent| percent.load(Ordering::Relaxed) == FULL)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                log::error!("the throttle's thread has panicked");
            }
        }
        for vcpu in &self.shared.vcpus {
            vcpu.brake.release();
        }
    }
}

impl Shared {
    fn cut_time(&self) {
        while !self.ends.load(Ordering::Acquire) {
            let start = Instant::now();
            let mut shares: Vec<_> = self.percents.iter().zip(&self.vcpus).collect();
            shares.retain(|(percent, _)| percent.load(Ordering::Relaxed) < FULL);
            shares.sort_by_key(|(percent, _)| percent.load(Ordering::Relaxed));
            for (percent, vcpu) in shares {
                let percent = percent.load(Ordering::Relaxed);
                if percent == FULL || !self.wait_until(start + PERIOD * u32::from(percent) / 100) {
                    continue;
                }
                vcpu.brake.pull(start + PERIOD);
                vcpu.target.kick();
            }
            self.wait_until(start + PERIOD);
        }
    }

    /// Whether it is still to go on then.
    fn wait_until(&self, instant: Instant) -> bool {
        loop {
            if self.ends.load(Ordering::Acquire) {
                return false;
            }
            let left = instant.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::park_timeout(left);
        }
    }
}

/// The vCPU on `thread`, which must not be joined as long as the result is in use.
pub(super) fn throttled<T>(brake: &Arc<Brake>, thread: &JoinHandle<T>) -> Throttled {
    Throttled {
        brake: Arc::clone(brake),
        target: kick::Target::new(thread.as_pthread_t()),
    }
}

#[cfg(test)]
mod tests;
