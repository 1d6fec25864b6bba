//! Wire structure of the network device.

use serde::{Deserialize, Serialize};

/// What the network device keeps beyond its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV1 {
    /// The address in configuration space; the driver may have changed it.
    pub mac: [u8; 6],
    /// MTU told to the driver; the restoring side must tell the same.
    pub mtu: Option<u16>,
    /// The driver has been asked to announce itself and has not answered yet.
    pub announce: bool,
    /// Queue pairs in use, at least 1.
    pub active_pairs: u16,
    /// Offloads that the driver has chosen at run time, as feature bits; `None`: those that it
    /// negotiated.
    pub offloads: Option<u64>,
}
