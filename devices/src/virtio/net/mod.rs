//! Network device (virtio 1.2 section 5.1).
//!
//! Packets travel between guest buffers and the host without a copy in between: the virtio
//! header before each packet is the header that a TAP interface takes and gives, and the host
//! end ([`NetBackend`]) moves both straight to and from guest memory. Offloads are therefore
//! agreed upon between guest and host kernel; the device passes them on and looks at no packet.
//!
//! Each queue pair has a thread for both directions; the first also answers the control queue.
//! A receive queue without buffers stops watching the host end until the driver rings its
//! doorbell; a packet that the host end cannot take at once waits until it can, and one that
//! it refuses is dropped and counted.
//!
//! | module | what is in it |
//! |---|---|
//! | `backend` | the port to the host end |
//! | `config` | configuration space, features, queue numbers |
//! | `control` | commands of the control queue |
//! | `counters` | what operators see |
//! | `device` | the device, its threads and its state |
//! | `receive`, `transmit` | the two directions of a queue pair |
//! | `shared` | what a device's threads share |
//! | `throttle` | one direction's rate limit |
//! | `used` | a used ring written in batches |
//! | `worker` | the thread of a queue pair |

mod backend;
mod config;
mod control;
mod counters;
mod device;
mod receive;
mod shared;
mod state;
mod throttle;
mod transmit;
mod used;
mod worker;

pub use backend::{HEADER_BYTES, MAX_PACKET_BYTES, NetBackend, NetInfo, NetQueue, Offloads};
pub(super) use control::is_unicast;
pub use counters::{DirectionCounters, NetCounters};
pub(crate) use device::FORMAT;
pub use device::{Net, NetOptions};
pub use shared::{Announcement, NetHandle};
pub use state::NetStateV1;

#[cfg(test)]
mod tests;
