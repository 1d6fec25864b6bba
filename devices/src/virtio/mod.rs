//! Virtio 1.2 devices over the modern PCI transport.
//!
//! The transport ([`VirtioPci`]) owns status, features, queues and MSI-X, and saves them once for
//! all devices. A [`VirtioDevice`] is what remains: identity, configuration, and the work on its
//! queues, which it is lent between `activate` and `deactivate` and gives back each time.
//!
//! A device works on threads of its own ([`worker::Worker`]). Pausing ends them and returns the
//! queues, so that a paused device has no thread that could still touch guest memory, and saving
//! reads plain data.

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod console;
mod device;
mod interrupt;
pub mod net;
mod pci;
mod queue;
pub mod rng;
mod state;

pub mod vhost_user;
pub mod vsock;
pub mod worker;

pub use device::{
    Activation, ActivationError, DeviceIdentity, DeviceType, RING_FEATURES, VirtioDevice,
};
pub use interrupt::{QueueInterrupt, VirtioInterrupt};
pub(crate) use pci::FORMAT;
pub use pci::{VirtioPci, VirtioPciError};
pub use queue::{Chain, QueueError, Segment, Segments, Virtqueue};
pub use state::{QueueStateV1, VirtioPciStateV1};
