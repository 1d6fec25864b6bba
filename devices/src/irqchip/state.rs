//! Wire structures of the I/O APIC.

use serde::{Deserialize, Serialize};

/// Registers of the I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicStateV1 {
    /// Selected register.
    pub select: u8,
    /// APIC id register, bits 27:24.
    pub id: u32,
    /// Redirection table.
    pub entries: Vec<IoApicEntryV1>,
}

/// One pin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicEntryV1 {
    /// Redirection entry as the guest reads it, remote IRR included.
    pub redirection: u64,
    /// Whether the input is high.
    pub level: bool,
}
