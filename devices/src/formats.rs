//! Every kind of state that devices of this build write and read.

use crate::state::StateFormat;
use crate::{acpi, irqchip, legacy, pci, virtio};

/// What [`crate::Device::state_formats`] can tell, each kind once: what a peer or a snapshot may
/// bring. A kind that is missing here is not accepted.
pub const FORMATS: [StateFormat; 13] = [
    acpi::FORMAT,
    irqchip::FORMAT,
    legacy::CMOS_FORMAT,
    legacy::SERIAL_FORMAT,
    pci::HOST_BRIDGE_FORMAT,
    virtio::FORMAT,
    virtio::balloon::FORMAT,
    virtio::block::FORMAT,
    virtio::console::FORMAT,
    virtio::net::FORMAT,
    virtio::rng::FORMAT,
    virtio::vhost_user::FORMAT,
    virtio::vsock::FORMAT,
];
