//! A used ring written in batches.
//!
//! A packet that takes several receive buffers must appear to the driver all at once: one that
//! polls would take the first buffers for the whole packet. So elements are written first, and
//! then the index moves over all of them (section 2.7.8.2 allows it).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::GuestRam;
use crate::virtio::interrupt::QueueInterrupt;
use crate::virtio::queue::{QueueError, Virtqueue};

/// The used side of a queue, taken over from its [`Virtqueue`] until [`UsedRing::give_back`].
/// Meanwhile the latter's `push` and `signal` must not be called.
pub(super) struct UsedRing {
    memory: Arc<GuestRam>,
    interrupt: QueueInterrupt,
    queue: u16,
    /// Entries; a power of two.
    size: u16,
    used_ring: u64,
    avail_ring: u64,
    event_idx: bool,
    /// Where the next element goes.
    next: u16,
    /// The index that the driver sees.
    published: u16,
    /// The index when the driver was last asked whether it wants an interrupt.
    signalled: u16,
}

impl UsedRing {
    pub(super) fn new(queue: &Virtqueue) -> Self {
        let state = queue.state();
        Self {
            memory: Arc::clone(queue.memory()),
            interrupt: queue.interrupt().clone(),
            queue: queue.index(),
            size: state.size,
            used_ring: state.used_ring,
            avail_ring: state.avail_ring,
            event_idx: state.event_idx_enabled,
            next: state.next_used,
            published: state.next_used,
            signalled: state.next_used,
        }
    }

    /// Writes the element of a chain that `pop` has given, not yet visible to the driver.
    pub(super) fn add(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let slot = u64::from(self.next & (self.size - 1));
        let at = self.used_ring + 4 + 8 * slot;
        // The ring is aligned to 4 bytes, an element to no more.
        for (offset, value) in [(0, u32::from(head)), (4, written)] {
            let at = GuestAddress(at + offset);
            let result = self.memory.store(value.to_le(), at, Ordering::Relaxed);
            result.map_err(|e| self.error(e))?;
        }
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver everything added, and interrupts it if it wants to hear of that.
    pub(super) fn signal(&mut self) -> Result<(), QueueError> {
        if self.published != self.next {
            let at = GuestAddress(self.used_ring + 2);
            let result = self.memory.store(self.next.to_le(), at, Ordering::Release);
            result.map_err(|e| self.error(e))?;
            self.published = self.next;
        }
        if self.signalled != self.next && self.wants_interrupt().map_err(|e| self.error(e))? {
            self.interrupt.signal();
        }
        Ok(())
    }

    /// Returns the position to the queue.
    pub(super) fn give_back(&self, queue: &mut Virtqueue) {
        queue.set_positions(queue.state().next_avail, self.published);
    }

    /// Section 2.7.7.2.
    fn wants_interrupt(&mut self) -> Result<bool, GuestMemoryError> {
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let load = |offset| -> Result<u16, GuestMemoryError> {
            let at = GuestAddress(self.avail_ring + offset);
            let value = self.memory.load(at, Ordering::Relaxed)?;
            Ok(u16::from_le(value))
        };
        let wants = if self.event_idx {
            let event = load(4 + 2 * u64::from(self.size))?;
            let passed = self.next.wrapping_sub(event).wrapping_sub(1);
            passed < self.next.wrapping_sub(self.signalled)
        } else {
            u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        self.signalled = self.next;
        Ok(wants)
    }

    fn error(&self, source: GuestMemoryError) -> QueueError {
        QueueError::Ring {
            queue: self.queue,
            source: virtio_queue::Error::GuestMemory(source),
        }
    }
}
