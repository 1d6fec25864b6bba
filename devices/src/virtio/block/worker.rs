//! The thread that serves one request queue.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use event_manager::EventOps;
use parking_lot::Mutex;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vmm_sys_util::timerfd::TimerFd;

use super::backend::{BlockInfo, BlockIo, BlockOp, BlockRequest, Completion};
use super::device::BlockCounters;
use super::request::{self, Extent, Parsed, Refusal};
use crate::events::{DeviceEvent, Reporter};
use crate::rate::RateLimiter;
use crate::rate_log::RateLimit;
use crate::virtio::buffers;
use crate::virtio::queue::{Chain, QueueError, Segments, Virtqueue};
use crate::virtio::worker::{Handler, watch};
use crate::warn_limited;

const DOORBELL: u32 = 0;
const COMPLETION: u32 = 1;
const RATE_TIMER: u32 = 2;

/// What all queues of a device share.
pub(super) struct Shared {
    pub(super) serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    pub(super) info: BlockInfo,
    pub(super) limiter: Option<Mutex<RateLimiter>>,
    pub(super) counters: Arc<BlockCounters>,
    pub(super) reporter: Reporter,
    pub(super) writeback: AtomicBool,
}

impl Shared {
    fn report(&self, extent: &Extent, error: &io::Error) {
        static EVENTS: RateLimit = RateLimit::new();
        self.counters.errors.add(1);
        if EVENTS.admit(Instant::now()).is_none() {
            return;
        }
        let operation = extent.op.name();
        let device = self.reporter.device();
        log::error!(device:%, operation, offset = extent.offset, bytes = extent.len, error:%; "host I/O error, passed on to the guest");
        self.reporter.report(DeviceEvent::IoError {
            operation,
            offset: extent.offset,
            error: error.to_string(),
        });
    }
}

/// A request that the backend works on.
struct Pending {
    chain: Chain,
    /// For messages and counters: the first extent and the bytes of all.
    extent: Extent,
    bytes: u64,
    /// Operations still running.
    remaining: usize,
    failed: bool,
    /// A flush must follow before a write is answered (write-through).
    flush_after: bool,
}

/// Serves one queue on a thread of its own.
pub(super) struct BlockWorker {
    queue: Virtqueue,
    io: Box<dyn BlockIo>,
    shared: Arc<Shared>,
    /// By head descriptor.
    pending: Vec<Option<Pending>>,
    in_flight: usize,
    timer: TimerFd,
    /// Waiting for the rate limit; the doorbell is ignored meanwhile.
    throttled: bool,
    /// The driver broke the rules; nothing more is taken from the queue.
    broken: bool,
    done: Vec<Completion>,
}

impl BlockWorker {
    pub(super) fn new(
        queue: Virtqueue,
        io: Box<dyn BlockIo>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let pending = (0..queue.size()).map(|_| None).collect();
        Ok(Self {
            queue,
            io,
            shared,
            pending,
            in_flight: 0,
            timer: TimerFd::new()?,
            throttled: false,
            broken: false,
            done: Vec::new(),
        })
    }

    pub(super) fn into_queue(self) -> Virtqueue {
        self.queue
    }

    /// Takes requests until there are none, the rate limit is reached or the driver errs.
    fn serve(&mut self) {
        if self.throttled || self.broken {
            return;
        }
        if let Err(error) = self.take_requests() {
            self.broken = true;
            self.queue.interrupt().device_error(&error);
        }
        self.io.flush_submissions();
        // Reads from the page cache complete while they are submitted.
        self.reap();
    }

    fn take_requests(&mut self) -> Result<(), QueueError> {
        let mut answered = false;
        loop {
            self.queue.disable_doorbell()?;
            while !self.must_wait() {
                let Some(chain) = self.queue.pop()? else {
                    break;
                };
                answered |= self.begin(chain)?;
            }
            if self.throttled || !self.queue.enable_doorbell()? {
                break;
            }
        }
        if answered {
            self.queue.signal()?;
        }
        Ok(())
    }

    /// Asks the rate limit; when it says no, sets the timer.
    fn must_wait(&mut self) -> bool {
        let Some(limiter) = &self.shared.limiter else {
            return false;
        };
        // An idle queue must not count as throttled.
        if !self.queue.has_available() {
            return false;
        }
        let Some(delay) = limiter.lock().delay(Instant::now()) else {
            return false;
        };
        self.throttled = true;
        self.shared.counters.throttled.add(1);
        if let Err(error) = self.timer.reset(delay, None) {
            warn_limited!(error:% = error; "rate limit timer, the limit is not applied");
            self.throttled = false;
        }
        self.throttled
    }

    /// Starts one request, or answers it at once: then true.
    fn begin(&mut self, chain: Chain) -> Result<bool, QueueError> {
        let head = chain.head();
        let malformed = |what| QueueError::Malformed {
            queue: self.queue.index(),
            head,
            what,
        };
        let slot = self.pending.get(usize::from(head));
        if slot.is_none_or(Option::is_some) {
            return Err(malformed("is in flight already"));
        }
        let memory = Arc::clone(self.queue.memory());
        match request::parse(&memory, &chain, &self.shared.info) {
            Ok(Parsed::Transfer { extent, segments }) => {
                self.start(chain, &[extent], segments);
                Ok(false)
            }
            Ok(Parsed::Ranges(extents)) => {
                self.start(chain, &extents, Segments::new());
                Ok(false)
            }
            Ok(Parsed::GetId) => {
                let room = request::data_len(&chain).unwrap_or(0);
                let id = self
                    .shared
                    .serial
                    .get(..room.min(20) as usize)
                    .unwrap_or_default();
                // `pop` has checked that the buffers are RAM.
                let written = buffers::write(&memory, chain.writable(), 0, id).unwrap_or(0);
                self.answer(&chain, VIRTIO_BLK_S_OK, written as u64)?;
                Ok(true)
            }
            Err(Refusal::NoStatus) => Err(malformed("has no room for the status byte")),
            Err(refusal) => {
                self.shared.counters.refused.add(1);
                let device = self.shared.reporter.device();
                warn_limited!(device:% = device, reason:% = refusal; "invalid block request");
                let status = if refusal.is_unsupported() {
                    VIRTIO_BLK_S_UNSUPP
                } else {
                    VIRTIO_BLK_S_IOERR
                };
                self.answer(&chain, status, 0)?;
                Ok(true)
            }
        }
    }

    /// Hands the operations of one request to the backend.
    fn start(&mut self, chain: Chain, extents: &[Extent], segments: Segments) {
        let Some(&first) = extents.first() else {
            return;
        };
        let token = chain.head();
        let bytes = extents.iter().map(|extent| extent.len).sum();
        if let Some(limiter) = &self.shared.limiter {
            limiter.lock().charge(bytes);
        }
        let writes = !matches!(first.op, BlockOp::Read | BlockOp::Flush);
        let pending = Pending {
            chain,
            extent: first,
            bytes,
            remaining: extents.len(),
            failed: false,
            flush_after: writes && !self.shared.writeback.load(Ordering::Relaxed),
        };
        if let Some(slot) = self.pending.get_mut(usize::from(token)) {
            *slot = Some(pending);
        }
        let mut segments = Some(segments);
        for extent in extents {
            self.submit(token, extent, segments.take().unwrap_or_default());
        }
    }

    fn submit(&mut self, token: u16, extent: &Extent, segments: Segments) {
        self.in_flight += 1;
        self.io.submit(BlockRequest {
            token,
            op: extent.op,
            offset: extent.offset,
            len: extent.len,
            segments,
        });
    }

    /// Answers everything that has finished.
    fn reap(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.io.completions(&mut done);
        let mut answered = false;
        for completion in done.drain(..) {
            answered |= self.finish(completion);
        }
        self.done = done;
        let signalled = if answered {
            self.queue.signal()
        } else {
            Ok(())
        };
        if let Err(error) = signalled {
            self.broken = true;
            self.queue.interrupt().device_error(&error);
        }
    }

    /// Counts one finished operation; true when its request was answered.
    fn finish(&mut self, completion: Completion) -> bool {
        self.in_flight -= 1;
        let token = completion.token;
        let slot = self.pending.get_mut(usize::from(token));
        let Some(pending) = slot.and_then(Option::as_mut) else {
            return false;
        };
        if let Err(error) = completion.result {
            pending.failed = true;
            self.shared.report(&pending.extent, &error);
        }
        pending.remaining -= 1;
        if pending.remaining > 0 {
            return false;
        }
        if std::mem::take(&mut pending.flush_after) && !pending.failed {
            pending.remaining = 1;
            let flush = Extent {
                op: BlockOp::Flush,
                offset: 0,
                len: 0,
            };
            self.submit(token, &flush, Segments::new());
            self.io.flush_submissions();
            return false;
        }
        let Some(pending) = self
            .pending
            .get_mut(usize::from(token))
            .and_then(Option::take)
        else {
            return false;
        };
        self.count(&pending);
        let read = pending.extent.op == BlockOp::Read && !pending.failed;
        let written = if read { pending.bytes } else { 0 };
        let status = if pending.failed {
            VIRTIO_BLK_S_IOERR
        } else {
            VIRTIO_BLK_S_OK
        };
        if let Err(error) = self.answer(&pending.chain, status, written) {
            self.broken = true;
            self.queue.interrupt().device_error(&error);
        }
        true
    }

    fn count(&self, pending: &Pending) {
        if pending.failed {
            return;
        }
        let counters = &self.shared.counters;
        match pending.extent.op {
            BlockOp::Read => {
                counters.reads.add(1);
                counters.read_bytes.add(pending.bytes);
            }
            BlockOp::Write => {
                counters.writes.add(1);
                counters.written_bytes.add(pending.bytes);
            }
            BlockOp::Flush => counters.flushes.add(1),
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => counters.discards.add(1),
        }
    }

    /// Writes the status byte and returns the chain with `data` bytes filled before it.
    fn answer(&mut self, chain: &Chain, status: u32, data: u64) -> Result<(), QueueError> {
        let status = (status & 0xff) as u8;
        if let Err(error) = request::write_status(self.queue.memory(), chain, status) {
            warn_limited!(error:% = error; "block status could not be written");
        }
        let written = u32::try_from(data + 1).unwrap_or(u32::MAX);
        self.queue.push(chain, written)
    }
}

impl Handler for BlockWorker {
    fn start(&mut self, events: &mut EventOps) {
        watch(events, self.queue.doorbell(), DOORBELL);
        watch(events, self.io.event(), COMPLETION);
        watch(events, &self.timer, RATE_TIMER);
        self.serve();
    }

    fn ready(&mut self, token: u32, _events: &mut EventOps) {
        match token {
            DOORBELL => {
                let _ = self.queue.doorbell().read();
                self.serve();
            }
            COMPLETION => {
                let _ = self.io.event().read();
                self.reap();
            }
            RATE_TIMER if self.timer.wait().is_ok() => {
                self.throttled = false;
                self.serve();
            }
            _ => {}
        }
    }

    fn before_sleep(&mut self) -> bool {
        false
    }

    fn drain(&mut self) {
        while self.in_flight > 0 {
            self.io.wait();
            self.reap();
        }
    }
}
