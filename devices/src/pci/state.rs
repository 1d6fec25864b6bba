//! Wire structures of PCI state, embedded in the states of the devices that own a function.

use serde::{Deserialize, Serialize};

/// Configuration registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigStateV1 {
    /// The 256 bytes, reduced to the bits that a guest can write.
    pub writable_bytes: Vec<u8>,
    /// BARs in the function's order.
    pub bars: Vec<BarStateV1>,
}

/// One BAR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BarStateV1 {
    /// First register, 0 to 5.
    pub index: u8,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Programmed address.
    pub address: u64,
}

/// MSI-X table and control.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixStateV1 {
    /// Message control: bit 15 enable, bit 14 function mask.
    pub control: u16,
    /// Table entries: address, data, vector control.
    pub entries: Vec<(u64, u32, u32)>,
    /// Vectors that were raised while masked.
    pub pending: Vec<u16>,
}
