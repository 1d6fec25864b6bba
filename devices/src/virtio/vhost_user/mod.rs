//! Block, network and file system devices that another process works on (vhost-user protocol,
//! QEMU's `docs/interop/vhost-user.rst`).
//!
//! The other process, the *peer*, maps guest memory, takes buffers from the rings and raises the
//! queues' interrupts through their event descriptors. What stays here: identity, features and
//! configuration space, when the peer starts and stops, and what happens when it is gone.
//!
//! A peer that goes away while the device runs costs the guest this device, not its life: the
//! device asks to be reset and [`crate::events::DeviceEvent::BackendLost`] is reported. The next
//! reset by the driver (a reboot of the guest, or its driver being loaded anew) connects again,
//! and so does a VM that is resumed after its peer went away while it was paused. Requests that
//! were in flight when a peer died are lost: the protocol's in-flight log is not used.
//!
//! A device moves to another process with what its driver knows and how far its queues are; the peer
//! there goes on. Meanwhile the peer marks what it writes in a [`PeerLog`].
//!
//! What a peer does of its own accord is limited to the rings: changes of its configuration
//! (a grown disk) are seen after the next connection.

mod block;
mod config;
mod counters;
mod device;
mod fs;
mod handle;
mod kind;
mod net;
mod peer;
mod rings;
mod state;
mod watch;

pub use block::VhostUserBlockOptions;
pub use counters::VhostUserCounters;
pub use device::VhostUser;
pub use fs::{MAX_TAG_BYTES, VhostUserFsOptions};
pub use handle::{PeerLog, VhostUserHandle};
pub use kind::UnfitPeer;
pub use net::VhostUserNetOptions;
pub use peer::{PeerError, PeerOffer, PeerQueue, VhostUserPeer};
pub(crate) use state::FORMAT;
pub use state::VhostUserStateV1;

#[cfg(test)]
mod tests;
