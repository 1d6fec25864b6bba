//! A virtio device as a PCI function.

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::capabilities::{self, BAR, Capabilities, MAX_VECTORS, NOTIFY, NOTIFY_MULTIPLIER};
use super::common::{self, QueueSlot};
use crate::GuestRam;
use crate::device::DeviceId;
use crate::interrupt::{InterruptError, MsiRouter};
use crate::pci::{
    BarChange, BarMapping, BarSpec, ConfigSpace, Doorbell, FunctionIdentity, Msix, PciFunction,
};
use crate::virtio::device::{Activation, ActivationError, VirtioDevice};
use crate::virtio::interrupt::{QueueInterrupt, VirtioInterrupt};
use crate::virtio::queue::Virtqueue;

/// Virtio's PCI vendor (section 4.1.2).
const VENDOR: u16 = 0x1af4;
/// Modern device ids are this plus the device type.
const DEVICE_ID_BASE: u16 = 0x1040;
/// Any subsystem id of 0x40 or more marks a modern device.
const SUBSYSTEM: u16 = 0x40;

/// A function could not be built.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// No interrupt route is left.
    #[error("interrupt routes of a virtio device")]
    Interrupt(#[source] InterruptError),
    /// No event descriptor is left.
    #[error("doorbells of a virtio device")]
    Doorbell(#[source] io::Error),
}

struct Inner {
    config: ConfigSpace,
    msix: Msix,
    device: Box<dyn VirtioDevice>,
    queues: Vec<QueueSlot>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    status: u8,
    /// The machine runs.
    started: bool,
    /// The device holds the queues.
    active: bool,
}

/// A virtio device on the PCI bus: transport, MSI-X and lifecycle around a [`VirtioDevice`].
pub struct VirtioPci {
    id: DeviceId,
    memory: Arc<GuestRam>,
    interrupt: Arc<VirtioInterrupt>,
    capabilities: Capabilities,
    inner: Mutex<Inner>,
}

impl VirtioPci {
    /// Wraps `device`, with one interrupt vector per queue and one for configuration changes.
    ///
    /// # Errors
    /// [`VirtioPciError`] when the host has no interrupt route or descriptor left.
    pub fn new(
        id: DeviceId,
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestRam>,
        router: &dyn MsiRouter,
    ) -> Result<Self, VirtioPciError> {
        let identity = device.identity();
        let queues = identity
            .queue_sizes
            .iter()
            .map(|size| QueueSlot::new(*size));
        let queues = queues
            .collect::<io::Result<Vec<_>>>()
            .map_err(VirtioPciError::Doorbell)?;
        let vectors = (queues.len() + 1).min(MAX_VECTORS);
        let routes = (0..vectors).map(|_| router.allocate());
        let routes = routes
            .collect::<Result<Vec<_>, _>>()
            .map_err(VirtioPciError::Interrupt)?;

        let device_type = identity.device_type;
        let function = FunctionIdentity {
            vendor: VENDOR,
            device: DEVICE_ID_BASE + device_type as u16,
            class: device_type.pci_class(),
            revision: 1,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        };
        let mut config = ConfigSpace::new(function, &[BAR]);
        let vector_count = u16::try_from(vectors).expect("at most MAX_VECTORS");
        let capabilities = capabilities::add(&mut config, vector_count)
            .expect("six capabilities fit into 192 bytes");
        let interrupt = VirtioInterrupt::new(id.clone(), routes.clone(), queues.len());
        Ok(Self {
            id,
            memory,
            interrupt: Arc::new(interrupt),
            capabilities,
            inner: Mutex::new(Inner {
                config,
                msix: Msix::new(routes),
                device,
                queues,
                device_feature_select: 0,
                driver_feature_select: 0,
                driver_features: 0,
                queue_select: 0,
                status: 0,
                started: false,
                active: false,
            }),
        })
    }

    /// The interrupt side, which also counts and tells whether the device is broken.
    #[must_use]
    pub fn interrupt(&self) -> &Arc<VirtioInterrupt> {
        &self.interrupt
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// Lends the enabled queues to the device.
    fn activate(&self, inner: &mut Inner) -> Result<(), ActivationError> {
        let event_idx = inner.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (slot, index) in inner
            .queues
            .iter()
            .zip(0..)
            .filter(|(slot, _)| slot.enabled)
        {
            let wrong = |why: String| ActivationError::Queue { queue: index, why };
            let queue = slot.queue(event_idx).map_err(|e| wrong(e.to_string()))?;
            if !common::rings_in_ram(&queue, &self.memory) {
                return Err(wrong("its rings are not in RAM".to_owned()));
            }
            let doorbell = slot
                .doorbell
                .try_clone()
                .map_err(|source| ActivationError::Host {
                    what: "doorbell descriptor",
                    source,
                })?;
            let interrupt = QueueInterrupt::new(Arc::clone(&self.interrupt), index);
            let memory = Arc::clone(&self.memory);
            queues.push(Virtqueue::new(index, queue, memory, doorbell, interrupt));
        }
        let result = inner.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features: inner.driver_features,
            interrupt: Arc::clone(&self.interrupt),
        });
        inner.active = true;
        if result.is_err() {
            // Some queues may have been worked on already.
            Self::deactivate(inner);
        }
        result
    }

    fn deactivate(inner: &mut Inner) {
        if !std::mem::take(&mut inner.active) {
            return;
        }
        for queue in inner.device.deactivate() {
            if let Some(slot) = inner.queues.get_mut(usize::from(queue.index())) {
                slot.set_positions(&queue.state());
            }
        }
    }

    /// A reset by the driver (section 2.1.1), and half of a reset of the machine.
    fn reset_transport(&self, inner: &mut Inner) {
        Self::deactivate(inner);
        inner.device.reset();
        for queue in &mut inner.queues {
            queue.reset();
        }
        inner.device_feature_select = 0;
        inner.driver_feature_select = 0;
        inner.driver_features = 0;
        inner.queue_select = 0;
        inner.status = 0;
        self.interrupt.reset();
    }

    fn offered_features(inner: &Inner) -> u64 {
        let identity = inner.device.identity();
        identity.features | identity.ring_features | 1 << VIRTIO_F_VERSION_1
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let inner = self.lock();
        if offset == self.window_data()
            && let Some((at, len)) = self.window(&inner)
            && let Some((window, rest)) = data.split_at_mut_checked(len)
        {
            rest.fill(0);
            return self.read_area(&inner, at, window);
        }
        inner.config.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        let mut inner = self.lock();
        let changes = inner.config.write(offset, data);
        let control = inner.config.u16_at(self.capabilities.msix_control);
        inner.msix.set_control(control);
        self.interrupt.set_msix_enabled(inner.msix.enabled());
        if offset == self.window_data()
            && let Some((at, len)) = self.window(&inner)
            && let Some(data) = data.get(..len)
        {
            self.write_area(&mut inner, at, data);
        }
        changes
    }

    fn read_bar(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        self.read_area(&self.lock(), offset, data);
    }

    fn write_bar(&self, _bar: u8, offset: u64, data: &[u8]) {
        self.write_area(&mut self.lock(), offset, data);
    }

    fn bars(&self) -> Vec<BarSpec> {
        vec![BAR]
    }

    fn place_bar(&self, bar: u8, address: u64) {
        self.lock().config.place_bar(bar, address);
    }

    fn doorbells(&self, _bar: u8, visit: &mut dyn FnMut(Doorbell<'_>)) {
        let inner = self.lock();
        for (queue, index) in inner.queues.iter().zip(0..) {
            visit(Doorbell {
                offset: NOTIFY.offset + NOTIFY_MULTIPLIER * index,
                event: &queue.doorbell,
            });
        }
    }

    fn mappings(&self, _bar: u8, _visit: &mut dyn FnMut(BarMapping)) {}

    fn reset_config(&self) -> Vec<BarChange> {
        self.lock().config.reset()
    }

    fn decoded(&self) -> Vec<BarChange> {
        let decoded = self.lock().config.decoded();
        decoded.into_iter().map(BarChange::Map).collect()
    }
}

mod lifecycle;
pub(crate) use lifecycle::FORMAT;
mod registers;
#[cfg(test)]
mod tests;
