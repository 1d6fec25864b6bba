//! What the two sides tell each other, and the words that they share.

use std::fmt;

use serde::{Deserialize, Serialize};

/// When the destination begins to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// When it has every page.
    Precopy,
    /// Before: the source serves what is missing, and neither side is whole until that is done.
    Postcopy,
}

/// What the disk that arbitrates looked like when the source let it go. Whoever takes the disk
/// holds its lock, finds this mark on it and replaces it, or has not taken it: so only one side
/// ever does, also when the other has come and gone meanwhile. Opaque here; anything where no
/// disk can be locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mark(pub u64);

/// A message of the hand-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// Source: everything has been sent; restore it.
    Prepare,
    /// Destination: restored, ready to start.
    Prepared,
    /// Either side: I give up. From the source: it runs on. From the destination: it will never
    /// run this VM.
    Abort(Cause),
    /// Source: I have let go; run it. Never sent twice.
    Commit(Mark),
    /// Destination: it is mine.
    Committed,
    /// Destination: I could not take it over and will never run it.
    Declined(Cause),
    /// Destination, post-copy: every page has come.
    Complete,
}

/// Why a side gave up: goes over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Somebody asked for it.
    Cancelled,
    /// An answer did not come in time.
    Deadline,
    /// The peer sent something that has no place there.
    Protocol,
    /// The source could not let its disks go.
    ReleaseFailed,
    /// The destination could not take over the saved state.
    RestoreFailed,
    /// The destination could not take the disks.
    ClaimFailed,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cancelled => "it was cancelled",
            Self::Deadline => "an answer did not come in time",
            Self::Protocol => "a message came that had no place there",
            Self::ReleaseFailed => "the source could not let go of the disks",
            Self::RestoreFailed => "the destination could not take over the state",
            Self::ClaimFailed => "the destination could not take the disks",
        })
    }
}

/// Why a hand-off failed, as one side sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The connection broke.
    LinkLost,
    /// This side gave up.
    Here(Cause),
    /// The peer gave up.
    Peer(Cause),
    /// Post-copy: an operator no longer waits for the pages that are missing.
    PagesGivenUp,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LinkLost => f.write_str("the connection broke"),
            Self::Here(cause) => write!(f, "{cause}"),
            Self::Peer(cause) => write!(f, "the peer gave up: {cause}"),
            Self::PagesGivenUp => f.write_str("the missing pages were given up"),
        }
    }
}

/// What a side waits for; each has a deadline of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Awaited {
    /// Source: the answer to [`Message::Prepare`].
    Prepared,
    /// Source: the answer to [`Message::Commit`]. Where no disk can be locked, a deadline that passes here
    /// leaves the VM paused: be generous.
    Committed,
    /// Destination: [`Message::Commit`].
    Commit,
    /// Post-copy: a new connection to the same peer, or an operator who gives up. Break the old
    /// one off first: it may only have been silent, and the peer must notice, too. No deadline: the
    /// VM stands still, and that is reported.
    Link,
}

/// An event that answers nothing. A fault of the driver, never of the peer; nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("event {event} cannot come in hand-off state {state}")]
pub struct Impossible {
    /// The state.
    pub state: String,
    /// The event.
    pub event: String,
}

impl Impossible {
    pub(super) fn new(state: &dyn fmt::Debug, event: &dyn fmt::Debug) -> Self {
        Self {
            state: format!("{state:?}"),
            event: format!("{event:?}"),
        }
    }
}
