//! Wire structure of the block device.

use serde::{Deserialize, Serialize};

/// What the block device keeps beyond its queues. The image moves on its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStateV1 {
    /// Capacity in 512-byte sectors; the restoring side's image must have the same.
    pub capacity_sectors: u64,
    /// Block size that the guest has seen; the restoring side's image must have the same.
    pub block_bytes: u32,
    /// Whether the image is read-only.
    pub read_only: bool,
    /// Cache mode that the driver has chosen.
    pub writeback: bool,
}
