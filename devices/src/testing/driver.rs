//! The driver's side of a virtqueue.

use std::sync::Arc;

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::FakeRoute;
use crate::GuestRam;
use crate::device::DeviceId;
use crate::interrupt::MsiMessage;
use crate::virtio::{QueueInterrupt, VirtioInterrupt, Virtqueue};

/// Guest RAM of `len` bytes at address 0.
///
/// # Panics
/// When the host has no memory left.
#[must_use]
pub fn ram(len: usize) -> Arc<GuestRam> {
    let ranges = [(GuestAddress(0), len)];
    Arc::new(GuestRam::from_ranges(&ranges).expect("the host has memory left"))
}

/// A buffer that a driver offers.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    addr: u64,
    len: u32,
    flags: u32,
}

impl Buffer {
    /// The device reads it.
    #[must_use]
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            flags: 0,
        }
    }

    /// The device writes it.
    #[must_use]
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            flags: VRING_DESC_F_WRITE,
        }
    }
}

/// A split virtqueue in guest RAM as a driver sees it. Descriptors are handed out one after
/// another and taken again from the start when the table is used up.
pub struct DriverQueue {
    memory: Arc<GuestRam>,
    base: u64,
    size: u16,
    next_descriptor: u16,
    avail: u16,
    seen: u16,
}

impl DriverQueue {
    /// Bytes that a queue takes up from its base.
    pub const BYTES: u64 = 0x8000;

    /// A queue of `size` entries at `base`, a multiple of 4096.
    #[must_use]
    pub fn new(memory: &Arc<GuestRam>, base: u64, size: u16) -> Self {
        Self {
            memory: Arc::clone(memory),
            base,
            size,
            next_descriptor: 0,
            avail: 0,
            seen: 0,
        }
    }

    /// Addresses of descriptor table, available ring and used ring.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + 0x4000, self.base + 0x6000]
    }

    /// The device's side, with the route that its interrupts take. MSI-X is on.
    ///
    /// # Panics
    /// When the host has no descriptor left.
    #[must_use]
    pub fn device_side(&self, index: u16) -> (Virtqueue, Arc<FakeRoute>) {
        let route = Arc::new(FakeRoute::new());
        crate::interrupt::MsiRoute::unmask(&*route, MsiMessage::default()).expect("a fake");
        let id = DeviceId::new("test").expect("a good name");
        let queues = usize::from(index) + 1;
        let interrupt = VirtioInterrupt::for_test(id, route.clone(), queues);
        let interrupt = QueueInterrupt::new(Arc::new(interrupt), index);
        let doorbell = EventFd::new(EFD_NONBLOCK).expect("the host has descriptors left");
        let memory = Arc::clone(&self.memory);
        let queue = self.queue(false);
        (
            Virtqueue::new(index, queue, memory, doorbell, interrupt),
            route,
        )
    }

    /// The device's registers for this queue.
    ///
    /// # Panics
    /// When `size` is not a power of two.
    #[must_use]
    pub fn queue(&self, event_idx: bool) -> Queue {
        let [desc_table, avail_ring, used_ring] = self.addresses();
        Queue::try_from(QueueState {
            max_size: self.size,
            size: self.size,
            ready: true,
            desc_table,
            avail_ring,
            used_ring,
            event_idx_enabled: event_idx,
            ..QueueState::default()
        })
        .expect("addresses are aligned")
    }

    /// Offers a chain; returns its head.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (buffer, at) in buffers.iter().zip(1..) {
            let more = at < buffers.len();
            let next = (self.next_descriptor + 1) % self.size;
            let flags = buffer.flags | if more { VRING_DESC_F_NEXT } else { 0 };
            self.write_descriptor(self.next_descriptor, buffer, flags, next);
            self.next_descriptor = next;
        }
        self.publish(head);
        head
    }

    /// Offers a chain through an indirect table at `table`; returns its head.
    pub fn offer_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (buffer, index) in buffers.iter().zip(0_u16..) {
            let more = usize::from(index) + 1 < buffers.len();
            let flags = buffer.flags | if more { VRING_DESC_F_NEXT } else { 0 };
            self.write_raw(table + 16 * u64::from(index), buffer, flags, index + 1);
        }
        let len = u32::try_from(16 * buffers.len()).unwrap_or(u32::MAX);
        let head = self.next_descriptor;
        let indirect = Buffer {
            addr: table,
            len,
            flags: VRING_DESC_F_INDIRECT,
        };
        self.write_descriptor(head, &indirect, VRING_DESC_F_INDIRECT, 0);
        self.next_descriptor = (head + 1) % self.size;
        self.publish(head);
        head
    }

    /// Writes one descriptor, for chains that break the rules.
    pub fn write_descriptor(&self, index: u16, buffer: &Buffer, flags: u32, next: u16) {
        self.write_raw(self.base + 16 * u64::from(index), buffer, flags, next);
    }

    /// Puts `head` into the available ring.
    pub fn publish(&mut self, head: u16) {
        let [_, avail, _] = self.addresses();
        let slot = u64::from(self.avail % self.size);
        self.store(avail + 4 + 2 * slot, head);
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(self.avail);
    }

    /// Sets the available index, also to nonsense.
    pub fn set_avail_index(&self, index: u16) {
        self.store(self.base + 0x4000 + 2, index);
    }

    /// Asks the device for no interrupts, or for them again.
    pub fn suppress_interrupts(&self, suppress: bool) {
        let flag = if suppress {
            VRING_AVAIL_F_NO_INTERRUPT
        } else {
            0
        };
        self.store(self.base + 0x4000, (flag & 0xffff) as u16);
    }

    /// Chains that the device has returned since the last call: head and bytes written.
    ///
    /// # Panics
    /// When the ring lies outside RAM.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let [_, _, used] = self.addresses();
        let index: u16 = self
            .memory
            .read_obj(GuestAddress(used + 2))
            .expect("in RAM");
        let mut result = Vec::new();
        while self.seen != index {
            let at = used + 4 + 8 * u64::from(self.seen % self.size);
            let id: u32 = self.memory.read_obj(GuestAddress(at)).expect("in RAM");
            let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).expect("in RAM");
            result.push(((id & 0xffff) as u16, len));
            self.seen = self.seen.wrapping_add(1);
        }
        result
    }

    fn write_raw(&self, at: u64, buffer: &Buffer, flags: u32, next: u16) {
        self.store(at, buffer.addr);
        self.store(at + 8, buffer.len);
        self.store(at + 12, (flags & 0xffff) as u16);
        self.store(at + 14, next);
    }

    fn store<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory
            .write_obj(value, GuestAddress(at))
            .expect("the queue lies in RAM");
    }
}
