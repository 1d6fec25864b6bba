//! Wire structure of the console.

use serde::{Deserialize, Serialize};

/// What the console keeps beyond its queues. Output that the host has not taken belongs to the
/// host side and does not move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleStateV1 {
    /// Columns that the driver was told last.
    pub columns: u16,
    /// Rows that the driver was told last.
    pub rows: u16,
    /// Input that the guest has not taken.
    pub input: Vec<u8>,
    /// Bytes of the next chain of the transmit queue that have been sent already.
    pub transmitted: u64,
}
