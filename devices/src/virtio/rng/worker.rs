//! The thread that fills the guest's buffers.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::EventOps;
use parking_lot::Mutex;
use vmm_sys_util::timerfd::TimerFd;

use super::device::RngCounters;
use super::entropy::Entropy;
use crate::events::{DeviceEvent, Reporter};
use crate::rate::{RateLimiter, RateLimits};
use crate::rate_log::RateLimit;
use crate::virtio::buffers;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};
use crate::virtio::worker::{Handler, watch};
use crate::warn_limited;

const DOORBELL: u32 = 0;
const TIMER: u32 = 1;

/// Most bytes per request: the driver asks again when it wants more (section 5.4.6.2).
const MAX_CHUNK_BYTES: usize = 64 << 10;
/// Requests answered before the thread looks at its events again.
const BATCH: usize = 32;
/// Time until a source that had nothing is asked again.
const RETRY: Duration = Duration::from_millis(50);

pub(super) struct Shared {
    entropy: Arc<dyn Entropy>,
    /// Outlives the worker: a driver that resets the device gains nothing.
    limiter: Mutex<RateLimiter>,
    chunk_bytes: usize,
    pub(super) counters: Arc<RngCounters>,
    pub(super) reporter: Reporter,
    events: RateLimit,
}

impl Shared {
    pub(super) fn new(entropy: Arc<dyn Entropy>, limits: RateLimits, reporter: Reporter) -> Self {
        // With a low limit one large request must not put off the next ones for minutes.
        let burst = limits
            .bytes
            .map_or(u64::MAX, |rate| rate.burst.unwrap_or(rate.per_second));
        let chunk_bytes = usize::try_from(burst).unwrap_or(usize::MAX);
        Self {
            entropy,
            limiter: Mutex::new(RateLimiter::new(limits, Instant::now())),
            chunk_bytes: chunk_bytes.clamp(1, MAX_CHUNK_BYTES),
            counters: Arc::default(),
            reporter,
            events: RateLimit::new(),
        }
    }
}

/// Why the device takes no requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Halt {
    /// The timer will tell when to go on; the doorbell is ignored meanwhile.
    Timer,
    /// The source failed or the driver broke the rules; the next activation tries anew.
    UntilRestart,
}

/// Serves the queue on a thread of its own.
pub(super) struct RngWorker {
    queue: Virtqueue,
    shared: Arc<Shared>,
    chunk: Vec<u8>,
    timer: TimerFd,
    halt: Option<Halt>,
    /// Requests wait that the last batch did not get to.
    more: bool,
}

impl RngWorker {
    pub(super) fn new(queue: Virtqueue, shared: Arc<Shared>) -> io::Result<Self> {
        Ok(Self {
            queue,
            chunk: vec![0; shared.chunk_bytes],
            shared,
            timer: TimerFd::new()?,
            halt: None,
            more: false,
        })
    }

    pub(super) fn into_queue(self) -> Virtqueue {
        self.queue
    }

    fn serve(&mut self) {
        self.more = false;
        if self.halt.is_some() {
            return;
        }
        match self.take_requests() {
            Ok(more) => self.more = more && self.halt.is_none(),
            Err(error) => {
                self.halt = Some(Halt::UntilRestart);
                self.queue.interrupt().device_error(&error);
            }
        }
    }

    /// Answers up to a batch of requests; true when there may be more.
    fn take_requests(&mut self) -> Result<bool, QueueError> {
        let mut more = true;
        let mut answered = false;
        self.queue.disable_doorbell()?;
        for _ in 0..BATCH {
            let Some(chain) = self.queue.pop()? else {
                more = self.queue.enable_doorbell()?;
                break;
            };
            if !self.answer(&chain)? {
                self.queue.unpop();
                break;
            }
            answered = true;
        }
        if answered {
            self.queue.signal()?;
        }
        Ok(more)
    }

    /// Fills one request. False when it has to wait: then [`Self::halt`] says for what.
    fn answer(&mut self, chain: &Chain) -> Result<bool, QueueError> {
        let counters = &self.shared.counters;
        let room = buffers::total_len(chain.writable());
        if room == 0 {
            counters.refused.add(1);
            self.queue.push(chain, 0)?;
            return Ok(true);
        }
        let delay = self.shared.limiter.lock().delay(Instant::now());
        if let Some(delay) = delay {
            counters.throttled.add(1);
            self.wait(delay);
            return Ok(false);
        }
        let want = usize::try_from(room).unwrap_or(usize::MAX);
        let want = want.min(self.chunk.len());
        let chunk = self.chunk.get_mut(..want).unwrap_or_default();
        let filled = match self.shared.entropy.fill(chunk) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            result => result,
        };
        match filled {
            Ok(count) => {
                let random = self.chunk.get(..count.min(want)).unwrap_or_default();
                let written = buffers::write(self.queue.memory(), chain.writable(), 0, random);
                // `pop` has checked that the buffers are RAM.
                let written = written.unwrap_or(0);
                self.shared.limiter.lock().charge(written as u64);
                counters.requests.add(1);
                counters.bytes.add(written as u64);
                let written = u32::try_from(written).unwrap_or(u32::MAX);
                self.queue.push(chain, written)?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.wait(RETRY);
                Ok(false)
            }
            Err(error) => {
                self.fail(&error);
                Ok(false)
            }
        }
    }

    fn wait(&mut self, delay: Duration) {
        self.halt = match self.timer.reset(delay, None) {
            Ok(()) => Some(Halt::Timer),
            Err(error) => {
                warn_limited!(error:% = error; "entropy timer; the device stops");
                Some(Halt::UntilRestart)
            }
        };
    }

    fn fail(&mut self, error: &io::Error) {
        self.halt = Some(Halt::UntilRestart);
        self.shared.counters.errors.add(1);
        if self.shared.events.admit(Instant::now()).is_none() {
            return;
        }
        let reporter = &self.shared.reporter;
        let device = reporter.device();
        log::error!(device:%, error:%; "source of random bytes failed, the guest gets none");
        reporter.report(DeviceEvent::IoError {
            operation: "entropy",
            offset: 0,
            error: error.to_string(),
        });
    }
}

impl Handler for RngWorker {
    fn start(&mut self, events: &mut EventOps) {
        watch(events, self.queue.doorbell(), DOORBELL);
        watch(events, &self.timer, TIMER);
        self.serve();
    }

    fn ready(&mut self, token: u32, _events: &mut EventOps) {
        match token {
            DOORBELL => {
                let _ = self.queue.doorbell().read();
                self.serve();
            }
            // Set only while it is not running, so that reading it here does not wait.
            TIMER if self.timer.wait().is_ok() => {
                self.halt = None;
                self.serve();
            }
            _ => {}
        }
    }

    fn before_sleep(&mut self) -> bool {
        if self.more {
            self.serve();
        }
        self.more
    }

    fn drain(&mut self) {}
}
