//! What is asked of a migration, and what came of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::pace::Pace;
use crate::handoff::{Outcome, Reason};
use crate::ports::PortError;
use crate::progress::{Blackout, PageMix, Postcopy, RoundReport};
use crate::wire::FrameError;

/// How pages that are not zero travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub enum EncodingChoice {
    /// As link and CPU suggest, batch by batch.
    #[default]
    Auto,
    /// As they are.
    Raw,
    /// Compressed.
    Lz4,
    /// As changes where the old version is known, compressed otherwise.
    Delta,
}

/// What happens when a migration does not come to its end in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub enum OnTimeout {
    /// It is given up; the VM runs on.
    #[default]
    Cancel,
    /// The VM is stopped, however long the rest takes.
    Force,
    /// The VM goes on at the destination, which fetches the rest.
    Postcopy,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceOptions {
    /// Data connections, at least 1.
    pub streams: u16,
    /// How pages travel.
    pub encoding: EncodingChoice,
    /// Memory for pages sent before, for deltas.
    pub cache_bytes: u64,
    /// How long pre-copy may take.
    pub timeout: Duration,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// How long the peer may be silent.
    pub patience: Duration,
    /// The same while it builds the machine, for which it may have to find all of its memory.
    pub prepare_patience: Duration,
    /// How long after a post-copy was cut, and after an attempt to connect again, the next one is
    /// made.
    pub retry: Duration,
}

/// A migration did not take place. The VM runs on, unless the report's outcome says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Devices that cannot be moved.
    #[error("the VM cannot be moved: {}", .0.join("; "))]
    Blocked(Vec<String>),
    /// The destination cannot take the VM.
    #[error("the destination refuses: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// The destination has given up.
    #[error("the destination has given up: {0}")]
    Peer(String),
    /// The destination speaks other versions.
    #[error(
        "the destination speaks version {found} of the protocol, this build {oldest} to {newest}"
    )]
    Version {
        /// Its choice.
        found: u16,
        /// Ours.
        oldest: u16,
        /// Ours.
        newest: u16,
    },
    /// The destination's build does not take them.
    #[error(
        "the destination's build is older than this one and does not know of devices whose state comes as a \
         stream: {}", .0.join(", ")
    )]
    DevicesUnknown(Vec<String>),
    /// The destination's build cannot be asked without beginning a migration.
    #[error(
        "the destination's build is older than this one and does not know of checks; it was asked for nothing"
    )]
    ChecksUnknown,
    /// The peer answers something else than was asked.
    #[error("the destination answers with {0}, which has no place here")]
    Unexpected(String),
    /// A connection.
    #[error("connection to the destination")]
    Link(#[from] FrameError),
    /// A further connection.
    #[error("data connection {index} to the destination")]
    Dial {
        /// Its number.
        index: u16,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// This host.
    #[error(transparent)]
    Port(#[from] PortError),
    /// Somebody asked for it.
    #[error("it was cancelled")]
    Cancelled,
    /// The time was up.
    #[error(
        "it did not converge within {} s: the guest changes memory faster than it can be sent; a larger \
         --max-downtime, more bandwidth, --on-timeout force or postcopy help", .0.as_secs_f64()
    )]
    Timeout(Duration),
    /// The time was up before the guest's writes could matter.
    #[error("memory could not be sent once within {} s: {pace}; a longer --timeout, more bandwidth or \
         --on-timeout postcopy help", .timeout.as_secs_f64())]
    FirstRound {
        /// What was asked for.
        timeout: Duration,
        /// How far it came.
        pace: Pace,
    },
    /// What answers is something else.
    #[error(
        "what answers there is not Drover: its first words are none of Drover's migration protocol; is \
         `drover receive` at that address?"
    )]
    NotDrover(#[source] FrameError),
    /// The destination is too far away.
    #[error(
        "a downtime of {} ms cannot be kept: an answer of the destination takes {} ms, and the VM stands \
         still for two of them; a larger --max-downtime helps",
        .max_downtime.as_secs_f64() * 1e3, .round_trip.as_micros() as f64 / 1e3
    )]
    Distance {
        /// What was asked for.
        max_downtime: Duration,
        /// The link's delay, there and back.
        round_trip: Duration,
    },
    /// The machine's state takes too long.
    #[error(
        "a downtime of {} ms cannot be kept: stopping the VM, and saving and restoring the state of its vCPUs and \
         devices, takes some {} ms on these CPUs; a larger --max-downtime helps",
        .max_downtime.as_secs_f64() * 1e3, .needed.as_micros() as f64 / 1e3
    )]
    State {
        /// What was asked for.
        max_downtime: Duration,
        /// What is expected.
        needed: Duration,
    },
    /// A device does not do as it is told.
    #[error("the state of {id}")]
    Device {
        /// The device.
        id: String,
        /// Its words.
        #[source]
        source: PortError,
    },
    /// A device's state takes too long, and does not get less.
    #[error(
        "a downtime of {} ms cannot be kept: the state of {id} has {bytes} bytes to be sent once the VM is \
         stopped; over connections that carry {} MB/s the state of all devices takes some {} ms; a larger \
         --max-downtime, more bandwidth or --on-timeout force help",
        .max_downtime.as_secs_f64() * 1e3, .bytes_per_s / 1_000_000, .needed.as_millis()
    )]
    DeviceTooLarge {
        /// What was asked for.
        max_downtime: Duration,
        /// What is expected, for all devices.
        needed: Duration,
        /// What the connections carry.
        bytes_per_s: u64,
        /// The device with most state.
        id: String,
        /// How much that is.
        bytes: u64,
    },
    /// A device has to send more of its state before it can be stopped.
    #[error(
        "{id} was not ready to be stopped within {} s: {bytes} bytes of its state are to be sent first; a longer \
         --timeout, more bandwidth or --on-timeout force help", .timeout.as_secs_f64()
    )]
    DeviceNotReady {
        /// What was asked for.
        timeout: Duration,
        /// The device that has most left.
        id: String,
        /// How much that is.
        bytes: u64,
    },
    /// A connection broke, and with it state that cannot be read again.
    #[error(
        "data connection {index} broke after it had carried device state, which cannot be read a second time"
    )]
    DeviceCut {
        /// Its number.
        index: u64,
        /// How it broke.
        #[source]
        source: FrameError,
    },
    /// A post-copy was cut, and somebody has ended the wait for a new link.
    #[error("its missing pages were given up here: it cannot go on at its destination")]
    PagesGivenUp,
    /// The disks could not be let go.
    #[error("the hand-off failed")]
    Release(#[source] PortError),
    /// The hand-off failed.
    #[error("the hand-off failed: {0}")]
    Handoff(Reason),
}

impl From<std::io::Error> for SourceError {
    fn from(error: std::io::Error) -> Self {
        Self::Link(error.into())
    }
}

/// What came of a migration.
#[derive(Debug)]
pub struct SourceReport {
    /// What became of this copy of the VM.
    pub outcome: Outcome,
    /// Why it did not take place; `None` when it did.
    pub error: Option<SourceError>,
    /// From the first byte to the destination's last word.
    pub total: Duration,
    /// What was expected when the VM was stopped.
    pub predicted_blackout: Option<Duration>,
    /// How long it stood still, part by part; `None` when it did not.
    pub blackout: Option<Blackout>,
    /// What came afterwards; without pages when a post-copy was asked for and nothing was left for
    /// it, `None` when it was not asked for.
    pub postcopy: Option<Postcopy>,
    /// The rounds before that.
    pub rounds: Vec<RoundReport>,
    /// All pages.
    pub pages: PageMix,
    /// All bytes written.
    pub wire_bytes: u64,
    /// Data connections.
    pub streams: u16,
    /// Of that, device states that come as streams.
    pub device_bytes: u64,
    /// Share of the batches in percent, of up to 64 pages each, that met a data connection without room.
    pub congested_percent: u8,
    /// Most memory that held pages sent before.
    pub cache_bytes: u64,
}
