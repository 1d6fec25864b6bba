//! What devices report to the machine's owner besides interrupts and logs.

use std::sync::Arc;

use crate::device::DeviceId;

/// Something that an operator or a script wants to know about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The host could not complete an I/O request; the guest saw an error.
    IoError {
        /// `read`, `write`, `flush`, ...
        operation: &'static str,
        /// Byte offset within the device.
        offset: u64,
        /// The host's answer.
        error: String,
    },
    /// The process behind a vhost-user device is gone.
    BackendLost {
        /// What happened.
        reason: String,
    },
    /// An assigned device has met an error that it cannot correct.
    Failed,
    /// The host wants an assigned device back.
    Requested,
    /// The guest has set the balloon to this many bytes.
    BalloonActual {
        /// Bytes taken out of the guest.
        bytes: u64,
    },
}

/// Port to the machine's owner. Called on device threads; returns at once.
pub trait EventSink: Send + Sync {
    /// Passes an event of `device` on.
    fn report(&self, device: &DeviceId, event: DeviceEvent);
}

/// An [`EventSink`] together with the device that reports to it.
#[derive(Clone)]
pub struct Reporter {
    device: DeviceId,
    sink: Arc<dyn EventSink>,
}

impl Reporter {
    /// Reports events of `device` to `sink`.
    #[must_use]
    pub fn new(device: DeviceId, sink: Arc<dyn EventSink>) -> Self {
        Self { device, sink }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// Reports one event.
    pub fn report(&self, event: DeviceEvent) {
        self.sink.report(&self.device, event);
    }
}
