//! Entropy device (virtio 1.2 section 5.4).
//!
//! The guest offers buffers, the device fills them from an [`Entropy`] source. A source that fails
//! stops the device; nothing that is not random is ever passed off as random.

mod device;
mod entropy;
mod state;
mod worker;

pub(crate) use device::FORMAT;
pub use device::{Rng, RngCounters, RngOptions};
pub use entropy::Entropy;
pub use state::RngStateV1;

#[cfg(test)]
mod tests;
