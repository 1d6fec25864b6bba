//! The thread that serves one request queue.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vmm_sys_util::timerfd::TimerFd;

use super::backend::{BlockIo, BlockOp, BlockRequest, Completion};
use super::request::{self, Extent, Parsed, Refusal};
use super::shared::Shared;
use crate::virtio::buffers;
use crate::virtio::queue::{Chain, QueueError, Segments, Virtqueue};
use crate::virtio::worker::{Handler, watch};
use crate::warn_limited;

const DOORBELL: u32 = 0;
const COMPLETION: u32 = 1;
const RATE_TIMER: u32 = 2;

/// Requests begun before the backend starts on them: enough to share a system call, few enough
/// that the first does not wait long.
const BATCH: u16 = 32;

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
    /// There are requests in the queue that no doorbell will ring for.
    more: bool,
    /// The doorbell is on: nothing is in the queue that it did not or will not ring for.
    armed: bool,
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
            more: false,
            armed: true,
            done: Vec::new(),
        })
    }

    pub(super) fn into_queue(self) -> Virtqueue {
        self.queue
    }

    /// Takes requests until there are none, the rate limit is reached or the driver errs; at
    /// most a queueful, so that a busy driver cannot keep the thread from its other events.
    fn serve(&mut self) {
        self.more = false;
        let mut left = self.queue.size();
        while !self.throttled && !self.broken {
            if left == 0 {
                self.more = true;
                break;
            }
            let batch = left.min(BATCH);
            left -= batch;
            let taken = self.take_batch(batch);
            self.io.flush_submissions();
            // What the page cache can serve has finished already.
            self.reap();
            match taken {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => self.fail(&error),
            }
        }
    }

    /// Begins up to `limit` requests. False when the queue is empty. Its doorbell is off.
    fn take_batch(&mut self, limit: u16) -> Result<bool, QueueError> {
        let mut answered = false;
        let mut taken = 0;
        if std::mem::take(&mut self.armed) {
            self.queue.disable_doorbell()?;
        }
        let more = loop {
            if taken == limit || self.must_wait() {
                break true;
            }
            let Some(chain) = self.queue.pop()? else {
                break false;
            };
            answered |= self.begin(chain)?;
            taken += 1;
        };
        if answered {
            self.queue.signal()?;
        }
        Ok(more)
    }

    /// Turns the doorbell on. True when something came before that: it must be served now.
    fn arm(&mut self) -> bool {
        if self.armed || self.throttled || self.broken {
            return false;
        }
        match self.queue.enable_doorbell() {
            Ok(missed) => {
                self.armed = true;
                self.more |= missed;
                missed
            }
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    fn fail(&mut self, error: &QueueError) {
        self.broken = true;
        self.queue.interrupt().device_error(error);
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
        match request::parse(self.queue.memory(), &chain, &self.shared.info) {
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
                let memory = self.queue.memory();
                let written = buffers::write(memory, chain.writable(), 0, id).unwrap_or(0);
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
            self.fail(&error);
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
        let op = pending.extent.op;
        let (status, written) = match (pending.failed, op) {
            (true, _) => (VIRTIO_BLK_S_IOERR, 0),
            (false, BlockOp::Read) => (VIRTIO_BLK_S_OK, pending.bytes),
            (false, _) => (VIRTIO_BLK_S_OK, 0),
        };
        if !pending.failed {
            self.shared.count(op, pending.bytes);
        }
        if let Err(error) = self.answer(&pending.chain, status, written) {
            self.fail(&error);
        }
        true
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
    const POLLS: bool = true;

    fn start(&mut self, events: &mut EventOps) {
        // Edge-triggered: each ring wakes the thread once, without a read to reset the counter.
        let doorbell = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let doorbell = Events::with_data(self.queue.doorbell(), DOORBELL, doorbell);
        if let Err(error) = events.add(doorbell) {
            log::error!(error:? = error; "disk doorbell could not be watched");
        }
        for event in self.io.events() {
            watch(events, &event, COMPLETION);
        }
        watch(events, &self.timer, RATE_TIMER);
        self.serve();
    }

    fn ready(&mut self, token: u32, _events: &mut EventOps) {
        match token {
            DOORBELL => self.serve(),
            COMPLETION => self.reap(),
            RATE_TIMER if self.timer.wait().is_ok() => {
                self.throttled = false;
                self.serve();
            }
            _ => {}
        }
    }

    fn poll(&mut self) -> bool {
        let in_flight = self.in_flight;
        if in_flight > 0 {
            self.reap();
        }
        let may_serve = !self.throttled && !self.broken;
        let came = may_serve && self.queue.has_available();
        if came {
            self.serve();
        }
        came || self.in_flight != in_flight
    }

    fn before_sleep(&mut self) -> bool {
        // A completion may have interrupted the last sleep instead of making a descriptor ready.
        if self.in_flight > 0 {
            self.reap();
        }
        if self.more || self.arm() {
            self.serve();
        }
        self.more || self.arm()
    }

    fn drain(&mut self) {
        while self.in_flight > 0 {
            self.io.wait();
            self.reap();
        }
    }
}

#[cfg(test)]
mod tests;
