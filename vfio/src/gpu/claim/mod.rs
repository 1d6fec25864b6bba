//! Who has which partition of which GPU.
//!
//! A claim is a lock on a file in a folder of the host, and is gone with its process, however that
//! ends. What the file says is for people, and for the next to clean up; it makes no one an owner.
//!
//! | module | what is in it |
//! |---|---|
//! | `folder` | the folder, its files and locks |
//! | `request` | what a VM asks for |
//! | `view` | what there is on a host, and who has it |
//! | `choose` | which partition a VM is given, or why none |
//! | `acquire` | claiming it |
//! | `partition` | a claimed one, and its end |

mod acquire;
mod choose;
mod folder;
mod partition;
mod request;
mod view;

pub use folder::{CLAIMS_DIR, CLAIMS_VARIABLE, ClaimError, Claims, Owner};
pub use partition::ClaimedPartition;
pub use request::GpuRequest;

pub(super) use folder::{Allocation, Owners};
pub(super) use view::Occupants;
