//! From the guest to the host.

use std::io;

use super::backend::{HEADER_BYTES, MAX_PACKET_BYTES, NetQueue};
use super::counters::DirectionCounters;
use super::shared::Shared;
use super::throttle::Throttle;
use super::used::UsedRing;
use crate::virtio::buffers;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};
use crate::warn_limited;

/// Packets sent before the other direction has its turn.
const BURST: u32 = 256;
/// Packets after which the driver sees that its buffers are free.
const SIGNAL_EVERY: u32 = 32;

/// What became of a packet.
enum Sent {
    /// Its buffers go back to the driver.
    Done,
    /// The host end is full.
    Blocked,
}

/// The transmit side of a queue pair.
pub(super) struct Transmitter {
    queue: Virtqueue,
    used: UsedRing,
    throttle: Option<Throttle>,
    /// The driver may have made something available.
    kicked: bool,
    /// The host end was full; it tells when that is over.
    blocked: bool,
}

impl Transmitter {
    pub(super) fn new(queue: Virtqueue, throttle: Option<Throttle>) -> Self {
        Self {
            used: UsedRing::new(&queue),
            queue,
            throttle,
            kicked: true,
            blocked: false,
        }
    }

    pub(super) fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    pub(super) fn throttle(&mut self) -> Option<&mut Throttle> {
        self.throttle.as_mut()
    }

    /// The driver has rung the doorbell.
    pub(super) fn doorbell(&mut self) {
        self.kicked = true;
    }

    /// The host end has room again.
    pub(super) fn writable(&mut self) {
        self.blocked = false;
    }

    /// Sends what the driver offers. True when there may be more.
    pub(super) fn serve(
        &mut self,
        io: &mut dyn NetQueue,
        shared: &Shared,
    ) -> Result<bool, QueueError> {
        let waiting = self.throttle.as_ref().is_some_and(Throttle::is_waiting);
        if !self.kicked || self.blocked || waiting {
            return Ok(false);
        }
        let mut tally = Tally::default();
        let result = self.burst(io, shared, &mut tally);
        tally.count(&shared.counters.transmit);
        // What was sent is the host's now, also when the driver erred afterwards.
        self.used.signal()?;
        result
    }

    fn burst(
        &mut self,
        io: &mut dyn NetQueue,
        shared: &Shared,
        tally: &mut Tally,
    ) -> Result<bool, QueueError> {
        self.queue.disable_doorbell()?;
        for count in 1..=BURST {
            if self.must_wait(shared) {
                return Ok(false);
            }
            let Some(chain) = self.queue.pop()? else {
                // Sleep only when the driver will ring for what comes next.
                self.kicked = self.queue.enable_doorbell()?;
                return Ok(self.kicked);
            };
            match self.send(io, shared, &chain, tally) {
                Sent::Done => self.used.add(chain.head(), 0)?,
                Sent::Blocked => {
                    self.queue.unpop();
                    self.blocked = true;
                    shared.counters.blocked.add(1);
                    return Ok(false);
                }
            }
            if count % SIGNAL_EVERY == 0 {
                self.used.signal()?;
            }
        }
        Ok(true)
    }

    /// Asks the rate limit, but only for a packet that is there.
    fn must_wait(&mut self, shared: &Shared) -> bool {
        match &mut self.throttle {
            Some(throttle) if self.queue.has_available() => {
                throttle.must_wait(&shared.counters.transmit.throttled)
            }
            _ => false,
        }
    }

    fn send(
        &mut self,
        io: &mut dyn NetQueue,
        shared: &Shared,
        chain: &Chain,
        tally: &mut Tally,
    ) -> Sent {
        let segments = chain.readable();
        let len = buffers::total_len(segments);
        let sane = len > HEADER_BYTES && len <= MAX_PACKET_BYTES;
        if !sane {
            shared.counters.transmit.dropped.add(1);
            let device = shared.reporter.device();
            warn_limited!(device:% = device, bytes = len; "malformed packet from the guest");
            return Sent::Done;
        }
        let result = loop {
            match io.send(self.queue.memory(), segments) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        match result {
            Ok(()) => {
                let bytes = len - HEADER_BYTES;
                tally.packets += 1;
                tally.bytes += bytes;
                if let Some(throttle) = &self.throttle {
                    throttle.charge(bytes);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::Blocked,
            // The header promises what the packet does not hold.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                shared.counters.transmit.dropped.add(1);
            }
            Err(error) => {
                shared.counters.transmit.errors.add(1);
                shared.report("send", &error, io.is_gone(&error));
            }
        }
        Sent::Done
    }

    /// Returns the queue. Nothing is in flight: the host takes a packet at once or not at all.
    pub(super) fn into_queue(mut self) -> Virtqueue {
        self.used.give_back(&mut self.queue);
        self.queue
    }
}

/// Counters of a burst, so that threads do not contend for the shared ones at each packet.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) packets: u64,
    pub(super) bytes: u64,
}

impl Tally {
    pub(super) fn count(&self, counters: &DirectionCounters) {
        counters.packets.add(self.packets);
        counters.bytes.add(self.bytes);
    }
}
