//! Adapters: the machine's parts as the migration engine's ports; requests, reports.
//!
//! | file | what is in it |
//! |---|---|
//! | `page_store` | guest RAM by pages |
//! | `device_stream` | states of assigned devices, and what these write to memory |
//! | `kvm_log`, `write_log`, `server_log` | who has written to it |
//! | `skeleton` | what a destination needs to build the machine |
//! | `states` | versions of the states that will come, and whether this build reads them |
//! | `session` | a migration's thread on the source |
//! | `detach` | assigned devices that the guest lets go before |
//! | `dialer` | its connections, over several ways |
//! | `report`, `check` | what operators ask for and are told |

mod check;
mod detach;
mod device_stream;
mod dialer;
mod kvm_log;
mod lazy_ram;
mod page_store;
mod report;
mod server_log;
mod session;
mod skeleton;
mod snapshot;
mod states;
mod write_log;

pub use check::MigrationCheck;
pub(crate) use device_stream::sinks;
pub use kvm_log::{KvmLogTracker, UnionTracker};
pub(crate) use lazy_ram::LazyRam;
pub use migration::progress;
pub use migration::source::{EncodingChoice, OnTimeout};
pub use page_store::RamPages;
pub use report::{
    Bottleneck, MAX_STREAMS, MigrationOutcome, MigrationReport, MigrationRequest, MigrationStatus,
    MigrationTuning, default_max_downtime_us, default_timeout_ms,
};
pub use server_log::ServerLogTracker;
pub(crate) use session::Session;
pub use skeleton::{AssignedPart, Skeleton};
pub use snapshot::DeviceReadError;
pub(crate) use snapshot::{
    LazyMemory, Opened as OpenedSnapshot, SnapshotDevice, SnapshotMemory, SnapshotSession,
    open as open_snapshot,
};
pub use snapshot::{SnapshotError, SnapshotReadError, SnapshotReport, SnapshotRequest};
pub use states::{StateVersion, unreadable};
pub use write_log::WriteLogTracker;
