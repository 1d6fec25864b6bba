//! Guest-physical memory: where things lie, and the host memory behind RAM.

mod backing;
mod discard;
mod holes;
mod layout;
mod ram;
mod transfer;
mod userfault;

pub use backing::{HugePages, check_huge_tmpfs};
pub use discard::RamDiscard;
pub use holes::{DataMap, data_ranges};
pub(crate) use layout::{
    ECAM_BASE, ECAM_BYTES, IOAPIC_BASE, KVM_IDENTITY_MAP_BASE, KVM_TSS_BASE, LOCAL_APIC_BASE,
};
pub use layout::{Layout, LayoutError, RamRange};
pub use ram::{MemoryError, RamOptions, allocate};
pub use transfer::{receive_pages, send_pages};
pub use userfault::{Userfault, UserfaultError, check_userfault};
