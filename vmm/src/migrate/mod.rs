//! Adapters: the machine's parts as the migration engine's ports.

mod page_store;
mod write_log;

pub use page_store::RamPages;
pub use write_log::WriteLogTracker;
