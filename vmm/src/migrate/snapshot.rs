//! Snapshots: guest memory and states in a directory, see docs/snapshots.md.
//!
//! | module | what is in it |
//! |---|---|
//! | `directory` | the directory: written beside, put in place at once, read |
//! | `device` | the state of a device, read and checked |
//! | `memory` | the image of guest memory, read and checked |
//! | `lazy` | memory that comes from the image when it is touched |
//! | `session` | the thread that takes a snapshot |

mod device;
mod directory;
mod lazy;
mod memory;
mod session;

use std::path::PathBuf;

use migration::snapshot::StandStill;
use serde::{Deserialize, Serialize};

pub use device::DeviceReadError;
pub(crate) use device::SnapshotDevice;
pub use directory::SnapshotError;
pub(crate) use directory::{Opened, open};
pub(crate) use lazy::LazyMemory;
pub(crate) use memory::SnapshotMemory;
pub use memory::SnapshotReadError;
pub(crate) use session::SnapshotSession;

/// What is asked of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SnapshotRequest {
    /// Where it goes, an absolute path. A snapshot that is there is replaced, in one step.
    #[schema(value_type = String)]
    pub directory: PathBuf,
    /// How long the VM may stand still, in microseconds.
    #[serde(default = "super::default_max_downtime_us")]
    pub max_downtime_us: u64,
}

/// What came of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotReport {
    /// The VM.
    pub name: String,
    /// Where it is.
    #[schema(value_type = String)]
    pub directory: PathBuf,
    /// Why there is none; what was there before is as it was.
    pub error: Option<String>,
    /// The VM could not be resumed; it is paused.
    pub paused: bool,
    /// Milliseconds from the request to the end.
    pub total_ms: u64,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// What was written of it, pages that were written twice included.
    pub written_bytes: u64,
    /// Bytes of the states of assigned devices.
    #[serde(default)]
    pub device_bytes: u64,
    /// Rounds over memory while the VM ran.
    pub rounds: u32,
    /// How long it stood still; absent when there is no snapshot.
    pub stood_still: Option<StandStill>,
}
