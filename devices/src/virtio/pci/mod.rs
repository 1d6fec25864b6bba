//! The modern PCI transport (virtio 1.2 section 4.1), MSI-X only.

mod capabilities;
mod common;
mod transport;

pub(crate) use transport::FORMAT;
pub use transport::{VirtioPci, VirtioPciError};
