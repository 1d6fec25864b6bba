//! What differs between virtio devices.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::interrupt::VirtioInterrupt;
use super::queue::Virtqueue;
use crate::GuestRam;
use crate::device::Migratability;
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};

/// Device types (virtio 1.2 section 5) that Drover offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeviceType {
    /// Network device.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// File system.
    Fs = 26,
}

impl DeviceType {
    /// PCI class code, `0xBBSSPP`.
    #[must_use]
    pub fn pci_class(self) -> u32 {
        match self {
            Self::Net => 0x02_00_00,
            Self::Block | Self::Fs => 0x01_80_00,
            Self::Console => 0x07_80_00,
            Self::Vsock => 0x02_80_00,
            Self::Rng | Self::Balloon => 0xff_00_00,
        }
    }
}

/// Features that [`Virtqueue`] implements.
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// What a device is; fixed for its life.
#[derive(Clone, Debug)]
pub struct DeviceIdentity {
    /// Its type.
    pub device_type: DeviceType,
    /// Feature bits of its type that it offers.
    pub features: u64,
    /// Which of the ring's features its queues have: [`RING_FEATURES`] unless another process
    /// works on them. The transport offers `VIRTIO_F_VERSION_1` in addition.
    pub ring_features: u64,
    /// Most entries of each queue, powers of two.
    pub queue_sizes: Vec<u16>,
}

/// Everything a device needs to work.
pub struct Activation {
    /// Guest RAM.
    pub memory: Arc<GuestRam>,
    /// The queues that the driver has enabled, by ascending index.
    pub queues: Vec<Virtqueue>,
    /// Negotiated feature bits.
    pub features: u64,
    /// For configuration changes.
    pub interrupt: Arc<VirtioInterrupt>,
}

impl Activation {
    /// Whether feature bit number `bit` was negotiated.
    #[must_use]
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }
}

/// A device could not begin to work.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// The driver has not enabled a queue that the device cannot do without.
    #[error("queue {0} is not enabled")]
    MissingQueue(u16),
    /// The driver has placed a queue where none can be.
    #[error("queue {queue}: {why}")]
    Queue {
        /// Queue index.
        queue: u16,
        /// What is wrong.
        why: String,
    },
    /// The host refused a thread or descriptor.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The process that emulates the device failed.
    #[error("{what}")]
    Peer {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl ActivationError {
    /// Whether the driver is to blame: then the device asks to be reset, else the host's
    /// operator hears of it.
    #[must_use]
    pub fn is_guest_caused(&self) -> bool {
        matches!(self, Self::MissingQueue(_) | Self::Queue { .. })
    }
}

/// A virtio device without its transport. The transport calls it under its own lock.
pub trait VirtioDevice: Send {
    /// Type, features and queues.
    fn identity(&self) -> &DeviceIdentity;

    /// Reads device configuration at `offset`; beyond its end, zeroes.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration; read-only fields keep their value.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Begins to work on the queues, on threads of its own, and looks at each queue once: the
    /// driver may have filled it before.
    ///
    /// # Errors
    /// [`ActivationError`]; [`VirtioDevice::deactivate`] then returns the queues that were begun.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError>;

    /// Stops work and returns the queues. On return nothing is in flight and no thread of the
    /// device is left. Without effect while inactive.
    fn deactivate(&mut self) -> Vec<Virtqueue>;

    /// Forgets what a driver has set. Called while inactive.
    fn reset(&mut self);

    /// See [`crate::Device::migratability`].
    fn migratability(&self) -> Migratability;

    /// What [`VirtioDevice::save`] writes; `None` when it cannot be saved at all.
    fn state_format(&self) -> Option<StateFormat>;

    /// State beyond what the transport keeps. Called while inactive.
    ///
    /// # Errors
    /// [`SaveError`] when the device cannot be saved.
    fn save(&self) -> Result<DeviceState, SaveError>;

    /// Takes over a saved state, untrusted. Called while inactive.
    ///
    /// # Errors
    /// [`RestoreError`] names the field at fault.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;
}
