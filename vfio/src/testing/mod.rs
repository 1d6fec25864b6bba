//! A backend in plain memory, and what every backend must do.
//!
//! - [`ModelBackend`]: a function with two BARs and every kind of interrupt.
//! - [`ModelMigration`]: its migration interface, if it is to have one.
//! - [`Subject`]: the conformance suite over any backend.

mod conformance;
mod model;
mod moving;

pub use conformance::{Memory, Raise, Subject};
pub use model::{ModelBackend, shared_page};
pub use moving::ModelMigration;
