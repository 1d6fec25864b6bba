//! Who has which partition of which GPU.
//!
//! A claim is a lock on a file in a folder of the host, and is gone with its process, however that
//! ends. What the file says is for people, and for the next to clean up; it makes no one an owner.
//!
//! | module | what is in it |
//! |---|---|
//! | `folder` | the folder, its files and locks |
//! | `record` | what a claim's file says |
//! | `allocation` | looking at claims, making some, and cleaning up |
//! | `request` | what a VM asks for |
//! | `view` | what there is on a host, and who has it |
//! | `choose` | which partition a VM is given, or why none |
//! | `acquire` | claiming it |
//! | `device` | claiming a device that was named, as it is |
//! | `partition` | a claimed one, and its end |

mod acquire;
mod allocation;
mod choose;
mod device;
mod error;
mod folder;
mod partition;
mod record;
mod request;
mod view;

pub use device::ClaimedDevice;
pub use error::ClaimError;
pub use folder::{CLAIMS_DIR, CLAIMS_VARIABLE, Claims};
pub use partition::ClaimedPartition;
pub use record::Owner;
pub use request::GpuRequest;

pub(super) use allocation::{Allocation, Owners};
pub(super) use view::Occupants;
