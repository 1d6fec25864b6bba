//! Start, pause, reset, save and restore.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::super::common;
use super::VirtioPci;
use crate::device::{Device, DeviceError, DeviceId, Migratability};
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::virtio::state::VirtioPciStateV1;

pub(super) const KIND: &str = "virtio-pci";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);

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

    fn state_formats(&self) -> Vec<StateFormat> {
        let device = self.lock().device.state_format();
        [FORMAT].into_iter().chain(device).collect()
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
        FORMAT.encode(&wire)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: VirtioPciStateV1 = FORMAT.decode(state)?;
        let mut inner = self.lock();
        if inner.started {
            return Err(RestoreError::AlreadyStarted {
                device: self.id.to_string(),
            });
        }
        check_negotiation(&wire, Self::offered_features(&inner))?;
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

/// Whether a saved driver's status and features are ones that [`VirtioPci::write_status`] lets it
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
