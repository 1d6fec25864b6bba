//! One module per target; each has `run` and `seeds`.

pub mod api;
pub mod assigned;
pub mod config;
pub mod gpu;
pub mod ioapic;
pub mod kernel;
mod kernel_seeds;
pub mod keyvalue;
pub mod msix;
pub mod pci;
pub mod platform;
pub mod qcow2;
pub mod restore;
pub mod serial;
pub mod snapshot;
pub mod vfio_user;
pub mod vhost_user;
pub mod virtio_balloon;
pub mod virtio_block;
pub mod virtio_console;
pub mod virtio_net;
pub mod virtio_pci;
pub mod virtio_rng;
pub mod virtio_vsock;
pub mod wire_frames;
pub mod wire_pages;
pub mod wire_peer;
