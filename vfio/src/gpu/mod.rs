//! GPUs of a host and the partitions that can be made of them.
//!
//! Nothing is asked of a driver but what it shows in `/sys`, and nothing is changed. What cannot be
//! known that way, or cannot be read, is `None`.
//!
//! The nouns:
//! - a [`Gpu`] is a physical function with the class of a display or a processing accelerator;
//! - a [`Partition`] is what a VM can be given of it: a virtual function, or a mediated device;
//! - a *provider* is the driver that makes partitions, and the files by which it does.
//!
//! | module | what is in it |
//! |---|---|
//! | `tree` | `/sys`, or a copy of one |
//! | `inventory` | the GPUs of a host: [`inventory()`] |
//! | `status` | whether a GPU can be assigned, partitioned, or why not |
//! | `provider` | one per way of partitioning |
//! | `compare` | whether hosts have the same GPUs: [`compare()`] |

mod compare;
mod inventory;
mod provider;
mod status;
mod tree;

pub use compare::{Found, Mismatch, compare};
pub use inventory::{Gpu, Partition, PartitionState, PciId, inventory};
pub use status::Status;
pub use tree::{SysfsTree, TreeError};
