//! PCI as the guest sees it: one root bus of conventional configuration spaces reached through
//! ECAM and the 0xcf8/0xcfc ports.
//!
//! A function never calls back into the bus: a configuration write returns its [`BarChange`]s and
//! the root applies them after the function's lock is released.

mod address;
mod bar;
mod config;
mod function;
mod host_bridge;
mod msix;
mod placed;
mod root;
mod state;
mod windows;

pub use address::{Bdf, InvalidBdf};
pub use bar::{BarChange, BarKind, BarLocation, BarSpec};
pub use config::{CapabilityId, ConfigSpace, FunctionIdentity};
pub use function::{BarMapping, Doorbell, HostMemory, PciFunction};
pub(crate) use host_bridge::FORMAT as HOST_BRIDGE_FORMAT;
pub use host_bridge::HostBridgeStateV1;
pub use msix::{MSIX_CAP_LEN, Msix, MsixLayout};
pub use root::{BarHooks, DoorbellRegistry, MemorySlots, PciRoot, PciRootError};
pub use state::{BarStateV1, ConfigStateV1, MsixStateV1};
pub use windows::{BarWindows, Window};
