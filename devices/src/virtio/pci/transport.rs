//! A virtio device as a PCI function.

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::capabilities::{
    self, BAR, COMMON, Capabilities, DEVICE, ISR, MAX_VECTORS, MSIX_PBA, MSIX_TABLE, NOTIFY,
    NOTIFY_MULTIPLIER,
};
use super::common::{self, QueueSlot};
use crate::GuestRam;
use crate::device::{Device, DeviceError, DeviceId, Migratability};
use crate::interrupt::{InterruptError, MsiRouter};
use crate::pci::{BarChange, BarSpec, ConfigSpace, Doorbell, FunctionIdentity, Msix, PciFunction};
use crate::state::{DeviceState, RestoreError, SaveError};
use crate::virtio::device::{Activation, ActivationError, VirtioDevice};
use crate::virtio::interrupt::{QueueInterrupt, VirtioInterrupt};
use crate::virtio::queue::Virtqueue;
use crate::virtio::state::VirtioPciStateV1;

const KIND: &str = "virtio-pci";

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
        inner.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features: inner.driver_features,
            interrupt: Arc::clone(&self.interrupt),
        })?;
        inner.active = true;
        Ok(())
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

    /// Whether a saved driver's status and features are ones that [`Self::write_status`] lets it
    /// reach.
    fn check_negotiation(wire: &VirtioPciStateV1, offered: u64) -> Result<(), RestoreError> {
        let has = |bit: u8| wire.status & bit != 0;
        let impossible = |why: &str| {
            let value = format!("{:#x}", wire.status);
            Err(RestoreError::field(KIND, "status", value, why))
        };
        if has(common::STATUS_DRIVER_OK) && !has(common::STATUS_FEATURES_OK) {
            return impossible("the driver is ready without agreed features");
        }
        if !has(common::STATUS_FEATURES_OK) {
            // Until the device has agreed, a driver may have written anything.
            return Ok(());
        }
        let foreign = wire.driver_features & !offered;
        if foreign != 0 {
            let value = format!("{:#x}", wire.driver_features);
            let why = format!("features {foreign:#x} are not offered here");
            return Err(RestoreError::field(KIND, "driver_features", value, why));
        }
        if wire.driver_features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return impossible("features are agreed without VIRTIO_F_VERSION_1");
        }
        Ok(())
    }

    /// Follows the driver through initialization (section 3.1.1).
    fn write_status(&self, inner: &mut Inner, status: u8) {
        if status == 0 {
            return self.reset_transport(inner);
        }
        let mut new = status & !common::STATUS_NEEDS_RESET;
        if new & inner.status != inner.status {
            // Bits are only ever added.
            return;
        }
        let added = new & !inner.status;
        if added & common::STATUS_FEATURES_OK != 0 {
            let offered = Self::offered_features(inner);
            let version_1 = inner.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
            if inner.driver_features & !offered != 0 || !version_1 {
                new &= !common::STATUS_FEATURES_OK;
            }
        }
        if added & common::STATUS_DRIVER_OK != 0 && new & common::STATUS_FEATURES_OK == 0 {
            new &= !common::STATUS_DRIVER_OK;
        }
        inner.status = new;
        if new & added & common::STATUS_DRIVER_OK != 0
            && let Err(error) = self.activate(inner)
        {
            self.interrupt.device_error(&error);
        }
    }

    fn read_common(&self, inner: &Inner, offset: u64, data: &mut [u8]) {
        let select = usize::from(inner.queue_select);
        let queue = inner.queues.get(select);
        let half = |value: u64, high: bool| {
            if high {
                value >> 32
            } else {
                value & 0xffff_ffff
            }
        };
        let value = match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => u64::from(inner.device_feature_select),
            (common::DEVICE_FEATURE, 4) => match inner.device_feature_select {
                select @ (0 | 1) => half(Self::offered_features(inner), select == 1),
                _ => 0,
            },
            (common::DRIVER_FEATURE_SELECT, 4) => u64::from(inner.driver_feature_select),
            (common::DRIVER_FEATURE, 4) => match inner.driver_feature_select {
                select @ (0 | 1) => half(inner.driver_features, select == 1),
                _ => 0,
            },
            (common::CONFIG_MSIX_VECTOR, 2) => u64::from(self.interrupt.config_vector()),
            (common::NUM_QUEUES, 2) => inner.queues.len() as u64,
            (common::DEVICE_STATUS, 1) => u64::from(self.status(inner)),
            (common::CONFIG_GENERATION, 1) => u64::from(self.interrupt.config_generation()),
            (common::QUEUE_SELECT, 2) => u64::from(inner.queue_select),
            (common::QUEUE_SIZE, 2) => queue.map_or(0, |queue| u64::from(queue.size)),
            (common::QUEUE_MSIX_VECTOR, 2) => {
                u64::from(self.interrupt.queue_vector(inner.queue_select))
            }
            (common::QUEUE_ENABLE, 2) => queue.map_or(0, |queue| u64::from(queue.enabled)),
            (common::QUEUE_NOTIFY_OFF, 2) => u64::from(inner.queue_select),
            (common::QUEUE_DESC | common::QUEUE_DRIVER | common::QUEUE_DEVICE, 8) => {
                queue.map_or(0, |queue| queue.address(offset))
            }
            (common::QUEUE_DESC..=0x37, 4) if offset.is_multiple_of(4) => {
                let address = queue.map_or(0, |queue| queue.address(offset & !7));
                half(address, offset & 4 != 0)
            }
            _ => 0,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn status(&self, inner: &Inner) -> u8 {
        let error = if self.interrupt.needs_reset() {
            common::STATUS_NEEDS_RESET
        } else {
            0
        };
        inner.status | error
    }

    fn write_common(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        match (offset, data) {
            (common::DEVICE_STATUS, &[status]) => self.write_status(inner, status),
            (_, &[a, b]) => self.write_common16(inner, offset, u16::from_le_bytes([a, b])),
            (_, &[a, b, c, d]) => {
                Self::write_common32(inner, offset, u32::from_le_bytes([a, b, c, d]));
            }
            // Drivers shall write addresses in halves (section 4.1.3.1); some do not.
            (_, &[a, b, c, d, e, f, g, h]) => {
                Self::write_common32(inner, offset, u32::from_le_bytes([a, b, c, d]));
                Self::write_common32(inner, offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_common16(&self, inner: &mut Inner, offset: u64, value: u16) {
        let select = inner.queue_select;
        let running = inner.status & common::STATUS_DRIVER_OK != 0;
        let queue = inner.queues.get_mut(usize::from(select));
        match offset {
            common::CONFIG_MSIX_VECTOR => self.interrupt.set_config_vector(value),
            common::QUEUE_SELECT => inner.queue_select = value,
            common::QUEUE_MSIX_VECTOR => self.interrupt.set_queue_vector(select, value),
            common::QUEUE_SIZE => {
                if let Some(queue) = queue.filter(|queue| !queue.enabled) {
                    queue.set_size(value);
                }
            }
            common::QUEUE_ENABLE if value == 1 && !running => {
                if let Some(queue) = queue {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_common32(inner: &mut Inner, offset: u64, value: u32) {
        let features_open = inner.status & common::STATUS_FEATURES_OK == 0;
        match offset {
            common::DEVICE_FEATURE_SELECT => inner.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => inner.driver_feature_select = value,
            common::DRIVER_FEATURE if features_open => match inner.driver_feature_select {
                0 => set_half(&mut inner.driver_features, false, value),
                1 => set_half(&mut inner.driver_features, true, value),
                _ => {}
            },
            common::QUEUE_DESC..=0x37 if offset.is_multiple_of(4) => {
                let queue = inner.queues.get_mut(usize::from(inner.queue_select));
                let register = queue
                    .filter(|queue| !queue.enabled)
                    .and_then(|queue| queue.address_mut(offset & !7));
                if let Some(address) = register {
                    set_half(address, offset & 4 != 0, value);
                }
            }
            _ => {}
        }
    }

    /// Without an ioeventfd, or where a driver writes through the configuration window.
    fn ring(inner: &Inner, offset: u64) {
        let queue = usize::try_from(offset / NOTIFY_MULTIPLIER).ok();
        if let Some(queue) = queue.and_then(|index| inner.queues.get(index)) {
            // The counter saturating means that the device has a signal it has not yet seen.
            let _ = queue.doorbell.write(1);
        }
    }

    fn read_area(&self, inner: &Inner, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let len = data.len();
        if let Some(at) = COMMON.relative(offset, len) {
            self.read_common(inner, at, data);
        } else if let (Some(_), Some(byte)) = (ISR.relative(offset, len), data.first_mut()) {
            *byte = self.interrupt.take_isr();
        } else if let Some(at) = DEVICE.relative(offset, len) {
            inner.device.read_config(at, data);
        } else if let Some(at) = MSIX_TABLE.relative(offset, len) {
            inner.msix.read_table(at, data);
        } else if let Some(at) = MSIX_PBA.relative(offset, len) {
            inner.msix.read_pba(at, data);
        }
    }

    fn write_area(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let len = data.len();
        if let Some(at) = COMMON.relative(offset, len) {
            self.write_common(inner, at, data);
        } else if let Some(at) = DEVICE.relative(offset, len) {
            inner.device.write_config(at, data);
        } else if let Some(at) = NOTIFY.relative(offset, len) {
            Self::ring(inner, at);
        } else if let Some(at) = MSIX_TABLE.relative(offset, len) {
            inner.msix.write_table(at, data);
        }
    }

    /// The BAR offset and length that the driver has put into the configuration window
    /// (section 4.1.4.9); `None` when they make no sense.
    fn window(&self, inner: &Inner) -> Option<(u64, usize)> {
        let field = |at: u8| {
            let low = u32::from(inner.config.u16_at(self.capabilities.pci_cfg + at));
            let high = u32::from(inner.config.u16_at(self.capabilities.pci_cfg + at + 2));
            high << 16 | low
        };
        let bar = (field(4) & 0xff) as u8;
        let (offset, len) = (field(8), field(12));
        let sane = bar == BAR.index && matches!(len, 1 | 2 | 4) && offset % len == 0;
        sane.then_some((u64::from(offset), len as usize))
    }

    /// Offset of the window's data register.
    fn window_data(&self) -> u16 {
        u16::from(self.capabilities.pci_cfg) + 16
    }
}

fn set_half(target: &mut u64, high: bool, value: u32) {
    *target = if high {
        *target & 0xffff_ffff | u64::from(value) << 32
    } else {
        *target & !0xffff_ffff | u64::from(value)
    };
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

    fn reset_config(&self) -> Vec<BarChange> {
        self.lock().config.reset()
    }

    fn decoded(&self) -> Vec<BarChange> {
        let decoded = self.lock().config.decoded();
        decoded.into_iter().map(BarChange::Map).collect()
    }
}

impl Device for VirtioPci {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn start(&self) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        inner.started = true;
        let running = inner.status & common::STATUS_DRIVER_OK != 0 && !self.interrupt.needs_reset();
        if !running || inner.active {
            return Ok(());
        }
        match self.activate(&mut inner) {
            Err(error) if error.is_guest_caused() => {
                self.interrupt.device_error(&error);
                Ok(())
            }
            result => result.map_err(|source| DeviceError::Internal {
                id: self.id.clone(),
                what: "device could not be started",
                source: Box::new(source),
            }),
        }
    }

    fn pause(&self) -> Result<(), DeviceError> {
        Self::deactivate(&mut self.lock());
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        self.reset_transport(&mut inner);
        inner.msix.reset();
        self.interrupt.set_msix_enabled(false);
        Ok(())
    }

    fn migratability(&self) -> Migratability {
        self.lock().device.migratability()
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let inner = self.lock();
        let queues = inner.queues.iter().zip(0..);
        let wire = VirtioPciStateV1 {
            config: inner.config.save(),
            msix: inner.msix.save(),
            status: inner.status,
            device_feature_select: inner.device_feature_select,
            driver_feature_select: inner.driver_feature_select,
            driver_features: inner.driver_features,
            queue_select: inner.queue_select,
            config_vector: self.interrupt.config_vector(),
            config_generation: self.interrupt.config_generation(),
            isr: self.interrupt.isr(),
            needs_reset: self.interrupt.needs_reset(),
            queues: queues
                .map(|(slot, index)| slot.save(self.interrupt.queue_vector(index)))
                .collect(),
            device: inner.device.save()?,
        };
        DeviceState::encode(KIND, 1, &wire)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: VirtioPciStateV1 = state.decode(KIND, 1..=1)?;
        let mut inner = self.lock();
        if inner.started {
            return Err(RestoreError::AlreadyStarted {
                device: self.id.to_string(),
            });
        }
        Self::check_negotiation(&wire, Self::offered_features(&inner))?;
        if wire.queues.len() != inner.queues.len() {
            let why = format!("this device has {} queues", inner.queues.len());
            return Err(RestoreError::field(KIND, "queues", wire.queues.len(), why));
        }
        for (slot, saved) in inner.queues.iter_mut().zip(&wire.queues) {
            if !slot.restore(saved) {
                let why = format!("not a power of two up to {}", slot.max_size);
                return Err(RestoreError::field(KIND, "queues.size", saved.size, why));
            }
        }
        inner.device.restore(&wire.device)?;
        inner.config.restore(&wire.config)?;
        inner.msix.restore(&wire.msix)?;
        inner.device_feature_select = wire.device_feature_select;
        inner.driver_feature_select = wire.driver_feature_select;
        inner.driver_features = wire.driver_features;
        inner.queue_select = wire.queue_select;
        inner.status = wire.status & !common::STATUS_NEEDS_RESET;
        self.interrupt
            .restore(wire.isr, wire.needs_reset, wire.config_generation);
        self.interrupt.set_msix_enabled(inner.msix.enabled());
        self.interrupt.set_config_vector(wire.config_vector);
        for (saved, index) in wire.queues.iter().zip(0..) {
            self.interrupt.set_queue_vector(index, saved.vector);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
