//! Wire structure of the socket device.

use serde::{Deserialize, Serialize};

/// What the socket device keeps beyond its queues: **not** its connections, whose host ends are
/// streams of the old process. The restored device tells the driver
/// (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, section 5.10.6.7), which drops them; sockets that listen
/// in the guest go on listening.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockStateV1 {
    /// Context id that the driver has read. It may differ on the restoring side: after the event
    /// the driver reads it again.
    pub guest_cid: u64,
}
