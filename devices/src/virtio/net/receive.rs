//! From the host to the guest.
//!
//! Buffers are *staged*: taken from the queue, and filled when packets come. How large the next
//! packet is cannot be known before it is there. While packets are small, each is received into
//! an area of our own and copied, which costs less than a system call with several buffers; while
//! they are large, enough buffers are staged for the largest, and nothing is copied.

use std::collections::VecDeque;
use std::io;

use vm_memory::{Bytes, GuestAddress};

use super::backend::{HEADER_BYTES, MAX_PACKET_BYTES, NetQueue};
use super::shared::Shared;
use super::throttle::Throttle;
use super::transmit::Tally;
use super::used::UsedRing;
use crate::virtio::buffers;
use crate::virtio::queue::{Chain, QueueError, Segment, Virtqueue};

/// Packets received before the other direction has its turn.
const BURST: u32 = 256;
/// Packets after which the driver sees them.
const SIGNAL_EVERY: u32 = 16;
/// A packet of an ordinary network: 1500 bytes with Ethernet header and VLAN tag.
const SMALL_BYTES: u64 = HEADER_BYTES + 14 + 4 + 1500;
/// Small packets in a row after which no large one is expected any more.
const LARGE_MEMORY: u32 = 64;
/// Most pieces that one packet is received into; the rest goes through the overflow area.
const MAX_SEGMENTS: usize = 256;

/// Offsets in `struct virtio_net_hdr_v1`.
const HEADER_FLAGS: u64 = 0;
const HEADER_NUM_BUFFERS: u64 = 10;

/// A chain taken from the queue and not yet filled.
struct Staged {
    head: u16,
    segments: usize,
    bytes: u64,
}

/// A packet that has been received and not yet delivered.
struct Held {
    /// Header included.
    len: u64,
    /// Bytes that are in the staged buffers already; the rest is in the overflow area.
    in_place: u64,
}

/// The receive side of a queue pair.
pub(super) struct Receiver {
    queue: Virtqueue,
    used: UsedRing,
    throttle: Option<Throttle>,
    /// A packet may take several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    merge: bool,
    staged: VecDeque<Staged>,
    /// The buffers of all staged chains, in order.
    segments: Vec<Segment>,
    /// Bytes in them.
    capacity: u64,
    overflow: Vec<u8>,
    held: Option<Held>,
    /// How many more packets are expected to be large.
    large: u32,
    /// A packet may wait in the host end.
    readable: bool,
    /// Waiting for the driver to offer buffers.
    starved: bool,
    /// The driver rings when it offers buffers.
    doorbell_enabled: bool,
}

impl Receiver {
    pub(super) fn new(queue: Virtqueue, merge: bool, throttle: Option<Throttle>) -> Self {
        let overflow = usize::try_from(MAX_PACKET_BYTES).unwrap_or(usize::MAX);
        Self {
            used: UsedRing::new(&queue),
            queue,
            throttle,
            merge,
            staged: VecDeque::new(),
            segments: Vec::new(),
            capacity: 0,
            overflow: vec![0; overflow],
            held: None,
            large: 0,
            readable: true,
            starved: false,
            // Whatever a former device has left in the ring.
            doorbell_enabled: true,
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
        self.starved = false;
    }

    /// The host end has a packet.
    pub(super) fn readable(&mut self) {
        self.readable = true;
    }

    /// Whether packets are of no use at present, so that the host end need not be watched.
    pub(super) fn is_waiting(&self) -> bool {
        self.starved || self.throttle.as_ref().is_some_and(Throttle::is_waiting)
    }

    /// Receives what waits. True when there may be more.
    pub(super) fn serve(
        &mut self,
        io: &mut dyn NetQueue,
        shared: &Shared,
    ) -> Result<bool, QueueError> {
        let work = self.readable || self.held.is_some();
        if !work || self.is_waiting() {
            return Ok(false);
        }
        if std::mem::take(&mut self.doorbell_enabled) {
            self.queue.disable_doorbell()?;
        }
        let mut tally = Tally::default();
        let result = self.burst(io, shared, &mut tally);
        tally.count(&shared.counters.receive);
        // What was delivered is the driver's now, also when it erred afterwards.
        self.used.signal()?;
        result
    }

    fn burst(
        &mut self,
        io: &mut dyn NetQueue,
        shared: &Shared,
        tally: &mut Tally,
    ) -> Result<bool, QueueError> {
        for count in 1..=BURST {
            if self.held.is_none() {
                let throttled = &shared.counters.receive.throttled;
                let waits = self.throttle.as_mut();
                if waits.is_some_and(|throttle| throttle.must_wait(throttled))
                    || !self.stage_for_next(shared)?
                {
                    return Ok(false);
                }
                if !self.take(io, shared) {
                    return Ok(false);
                }
            }
            if !self.deliver(shared, tally)? {
                return Ok(false);
            }
            if count % SIGNAL_EVERY == 0 {
                self.used.signal()?;
            }
        }
        Ok(true)
    }

    /// Stages buffers for a packet of the size that is expected. False when there is none.
    fn stage_for_next(&mut self, shared: &Shared) -> Result<bool, QueueError> {
        if self.staged.is_empty() && !self.stage_or_starve(1, shared)? {
            return Ok(false);
        }
        if self.large > 0 && self.merge {
            self.stage(MAX_PACKET_BYTES)?;
        }
        Ok(true)
    }

    /// Stages chains until they hold `bytes`; fewer when the driver has not offered so many.
    fn stage(&mut self, bytes: u64) -> Result<bool, QueueError> {
        while self.capacity < bytes {
            let Some(chain) = self.queue.pop()? else {
                return Ok(false);
            };
            self.push(&chain)?;
        }
        Ok(true)
    }

    /// The same, but asks for the doorbell when there are too few. True as well when the whole
    /// ring is staged and there will never be more.
    fn stage_or_starve(&mut self, bytes: u64, shared: &Shared) -> Result<bool, QueueError> {
        while !self.stage(bytes)? && self.staged.len() < usize::from(self.queue.size()) {
            if !self.queue.enable_doorbell()? {
                self.doorbell_enabled = true;
                self.starved = true;
                shared.counters.starved.add(1);
                return Ok(false);
            }
            // Something came between the last look and the wish for the doorbell.
            self.queue.disable_doorbell()?;
        }
        Ok(true)
    }

    fn push(&mut self, chain: &Chain) -> Result<(), QueueError> {
        let segments = chain.writable();
        let bytes = buffers::total_len(segments);
        // Section 5.1.6.3.1. The header must be in the first buffer, and a packet in a bounded
        // number of them.
        if bytes < HEADER_BYTES {
            return Err(QueueError::Malformed {
                queue: self.queue.index(),
                head: chain.head(),
                what: "is a receive buffer too small for the header",
            });
        }
        self.segments.extend_from_slice(segments);
        self.staged.push_back(Staged {
            head: chain.head(),
            segments: segments.len(),
            bytes,
        });
        self.capacity += bytes;
        Ok(())
    }

    /// Receives one packet into the staged buffers and the overflow area. False when there is
    /// none.
    fn take(&mut self, io: &mut dyn NetQueue, shared: &Shared) -> bool {
        let mut in_place = 0;
        let mut count = 0;
        if self.large > 0 {
            for segment in self.segments.iter().take(MAX_SEGMENTS) {
                if in_place >= MAX_PACKET_BYTES {
                    break;
                }
                in_place += u64::from(segment.len);
                count += 1;
            }
        }
        let memory = self.queue.memory();
        let segments = self.segments.get(..count).unwrap_or_default();
        let overflow = if in_place < MAX_PACKET_BYTES {
            self.overflow.as_mut_slice()
        } else {
            &mut []
        };
        let result = loop {
            match io.receive(memory, segments, overflow) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        let error = match result {
            Ok(len) if len as u64 > HEADER_BYTES => {
                let len = len as u64;
                self.held = Some(Held { len, in_place });
                self.large = if len > SMALL_BYTES {
                    LARGE_MEMORY
                } else {
                    self.large.saturating_sub(1)
                };
                return true;
            }
            Ok(_) => io::Error::from(io::ErrorKind::UnexpectedEof),
            Err(error) => error,
        };
        // Also after an error: the next packet wakes the thread again, and an error that stays
        // must not keep it busy.
        self.readable = false;
        if error.kind() != io::ErrorKind::WouldBlock {
            shared.counters.receive.errors.add(1);
            shared.report("receive", &error, io.is_gone(&error));
        }
        false
    }

    /// Gives the held packet to the driver. False when it waits for more buffers.
    fn deliver(&mut self, shared: &Shared, tally: &mut Tally) -> Result<bool, QueueError> {
        let Some(Held { len, in_place }) = self.held else {
            return Ok(true);
        };
        if self.merge && self.capacity < len && !self.stage_or_starve(len, shared)? {
            return Ok(false);
        }
        self.held = None;
        if self.first_fit() < len {
            shared.counters.receive.dropped.add(1);
            return Ok(true);
        }
        self.write(len, in_place, shared)
            .map_err(|source| QueueError::Ring {
                queue: self.queue.index(),
                source: virtio_queue::Error::GuestMemory(source),
            })?;
        self.finish(len)?;
        let bytes = len - HEADER_BYTES;
        if let Some(throttle) = &self.throttle {
            throttle.charge(bytes);
        }
        tally.packets += 1;
        tally.bytes += bytes;
        Ok(true)
    }

    /// Bytes of the largest packet that can be delivered now.
    fn first_fit(&self) -> u64 {
        if self.merge {
            self.capacity
        } else {
            self.staged.front().map_or(0, |chain| chain.bytes)
        }
    }

    /// Completes the packet in the staged buffers: what overflowed, and the header fields that
    /// are the device's to write.
    fn write(
        &mut self,
        len: u64,
        in_place: u64,
        shared: &Shared,
    ) -> Result<(), vm_memory::GuestMemoryError> {
        let mut covered = 0;
        let chains = self.staged.iter().take_while(|chain| {
            let begins = covered < len;
            covered += chain.bytes;
            begins
        });
        let count = u16::try_from(chains.count()).unwrap_or(u16::MAX);
        if in_place == 0 {
            self.complete_overflow(count, shared);
        }
        let memory = self.queue.memory();
        let beyond = usize::try_from(len.saturating_sub(in_place)).unwrap_or(usize::MAX);
        if let Some(beyond) = self
            .overflow
            .get(..beyond)
            .filter(|bytes| !bytes.is_empty())
        {
            buffers::write(memory, &self.segments, in_place, beyond)?;
        }
        if in_place == 0 {
            return Ok(());
        }
        self.write_header(HEADER_NUM_BUFFERS, &count.to_le_bytes())?;
        if !shared.guest_completes_checksums() {
            self.write_header(HEADER_FLAGS, &[0])?;
        }
        Ok(())
    }

    /// The same for a packet whose header is in the overflow area.
    fn complete_overflow(&mut self, count: u16, shared: &Shared) {
        let header: Option<&mut [u8; 12]> = self.overflow.first_chunk_mut();
        if let Some([flags, .., low, high]) = header {
            [*low, *high] = count.to_le_bytes();
            if !shared.guest_completes_checksums() {
                *flags = 0;
            }
        }
    }

    fn write_header(&self, at: u64, bytes: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
        let memory = self.queue.memory();
        match self.segments.first() {
            Some(first) if u64::from(first.len) >= HEADER_BYTES => {
                memory.write_slice(bytes, GuestAddress(first.addr.0 + at))
            }
            _ => buffers::write(memory, &self.segments, at, bytes).map(drop),
        }
    }

    /// Returns the chains that hold the first `len` bytes.
    fn finish(&mut self, len: u64) -> Result<(), QueueError> {
        let mut left = len;
        let mut segments = 0;
        while left > 0 {
            let Some(chain) = self.staged.pop_front() else {
                break;
            };
            let written = chain.bytes.min(left);
            // A packet is far below 4 GiB.
            self.used
                .add(chain.head, u32::try_from(written).unwrap_or(u32::MAX))?;
            left -= written;
            segments += chain.segments;
            self.capacity -= chain.bytes;
        }
        self.segments.drain(..segments);
        Ok(())
    }

    /// Returns the queue; staged buffers are as if never taken. A packet that waits for buffers
    /// is lost, as it could be anywhere on its way.
    pub(super) fn into_queue(mut self, shared: &Shared) -> Virtqueue {
        if self.held.take().is_some() {
            shared.counters.receive.dropped.add(1);
        }
        self.used.give_back(&mut self.queue);
        for _ in &self.staged {
            self.queue.unpop();
        }
        self.queue
    }
}
