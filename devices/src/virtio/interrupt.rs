//! How a device tells its driver that something happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};

use crate::device::DeviceId;
use crate::interrupt::MsiRoute;
use crate::warn_limited;

/// A vector number that stands for "none" (virtio 1.2 section 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// ISR bits (section 4.1.4.5).
const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// The interrupt side of one device, shared between the transport and the device's threads.
///
/// Without locks: a device thread loads a vector number and triggers a route.
pub struct VirtioInterrupt {
    id: DeviceId,
    routes: Vec<Arc<dyn MsiRoute>>,
    msix_enabled: AtomicBool,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    config_generation: AtomicU8,
    needs_reset: AtomicBool,
    raised: AtomicU64,
}

impl VirtioInterrupt {
    pub(super) fn new(id: DeviceId, routes: Vec<Arc<dyn MsiRoute>>, queues: usize) -> Self {
        Self {
            id,
            routes,
            msix_enabled: AtomicBool::new(false),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            config_generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            raised: AtomicU64::new(0),
        }
    }

    /// One route for everything, MSI-X on.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn for_test(id: DeviceId, route: Arc<dyn MsiRoute>, queues: usize) -> Self {
        let interrupt = Self::new(id, vec![route], queues);
        interrupt.set_msix_enabled(true);
        interrupt.set_config_vector(0);
        for queue in 0..u16::try_from(queues).unwrap_or(u16::MAX) {
            interrupt.set_queue_vector(queue, 0);
        }
        interrupt
    }

    /// Tells the driver that the configuration changed.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.trigger(self.config_vector.load(Ordering::Relaxed));
    }

    /// The driver has done something that the device cannot make sense of: the device stops and
    /// asks to be reset (`DEVICE_NEEDS_RESET`, section 2.1).
    pub fn device_error(&self, error: &dyn std::error::Error) {
        warn_limited!(device:% = self.id, error:% = error; "driver error, the device needs a reset");
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config_changed();
    }

    /// Whether [`VirtioInterrupt::device_error`] was called since the last reset.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Interrupts raised so far.
    #[must_use]
    pub fn raised(&self) -> u64 {
        self.raised.load(Ordering::Relaxed)
    }

    /// The event descriptor behind queue `queue`'s vector, for processes that signal it
    /// themselves. `None` when the driver has given the queue no vector.
    #[must_use]
    pub fn queue_route(&self, queue: u16) -> Option<&Arc<dyn MsiRoute>> {
        let vector = self.queue_vectors.get(usize::from(queue))?;
        self.routes.get(usize::from(vector.load(Ordering::Relaxed)))
    }

    pub(super) fn set_msix_enabled(&self, enabled: bool) {
        self.msix_enabled.store(enabled, Ordering::SeqCst);
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    /// An unknown vector reads back as [`NO_VECTOR`], which tells the driver that it failed.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.known(vector), Ordering::Relaxed);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        let vector = self.queue_vectors.get(usize::from(queue));
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue)) {
            slot.store(self.known(vector), Ordering::Relaxed);
        }
    }

    pub(super) fn config_generation(&self) -> u8 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// Reading the ISR clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    pub(super) fn restore(&self, isr: u8, needs_reset: bool, config_generation: u8) {
        self.isr.store(isr, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        self.config_generation
            .store(config_generation, Ordering::SeqCst);
    }

    /// A device reset forgets vectors and the error; the generation goes on counting.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.isr.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    fn known(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.routes.len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn trigger(&self, vector: u16) {
        let route = self.routes.get(usize::from(vector));
        if let Some(route) = route.filter(|_| self.msix_enabled.load(Ordering::Relaxed)) {
            self.raised.fetch_add(1, Ordering::Relaxed);
            route.trigger();
        }
    }
}

/// One queue's interrupt.
#[derive(Clone)]
pub struct QueueInterrupt {
    shared: Arc<VirtioInterrupt>,
    queue: u16,
}

impl QueueInterrupt {
    /// The interrupt of queue `queue`.
    #[must_use]
    pub fn new(shared: Arc<VirtioInterrupt>, queue: u16) -> Self {
        Self { shared, queue }
    }

    /// Tells the driver that buffers were used.
    pub fn signal(&self) {
        self.shared.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        self.shared.trigger(self.shared.queue_vector(self.queue));
    }

    /// See [`VirtioInterrupt::device_error`].
    pub fn device_error(&self, error: &dyn std::error::Error) {
        self.shared.device_error(error);
    }

    /// The device's whole interrupt side.
    #[must_use]
    pub fn shared(&self) -> &Arc<VirtioInterrupt> {
        &self.shared
    }
}
