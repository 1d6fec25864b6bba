//! Memory balloon (virtio 1.2 section 5.5).
//!
//! The guest gives pages back to the host: those that the operator's target asks for (inflate,
//! deflate), and, with free page reporting, those that it happens not to use. Freeing them is
//! behind [`RamReclaim`]. [`BalloonHandle`] sets the target at run time and shows what the guest
//! says about its memory.

mod config;
mod device;
mod handle;
mod pages;
mod reclaim;
mod state;
mod stats;
mod worker;

pub(crate) use device::FORMAT;
pub use device::{Balloon, BalloonCounters, BalloonError, BalloonOptions};
pub use handle::{BalloonHandle, TargetError};
pub use reclaim::RamReclaim;
pub use state::BalloonStateV1;
pub use stats::{BalloonStats, StatsSample};

/// The balloon counts in pages of this size, whatever the guest and the host use (section 5.5.6).
const PAGE_BYTES: u64 = 4096;

#[cfg(test)]
mod tests;
