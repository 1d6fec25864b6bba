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
//! | `missing` | lists of pages that the destination does not have |
//! | [`batch`] | the table of a frame of pages |
//! | [`device`] | the table of a frame of device state |
//! | `version` | which version two builds speak |

pub mod batch;
pub mod device;
pub mod frame;
pub mod message;
pub(crate) mod missing;
mod version;

pub use batch::{Batch, BatchRun, PageKind};
pub use frame::{FrameError, FrameHeader, FrameKind, FrameReader};
pub use message::Message;
pub(crate) use version::REOPENED_MAX;
pub use version::{DEVICES_VERSION, NoCommonVersion, OLDEST_VERSION, VERSION, Versions};
