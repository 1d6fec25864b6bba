//! qcow2 images, read and written through the imago crate on the image's thread pool.
//!
//! What is accepted is narrower than what exists, and never guessed:
//! - the header is checked here first ([`header`]): features that imago lacks, tables that cannot
//!   be, and the dirty and corrupt marks each have their own message;
//! - backing files ([`chain`]) must have their format recorded, be ordinary files, and lie in
//!   the image's own directory (or below) or in the one that the configuration names; they are
//!   opened read-only, at most [`chain::MAX_DEPTH`] of them;
//! - external data files and encryption are refused.
//!
//! The image's metadata is in memory only while a queue is open: a paused VM has everything in
//! the file, so that another process can take it over.

mod backend;
mod chain;
mod error;
mod header;
mod image;
mod refcounts;
mod storage;

pub use error::Qcow2Error;

pub(super) use backend::Qcow2Backend;
pub(super) use chain::Chain;

#[cfg(test)]
mod tests;
