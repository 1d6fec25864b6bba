//! The thread that serves the balloon's queues.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::EventOps;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::timerfd::TimerFd;

use super::PAGE_BYTES;
use super::device::BalloonCounters;
use super::handle::Shared;
use super::pages::{HugePageTracker, Run, runs};
use super::reclaim::RamReclaim;
use super::stats::{BalloonStats, MAX_STATS_BYTES};
use crate::events::{DeviceEvent, Reporter};
use crate::rate_log::RateLimit;
use crate::virtio::buffers;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};
use crate::virtio::worker::{Handler, watch};
use crate::warn_limited;

const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATS: u32 = 2;
const REPORTS: u32 = 3;
const STATS_TIMER: u32 = 4;
const ACTUAL: u32 = 5;
const ACTUAL_TIMER: u32 = 6;

/// Chains per queue before the thread looks at its events again.
const BATCH: usize = 32;
/// Page frames taken from one chain; Linux sends 256. Those beyond are acknowledged and left
/// alone, so that one request cannot keep the thread from being paused.
const MAX_FRAMES: usize = 64 << 10;
/// Shortest time between two events about the balloon's size; Linux reports each mebibyte.
const EVENT_INTERVAL: Duration = Duration::from_millis(200);

/// The queues that a driver has enabled.
pub(super) struct Queues {
    pub(super) inflate: Virtqueue,
    pub(super) deflate: Virtqueue,
    pub(super) stats: Option<Virtqueue>,
    pub(super) reports: Option<Virtqueue>,
    /// Enabled, but of no use with the negotiated features.
    pub(super) idle: Vec<Virtqueue>,
}

/// What a worker is made of besides its queues.
pub(super) struct Parts {
    pub(super) reclaim: Arc<dyn RamReclaim>,
    pub(super) shared: Arc<Shared>,
    pub(super) counters: Arc<BalloonCounters>,
    pub(super) reporter: Reporter,
    pub(super) stats_interval_s: u16,
    /// Gathers pages into huge pages, where there is need and the driver allows it.
    pub(super) tracker: Option<HugePageTracker>,
    /// Reported pages keep the driver's poison value.
    pub(super) poisons: bool,
}

/// Serves the queues on a thread of its own.
pub(super) struct BalloonWorker {
    queues: Queues,
    parts: Parts,
    /// The statistics buffer, kept until new ones are wanted (section 5.5.6.3).
    held: Option<Chain>,
    stats_timer: TimerFd,
    actual_timer: TimerFd,
    /// The timer runs: the next event waits for it.
    actual_waits: bool,
    errors: RateLimit,
    frames: Vec<u32>,
    /// The driver broke the rules; nothing more is taken from the queues.
    broken: bool,
    /// Work is left that the last batch did not get to.
    more: bool,
}

impl BalloonWorker {
    pub(super) fn new(queues: Queues, parts: Parts) -> io::Result<Self> {
        Ok(Self {
            held: None,
            stats_timer: TimerFd::new()?,
            actual_timer: TimerFd::new()?,
            actual_waits: false,
            errors: RateLimit::new(),
            frames: Vec::new(),
            broken: false,
            more: false,
            queues,
            parts,
        })
    }

    /// The queues, and what was gathered. A statistics buffer that was kept is offered again.
    pub(super) fn into_parts(self) -> (Vec<Virtqueue>, Option<HugePageTracker>) {
        let Queues {
            inflate,
            deflate,
            mut stats,
            reports,
            idle,
        } = self.queues;
        if let (Some(_), Some(stats)) = (&self.held, &mut stats) {
            stats.unpop();
        }
        let optional = stats.into_iter().chain(reports).chain(idle);
        let queues = [inflate, deflate].into_iter().chain(optional);
        (queues.collect(), self.parts.tracker)
    }

    fn serve(&mut self) {
        self.more = false;
        if self.broken {
            return;
        }
        match self.serve_queues() {
            Ok(more) => self.more = more,
            Err(error) => {
                self.broken = true;
                self.queues.inflate.interrupt().device_error(&error);
            }
        }
    }

    fn serve_queues(&mut self) -> Result<bool, QueueError> {
        let mut more = self.serve_queue(INFLATE)?;
        more |= self.serve_queue(DEFLATE)?;
        more |= self.serve_queue(REPORTS)?;
        self.take_stats()?;
        Ok(more)
    }

    fn queue(&mut self, token: u32) -> Option<&mut Virtqueue> {
        match token {
            INFLATE => Some(&mut self.queues.inflate),
            DEFLATE => Some(&mut self.queues.deflate),
            STATS => self.queues.stats.as_mut(),
            REPORTS => self.queues.reports.as_mut(),
            _ => None,
        }
    }

    /// Answers up to a batch of requests of one queue; true when there may be more.
    fn serve_queue(&mut self, token: u32) -> Result<bool, QueueError> {
        let mut more = true;
        let mut answered = false;
        let Some(queue) = self.queue(token) else {
            return Ok(false);
        };
        queue.disable_doorbell()?;
        for _ in 0..BATCH {
            let Some(queue) = self.queue(token) else {
                return Ok(false);
            };
            let Some(chain) = queue.pop()? else {
                more = queue.enable_doorbell()?;
                break;
            };
            match token {
                INFLATE => self.inflate(&chain),
                DEFLATE => self.deflate(&chain),
                _ => self.take_report(&chain),
            }
            if let Some(queue) = self.queue(token) {
                queue.push(&chain, 0)?;
            }
            answered = true;
        }
        if let Some(queue) = self.queue(token).filter(|_| answered) {
            queue.signal()?;
        }
        Ok(more)
    }

    /// The runs of RAM that a request's page frame numbers stand for.
    fn take_frames(&mut self, chain: &Chain) -> Vec<Run> {
        let wanted = buffers::total_len(chain.readable()) / 4;
        let count = usize::try_from(wanted)
            .unwrap_or(usize::MAX)
            .min(MAX_FRAMES);
        let mut bytes = vec![0; count * 4];
        let memory = self.queues.inflate.memory();
        // `pop` has checked that the buffers are RAM.
        let read = buffers::read(memory, chain.readable(), 0, &mut bytes).unwrap_or(0);
        let (frames, _) = bytes.get(..read).unwrap_or_default().as_chunks::<4>();
        let frames = frames.iter().map(|frame| u32::from_le_bytes(*frame));
        let is_ram = |frame: &u32| {
            let start = GuestAddress(u64::from(*frame) * PAGE_BYTES);
            memory.check_range(start, 4096)
        };
        self.frames.clear();
        self.frames.extend(frames.filter(is_ram));
        let refused = wanted - self.frames.len() as u64;
        if refused > 0 {
            self.parts.counters.refused_pages.add(refused);
            let device = self.parts.reporter.device();
            warn_limited!(device:% = device, refused = refused; "balloon pages that are not RAM, or too many");
        }
        runs(&mut self.frames)
    }

    fn inflate(&mut self, chain: &Chain) {
        for run in self.take_frames(chain) {
            let counters = &self.parts.counters;
            counters.inflated_pages.add(run.len / PAGE_BYTES);
            match &mut self.parts.tracker {
                None => self.discard(run),
                Some(tracker) => {
                    for page in tracker.inflate(run) {
                        self.discard(page);
                    }
                }
            }
        }
    }

    /// The guest uses the pages again; they come back by themselves when it touches them.
    fn deflate(&mut self, chain: &Chain) {
        for run in self.take_frames(chain) {
            let counters = &self.parts.counters;
            counters.deflated_pages.add(run.len / PAGE_BYTES);
            if let Some(tracker) = &mut self.parts.tracker {
                tracker.deflate(run);
            }
        }
    }

    /// A report describes free pages by its writable buffers (section 5.5.6.7).
    fn take_report(&mut self, chain: &Chain) {
        // Freed pages read as zeroes: that must be what the driver expects of them.
        let may_clear = !self.parts.poisons || self.parts.shared.poison() == 0;
        for segment in chain.writable() {
            let len = u64::from(segment.len);
            self.parts.counters.reported_bytes.add(len);
            if may_clear && len > 0 {
                let start = segment.addr.0;
                self.discard(Run { start, len });
            }
        }
    }

    fn discard(&self, run: Run) {
        let counters = &self.parts.counters;
        match self.parts.reclaim.discard(GuestAddress(run.start), run.len) {
            Ok(bytes) => counters.freed_bytes.add(bytes),
            Err(error) => {
                counters.errors.add(1);
                if self.errors.admit(Instant::now()).is_none() {
                    return;
                }
                let device = self.parts.reporter.device();
                log::error!(device:%, gpa = run.start, bytes = run.len, error:%; "guest memory could not be freed");
                self.parts.reporter.report(DeviceEvent::IoError {
                    operation: "discard",
                    offset: run.start,
                    error: error.to_string(),
                });
            }
        }
    }

    /// Reads statistics and keeps their buffer. A driver has one at most; more would stay in the
    /// queue until this one is returned.
    fn take_stats(&mut self) -> Result<(), QueueError> {
        if self.held.is_some() {
            return Ok(());
        }
        let Some(queue) = &mut self.queues.stats else {
            return Ok(());
        };
        let chain = loop {
            let chain = queue.pop()?;
            let more = queue.enable_doorbell()?;
            match chain {
                Some(chain) => break chain,
                None if more => {}
                None => return Ok(()),
            }
        };
        let mut bytes = [0; MAX_STATS_BYTES];
        // `pop` has checked that the buffers are RAM.
        let read = buffers::read(queue.memory(), chain.readable(), 0, &mut bytes);
        let bytes = bytes.get(..read.unwrap_or(0)).unwrap_or_default();
        if !bytes.is_empty() {
            self.parts.shared.set_stats(BalloonStats::parse(bytes));
        }
        self.held = Some(chain);
        Ok(())
    }

    /// Returns the statistics buffer, which asks the driver for new ones.
    fn ask_for_stats(&mut self) -> Result<(), QueueError> {
        if let (Some(queue), Some(chain)) = (&mut self.queues.stats, self.held.take()) {
            queue.push(&chain, 0)?;
            queue.signal()?;
        }
        // What the driver has put there meanwhile.
        self.take_stats()
    }

    /// Reports a new size, at most once per interval; the last one is never left out.
    fn report_actual(&mut self) {
        if self.actual_waits {
            return;
        }
        let Some(bytes) = self.parts.shared.take_new_actual_bytes() else {
            return;
        };
        let event = DeviceEvent::BalloonActual { bytes };
        self.parts.reporter.report(event);
        match self.actual_timer.reset(EVENT_INTERVAL, None) {
            Ok(()) => self.actual_waits = true,
            Err(error) => warn_limited!(error:% = error; "balloon event timer"),
        }
    }
}

impl Handler for BalloonWorker {
    fn start(&mut self, events: &mut EventOps) {
        watch(events, self.queues.inflate.doorbell(), INFLATE);
        watch(events, self.queues.deflate.doorbell(), DEFLATE);
        watch(events, self.parts.shared.actual_event(), ACTUAL);
        watch(events, &self.actual_timer, ACTUAL_TIMER);
        if let Some(queue) = &self.queues.reports {
            watch(events, queue.doorbell(), REPORTS);
        }
        let interval = Duration::from_secs(self.parts.stats_interval_s.into());
        if let (Some(queue), false) = (&self.queues.stats, interval.is_zero()) {
            watch(events, queue.doorbell(), STATS);
            watch(events, &self.stats_timer, STATS_TIMER);
            if let Err(error) = self.stats_timer.reset(interval, Some(interval)) {
                warn_limited!(error:% = error; "balloon statistics timer, there will be none");
            }
        }
        self.serve();
        self.report_actual();
    }

    fn ready(&mut self, token: u32, _events: &mut EventOps) {
        match token {
            ACTUAL => {
                let _ = self.parts.shared.actual_event().read();
                self.report_actual();
            }
            // Timers are set only while they are not running: reading them here does not wait.
            ACTUAL_TIMER if self.actual_timer.wait().is_ok() => {
                self.actual_waits = false;
                self.report_actual();
            }
            STATS_TIMER if self.stats_timer.wait().is_ok() && !self.broken => {
                if let Err(error) = self.ask_for_stats() {
                    self.broken = true;
                    self.queues.inflate.interrupt().device_error(&error);
                }
            }
            doorbell => {
                if let Some(queue) = self.queue(doorbell) {
                    let _ = queue.doorbell().read();
                }
                self.serve();
            }
        }
    }

    fn before_sleep(&mut self) -> bool {
        if self.more {
            self.serve();
        }
        self.more
    }

    fn drain(&mut self) {
        self.actual_waits = false;
        self.report_actual();
    }
}
