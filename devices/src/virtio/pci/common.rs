//! The common configuration structure (section 4.1.4.3): register numbers and what they hold.

use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::state::QueueStateV1;

// Offsets.
pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
pub(super) const DEVICE_FEATURE: u64 = 0x04;
pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
pub(super) const DRIVER_FEATURE: u64 = 0x0c;
pub(super) const CONFIG_MSIX_VECTOR: u64 = 0x10;
pub(super) const NUM_QUEUES: u64 = 0x12;
pub(super) const DEVICE_STATUS: u64 = 0x14;
pub(super) const CONFIG_GENERATION: u64 = 0x15;
pub(super) const QUEUE_SELECT: u64 = 0x16;
pub(super) const QUEUE_SIZE: u64 = 0x18;
pub(super) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
pub(super) const QUEUE_ENABLE: u64 = 0x1c;
pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
pub(super) const QUEUE_DESC: u64 = 0x20;
pub(super) const QUEUE_DRIVER: u64 = 0x28;
pub(super) const QUEUE_DEVICE: u64 = 0x30;

// device_status bits (section 2.1).
pub(super) const STATUS_FEATURES_OK: u8 = 8;
pub(super) const STATUS_DRIVER_OK: u8 = 4;
pub(super) const STATUS_NEEDS_RESET: u8 = 64;

/// A queue's registers and, while the device is inactive, its positions.
pub(super) struct QueueSlot {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
    /// Rung by the driver; lives as long as the function, so that KVM can keep watching it.
    pub(super) doorbell: EventFd,
}

impl QueueSlot {
    pub(super) fn new(max_size: u16) -> std::io::Result<Self> {
        Ok(Self {
            max_size,
            size: max_size,
            enabled: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            next_avail: 0,
            next_used: 0,
            doorbell: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    pub(super) fn reset(&mut self) {
        self.size = self.max_size;
        self.enabled = false;
        self.desc_table = 0;
        self.avail_ring = 0;
        self.used_ring = 0;
        self.next_avail = 0;
        self.next_used = 0;
        // Rings of the previous driver mean nothing to the next.
        let _ = self.doorbell.read();
    }

    /// Takes a size that is a power of two within the limit, else keeps the old one.
    pub(super) fn set_size(&mut self, size: u16) {
        if size.is_power_of_two() && size <= self.max_size {
            self.size = size;
        }
    }

    /// The value of the address register at `register`.
    pub(super) fn address(&self, register: u64) -> u64 {
        match register {
            QUEUE_DESC => self.desc_table,
            QUEUE_DRIVER => self.avail_ring,
            _ => self.used_ring,
        }
    }

    /// The address register at `offset` (an access of half of one is relative to its start).
    pub(super) fn address_mut(&mut self, register: u64) -> Option<&mut u64> {
        match register {
            QUEUE_DESC => Some(&mut self.desc_table),
            QUEUE_DRIVER => Some(&mut self.avail_ring),
            QUEUE_DEVICE => Some(&mut self.used_ring),
            _ => None,
        }
    }

    /// The queue as `virtio-queue` checks and walks it.
    pub(super) fn queue(&self, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.enabled,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }

    /// Keeps where the device got to.
    pub(super) fn set_positions(&mut self, queue: &QueueState) {
        self.next_avail = queue.next_avail;
        self.next_used = queue.next_used;
    }

    pub(super) fn save(&self, vector: u16) -> QueueStateV1 {
        QueueStateV1 {
            size: self.size,
            enabled: self.enabled,
            vector,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
            next_avail: self.next_avail,
            next_used: self.next_used,
        }
    }

    /// False when the saved size is impossible. Addresses are checked at activation, as the
    /// driver's own are.
    pub(super) fn restore(&mut self, saved: &QueueStateV1) -> bool {
        self.size = self.max_size;
        self.set_size(saved.size);
        self.enabled = saved.enabled;
        self.desc_table = saved.desc_table;
        self.avail_ring = saved.avail_ring;
        self.used_ring = saved.used_ring;
        self.next_avail = saved.next_avail;
        self.next_used = saved.next_used;
        self.size == saved.size
    }
}

/// Whether the queue's three areas lie in RAM.
pub(super) fn rings_in_ram(queue: &Queue, memory: &crate::GuestRam) -> bool {
    use vm_memory::{GuestAddress, GuestMemoryBackend};
    let size = usize::from(queue.size());
    [
        (queue.desc_table(), 16 * size),
        (queue.avail_ring(), 6 + 2 * size),
        (queue.used_ring(), 6 + 8 * size),
    ]
    .into_iter()
    .all(|(address, len)| memory.check_range(GuestAddress(address), len))
}
