//! A split virtqueue (virtio 1.2 section 2.7) as a device works on it.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use smallvec::SmallVec;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::QueueInterrupt;
use crate::GuestRam;

/// Longest chain that is accepted, indirect or not: what readv(2) takes at once, and four times
/// what any device here announces. Without a limit, an indirect table lets a driver make the host
/// hold 65,535 segments for each of its requests.
const MAX_DESCRIPTORS: u32 = 1024;

/// A piece of a descriptor chain's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address; the whole segment lies in RAM.
    pub addr: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// Segments of a chain; most requests have few.
pub type Segments = SmallVec<[Segment; 8]>;

/// What is wrong with a queue. Always the guest's doing.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Ring or descriptor table could not be read or written.
    #[error("queue {queue}: ring access failed")]
    Ring {
        /// Queue index.
        queue: u16,
        /// Where it failed.
        #[source]
        source: virtio_queue::Error,
    },
    /// A chain violates the specification.
    #[error("queue {queue}: chain at descriptor {head} {what}")]
    Malformed {
        /// Queue index.
        queue: u16,
        /// First descriptor of the chain.
        head: u16,
        /// What it does.
        what: &'static str,
    },
}

/// One request: buffers to read from, then buffers to write to.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    segments: Segments,
    readable: usize,
}

impl Chain {
    /// Index of the chain's first descriptor, by which it is returned.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers that the device reads.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// Buffers that the device writes.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }
}

/// A queue lent to a device, with the memory it lies in and the interrupt it raises.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    memory: Arc<GuestRam>,
    doorbell: EventFd,
    interrupt: QueueInterrupt,
}

impl Virtqueue {
    /// Wraps a configured queue whose rings lie in `memory`.
    #[must_use]
    pub fn new(
        index: u16,
        queue: Queue,
        memory: Arc<GuestRam>,
        doorbell: EventFd,
        interrupt: QueueInterrupt,
    ) -> Self {
        Self {
            index,
            queue,
            memory,
            doorbell,
            interrupt,
        }
    }

    /// Position among the device's queues.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// Signalled when the driver has made buffers available.
    #[must_use]
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// The queue's interrupt.
    #[must_use]
    pub fn interrupt(&self) -> &QueueInterrupt {
        &self.interrupt
    }

    /// Ring addresses and positions.
    #[must_use]
    pub fn state(&self) -> virtio_queue::QueueState {
        self.queue.state()
    }

    /// Moves both positions, for devices whose ring is worked on by another process.
    pub fn set_positions(&mut self, next_avail: u16, next_used: u16) {
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(next_used);
    }

    /// The used index in guest memory.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the ring cannot be read.
    pub fn used_index(&self) -> Result<u16, QueueError> {
        let index = self.queue.used_idx(&*self.memory, Ordering::Acquire);
        index.map(|Wrapping(index)| index).map_err(|e| self.ring(e))
    }

    /// The available index in guest memory.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the ring cannot be read.
    pub fn available_index(&self) -> Result<u16, QueueError> {
        let index = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        index.map(|Wrapping(index)| index).map_err(|e| self.ring(e))
    }

    /// Whether the driver has made anything available that was not popped yet.
    #[must_use]
    pub fn has_available(&self) -> bool {
        let index = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        index.is_ok_and(|Wrapping(index)| index != self.queue.next_avail())
    }

    /// Takes the next chain, or `None` when the driver has offered no more.
    ///
    /// # Errors
    /// [`QueueError`] for a ring or chain that violates the specification; the caller then
    /// declares the device broken ([`QueueInterrupt::device_error`]) and stops.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let index = self.index;
        let ring = |source| QueueError::Ring {
            queue: index,
            source,
        };
        let next = self.queue.iter(&*self.memory).map_err(ring)?.next();
        let Some(descriptors) = next else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let malformed = |what| QueueError::Malformed {
            queue: index,
            head,
            what,
        };
        let mut chain = Chain {
            head,
            ..Chain::default()
        };
        // The iterator ends early, without saying so, at a loop, a bad index, a bad indirect
        // table or more than 4 GiB; then the last descriptor seen still points to a next one.
        let mut complete = false;
        for (descriptor, count) in descriptors.zip(1..) {
            complete = !descriptor.has_next();
            if count > MAX_DESCRIPTORS {
                return Err(malformed("has more than 1024 descriptors"));
            }
            let (addr, len) = (descriptor.addr(), descriptor.len());
            if len == 0 {
                // It says nothing, and its address was never looked at.
                continue;
            }
            // Nearly always in one region, which is found sooner.
            let inside = self.memory.get_slice(addr, len as usize).is_ok()
                || self.memory.check_range(addr, len as usize);
            if !inside {
                return Err(malformed("has a buffer outside RAM"));
            }
            if descriptor.is_write_only() {
                chain.segments.push(Segment { addr, len });
            } else if chain.readable == chain.segments.len() {
                chain.segments.push(Segment { addr, len });
                chain.readable += 1;
            } else {
                return Err(malformed("has a readable buffer after a writable one"));
            }
        }
        if !complete {
            return Err(malformed("does not end within the rules"));
        }
        Ok(Some(chain))
    }

    /// Returns a chain; `written` bytes of its writable buffers were filled.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the used ring cannot be written.
    pub fn push(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        self.push_head(chain.head, written)
    }

    /// [`Virtqueue::push`] by the index of the chain's first descriptor.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the used ring cannot be written.
    pub fn push_head(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let result = self.queue.add_used(&*self.memory, head, written);
        result.map_err(|e| self.ring(e))
    }

    /// Undoes the last [`Virtqueue::pop`]: the chain is offered again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Interrupts the driver if it wants to hear of what was pushed since the last call.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the ring cannot be read.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        if self.wants_interrupt().map_err(|e| self.ring(e))? {
            self.interrupt.signal();
        }
        Ok(())
    }

    /// Asks the driver not to ring the doorbell: the device is looking anyway.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the ring cannot be written.
    pub fn disable_doorbell(&mut self) -> Result<(), QueueError> {
        let result = self.queue.disable_notification(&*self.memory);
        result.map_err(|e| self.ring(e))
    }

    /// Asks for the doorbell again. True when something became available meanwhile, so that the
    /// device must look once more before it sleeps.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the ring cannot be accessed.
    pub fn enable_doorbell(&mut self) -> Result<bool, QueueError> {
        let result = self.queue.enable_notification(&*self.memory);
        result.map_err(|e| self.ring(e))
    }

    fn wants_interrupt(&mut self) -> Result<bool, virtio_queue::Error> {
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(&*self.memory);
        }
        // The used index must be visible before the driver's wish is read (section 2.7.7.2).
        fence(Ordering::SeqCst);
        let flags_at = GuestAddress(self.queue.avail_ring());
        let flags: u16 = self
            .memory
            .load(flags_at, Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    fn ring(&self, source: virtio_queue::Error) -> QueueError {
        QueueError::Ring {
            queue: self.index,
            source,
        }
    }
}

#[cfg(test)]
mod tests;
