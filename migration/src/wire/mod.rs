//! The wire format, byte by byte as docs/wire-format.md has it.
//!
//! A connection carries frames. A frame is a [`FrameHeader`] and a payload; a frame of pages is
//! followed by the bytes of its raw pages, which are in no payload so that they can go straight
//! from one guest memory to the other.
//!
//! | module | what is in it |
//! |---|---|
//! | [`frame`] | headers, their check sums, reading and writing frames |
//! | [`message`] | the messages of the control connection |
//! | [`batch`] | the table of a frame of pages |

pub mod batch;
pub mod frame;
pub mod message;

pub use batch::{Batch, BatchRun, PageKind};
pub use frame::{FrameError, FrameHeader, FrameKind, FrameReader};
pub use message::Message;

/// Newest protocol version that this build speaks.
pub const VERSION: u16 = 1;

/// Oldest protocol version that this build speaks: always the one before the newest, once there
/// is one.
pub const OLDEST_VERSION: u16 = 1;
