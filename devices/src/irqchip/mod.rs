//! The interrupt controller that lives in user space: the I/O APIC. Local APICs are KVM's.

mod ioapic;
mod state;

pub(crate) use ioapic::FORMAT;
pub use ioapic::{IOAPIC_BYTES, IOAPIC_PINS, IoApic, IoApicPin};
pub use state::{IoApicEntryV1, IoApicStateV1};
