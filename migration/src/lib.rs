//! The live-migration engine's view of a virtual machine: pages, opaque device sections and a byte
//! channel.
//!
//! Not here: virtio, KVM, VFIO, sockets, TLS. What moves and how it is read comes through *ports*
//! that the `vmm` crate implements, so that the engine runs in tests over fakes and a pipe.
//!
//! The nouns:
//! - a [`PageIndex`] numbers 4 KiB pages of guest memory, a [`PageRun`] is several in a row;
//! - a [`DirtyBitmap`] says which pages changed, [`DirtyBitmap::runs`] in which order they are sent;
//! - a [`Section`] is one device's saved state, opaque here;
//! - *to harvest* is to read and clear dirty bits in one step.
//!
//! | module | what is in it |
//! |---|---|
//! | [`source`], [`destination`] | a migration from beginning to end, on either side |
//! | [`snapshot`] | a machine at one moment, in files |
//! | [`convergence`] | whether another round is worth it |
//! | [`handoff`] | which copy lives, as two state machines |
//! | [`codec`] | pages made fewer bytes, and back |
//! | [`wire`] | frames and messages |
//! | [`progress`] | what others see of a migration, and may change |
//! | [`page`], [`bitmap`], [`section`] | page numbers and runs, dirty pages, device states |
//! | [`ports`] | what the engine needs of a machine, its memory and a connection |
#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

pub mod bitmap;
pub mod codec;
pub mod convergence;
pub mod destination;
pub mod handoff;
pub mod page;
pub mod ports;
pub mod progress;
pub mod section;
pub mod snapshot;
pub mod source;
pub mod wire;
mod words;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use bitmap::DirtyBitmap;
pub use page::{PAGE_BYTES, PageIndex, PageRun};
pub use section::Section;
