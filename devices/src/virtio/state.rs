//! Wire structures of the virtio PCI transport.

use serde::{Deserialize, Serialize};

use crate::pci::{ConfigStateV1, MsixStateV1};
use crate::state::DeviceState;

/// A virtio PCI function, its transport and its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciStateV1 {
    /// Configuration space.
    pub config: ConfigStateV1,
    /// MSI-X table.
    pub msix: MsixStateV1,
    /// `device_status`.
    pub status: u8,
    /// `device_feature_select`.
    pub device_feature_select: u32,
    /// `driver_feature_select`.
    pub driver_feature_select: u32,
    /// Features the driver has written.
    pub driver_features: u64,
    /// `queue_select`.
    pub queue_select: u16,
    /// `config_msix_vector`.
    pub config_vector: u16,
    /// `config_generation`.
    pub config_generation: u8,
    /// ISR status.
    pub isr: u8,
    /// The device waits for a reset.
    pub needs_reset: bool,
    /// All queues, enabled or not.
    pub queues: Vec<QueueStateV1>,
    /// What the device itself keeps.
    pub device: DeviceState,
}

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStateV1 {
    /// Entries chosen by the driver.
    pub size: u16,
    /// `queue_enable`.
    pub enabled: bool,
    /// MSI-X vector.
    pub vector: u16,
    /// Descriptor table address.
    pub desc_table: u64,
    /// Available ring address.
    pub avail_ring: u64,
    /// Used ring address.
    pub used_ring: u64,
    /// Next position in the available ring.
    pub next_avail: u16,
    /// Next position in the used ring.
    pub next_used: u16,
}
