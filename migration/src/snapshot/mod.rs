//! Snapshots: a machine at one moment, in files.
//!
//! A snapshot is a manifest - what a migration would offer and send as sections, with check sums -
//! and an image of guest memory. It is taken while the machine runs, as a migration is: rounds
//! over memory that changes meanwhile, and a short stand-still for the rest.
//!
//! | module | what is in it |
//! |---|---|
//! | [`devices`] | devices whose states come as streams |
//! | [`image`] | what is written of memory, and where |
//! | [`layout`] | where pages lie in the image |
//! | [`checks`] | check sums of the image, chunk by chunk |
//! | [`manifest`] | the manifest, byte by byte |
//! | [`mod@take`] | from a running machine to image and manifest |

pub mod checks;
pub mod devices;
pub mod image;
pub mod layout;
pub mod manifest;
pub mod take;

pub use checks::{CHUNK_BYTES, CHUNK_PAGES, ChunkChecks, DamagedChunk, PageChecks};
pub use devices::DeviceRecord;
pub use image::Image;
pub use layout::{ImageLayout, LayoutError};
pub use manifest::{DiskRecord, MAX_MANIFEST_BYTES, Manifest, ManifestError};
pub use take::{StandStill, TakeError, TakeOptions, Taken, take};
