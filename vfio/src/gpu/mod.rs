//! GPUs of a host and the partitions that can be made of them.
//!
//! Nothing is asked of a driver but what it shows in `/sys`. What cannot be known that way, or cannot be
//! read, is `None`.
//!
//! The nouns:
//! - a [`Gpu`] is a physical function with the class of a display or a processing accelerator, or another
//!   device that makes mediated devices with a display;
//! - a [`Partition`] is what a VM can be given of it: a virtual function, or a mediated device;
//! - a *claim* is a VM's lock on one, or on all of a GPU;
//! - a *provider* is the driver that makes partitions, and the files by which it does.
//!
//! | module | what is in it |
//! |---|---|
//! | `tree` | `/sys`, or a copy of one |
//! | `inventory` | the GPUs of a host: [`inventory()`] |
//! | `status` | whether a GPU can be assigned, partitioned, or why not |
//! | `provider` | one per way of partitioning |
//! | `offer` | what a VM can be given, and how it becomes that |
//! | `claim` | who has what: [`Claims`] |
//! | `divide` | making partitions: [`Partitioner`] |
//! | `holders` | processes that have devices open |
//! | `change` | writing what drivers read |
//! | `address` | addresses of partitions |
//! | `driver` | the driver behind a device that a VM has: [`HostDriver`] |
//! | `compare` | whether hosts have the same GPUs: [`compare()`] |

mod address;
mod change;
mod claim;
mod compare;
mod divide;
mod driver;
mod holders;
mod inventory;
mod offer;
mod provider;
mod status;
mod tree;

pub use crate::Bdf;
pub use address::{GpuAddress, InvalidGpuAddress, ParentName};
pub use change::ChangeError;
pub use claim::{
    CLAIMS_DIR, CLAIMS_VARIABLE, ClaimError, ClaimedDevice, ClaimedPartition, Claims, GpuRequest,
    Owner,
};
pub use compare::{Found, Mismatch, compare};
pub use divide::{
    Counts, Divided, Division, PartitionError, Partitioner, Restored, SETTINGS_FILE, Setting,
    Settings, SettingsError, SettingsLock, StepError,
};
pub use driver::HostDriver;
pub use inventory::{Gpu, Partition, PartitionState, PciId, inventory, inventory_with};
pub use offer::Attachment;
pub use status::Status;
pub use tree::{SysfsTree, TreeError};
