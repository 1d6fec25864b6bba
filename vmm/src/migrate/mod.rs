//! Adapters: the machine's parts as the migration engine's ports.

mod kvm_log;
mod page_store;
mod report;
mod session;
mod skeleton;
mod write_log;

pub use kvm_log::{KvmLogTracker, UnionTracker};
pub use migration::progress;
pub use migration::source::{EncodingChoice, OnTimeout};
pub use page_store::RamPages;
pub use report::{
    Bottleneck, MigrationOutcome, MigrationReport, MigrationRequest, MigrationStatus,
    MigrationTuning, default_max_downtime_us, default_timeout_s,
};
pub(crate) use session::Session;
pub use skeleton::Skeleton;
pub use write_log::WriteLogTracker;
