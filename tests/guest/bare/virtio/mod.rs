//! Virtio devices over PCI.

pub(crate) mod disk;
pub(crate) mod hal;
pub(crate) mod nic;
pub(crate) mod transport;
