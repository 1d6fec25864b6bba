//! Adapters: the machine's parts as the migration engine's ports.

mod kvm_log;
mod page_store;
mod write_log;

pub use kvm_log::{KvmLogTracker, UnionTracker};
pub use page_store::RamPages;
pub use write_log::WriteLogTracker;
