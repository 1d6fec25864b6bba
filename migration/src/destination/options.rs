//! Limits of a destination, and what can go wrong there.

use std::time::Duration;

use crate::codec::DecodeError;
use crate::handoff::{Cause, Reason};
use crate::ports::{Incoming, PortError};
use crate::wire::{FrameError, Versions};

/// How a destination behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationOptions {
    /// Versions of the protocol that it speaks: [`Versions::OURS`], or fewer.
    pub versions: Versions,
    /// Shown by data connections; unguessable.
    pub token: Vec<u8>,
    /// How long the source may be silent.
    pub patience: Duration,
    /// Data connections at most.
    pub max_streams: u16,
    /// How long a source that has not heard that a post-copy is complete may take to connect again
    /// and hear it.
    pub linger: Duration,
}

/// A machine that has come over.
pub struct Received {
    /// The machine; it is this side's.
    pub machine: Box<dyn Incoming>,
    /// Why it does not run, if it does not.
    pub start_error: Option<PortError>,
}

/// No machine has come over; nothing is left of it here.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The connection.
    #[error("connection to the source")]
    Link(#[from] FrameError),
    /// Not a migration, or one that this build does not speak.
    #[error("the source cannot be understood: {0}")]
    Protocol(String),
    /// This host cannot take the machine.
    #[error("the VM cannot run here: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// A data connection.
    #[error("data connection {index}")]
    Stream {
        /// Its number.
        index: u16,
        /// What went wrong.
        #[source]
        source: DecodeError,
    },
    /// Data connections did not come.
    #[error("the source has opened {found} of {expected} data connections")]
    Attach {
        /// Those that came.
        found: u16,
        /// Those announced.
        expected: u16,
        /// What the last wait ended with.
        #[source]
        source: std::io::Error,
    },
    /// A device does not take its state.
    #[error("the state of {id}")]
    Device {
        /// The device.
        id: String,
        /// Its words.
        #[source]
        source: PortError,
    },
    /// The machine does not take its state.
    #[error("the VM's state cannot be taken over")]
    Restore(#[source] PortError),
    /// Its disks cannot be had.
    #[error("the VM's disks cannot be taken over")]
    Claim(#[source] PortError),
    /// The source has given up.
    #[error("the source has given up: {0}")]
    Peer(String),
    /// The hand-off failed.
    #[error("the hand-off failed: {0}")]
    Handoff(Reason),
    /// This host.
    #[error(transparent)]
    Host(#[from] PortError),
    /// Somebody asked for it.
    #[error("it was cancelled")]
    Cancelled,
    /// The source only wanted to know whether the machine could come. What ended that: its word
    /// that it knows enough ([`Peer`](Self::Peer)), or why the machine could not.
    #[error("it was a check")]
    Checked(#[source] Box<DestinationError>),
}

impl From<std::io::Error> for DestinationError {
    fn from(error: std::io::Error) -> Self {
        Self::Link(error.into())
    }
}

impl DestinationError {
    /// As the source is told.
    pub(super) fn cause(&self) -> Cause {
        match self {
            Self::Protocol(_) | Self::Stream { .. } => Cause::Protocol,
            Self::Restore(_) | Self::Refused(_) | Self::Device { .. } => Cause::RestoreFailed,
            Self::Claim(_) => Cause::ClaimFailed,
            _ => Cause::Cancelled,
        }
    }

    /// With its sources, in one line.
    pub(super) fn chain(&self) -> String {
        crate::words::chain(self)
    }
}

/// What ended a data connection's thread.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    /// The connection, pages, or a part of a device's state that has no place there.
    #[error(transparent)]
    Pages(#[from] DecodeError),
    /// A device does not take its state.
    #[error("the state of {id}")]
    Device {
        /// The device.
        id: String,
        /// Its words.
        #[source]
        source: PortError,
    },
}

impl From<FrameError> for StreamError {
    fn from(error: FrameError) -> Self {
        Self::Pages(error.into())
    }
}

impl StreamError {
    /// The connection broke: the rest may come on another.
    pub(super) fn is_broken_link(&self) -> bool {
        matches!(self, Self::Pages(error) if error.is_broken_link())
    }

    /// As an error of the migration; it happened on data connection `index`.
    pub(super) fn on(self, index: u16) -> DestinationError {
        match self {
            Self::Pages(source) => DestinationError::Stream { index, source },
            Self::Device { id, source } => DestinationError::Device { id, source },
        }
    }
}
