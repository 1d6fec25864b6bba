//! The side that takes a machine over.
//!
//! [`receive`] answers the handshake, has the machine built, takes pages on a thread per data
//! connection, then device states, and drives its half of the hand-off. Everything that comes is
//! checked; nothing is allocated beyond what was agreed on.
//!
//! | module | what is in it |
//! |---|---|
//! | [`options`] | limits, and what can go wrong |
//! | `receive` | a migration from beginning to end |
//! | `control` | the control connection |
//! | `attach` | which connections are this migration's |
//! | `transfer`, `stream` | the data connections' threads |
//! | `devices` | device states that come as streams |
//! | `mend` | data connections that take the place of others that broke |
//! | `missing` | post-copy: memory while pages are missing |
//! | `pull` | post-copy: pages that come after the machine has started |
//! | `postcopy` | the machine runs before all of its pages are here |
//! | `relink` | post-copy: a new link after the first was cut |
//! | `takeover` | device states and the hand-off |

mod attach;
mod control;
mod devices;
mod mend;
mod missing;
pub mod options;
mod postcopy;
mod pull;
mod receive;
mod relink;
mod stream;
mod takeover;
mod transfer;

pub use options::{DestinationError, DestinationOptions, Received};
pub use receive::receive;
