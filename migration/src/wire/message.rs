//! Messages of the control connection: one frame each, the payload in CBOR (RFC 8949), but for
//! device states, which are bytes with a short table before them.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::{FrameError, FrameHeader, FrameKind, FrameReader};
use crate::handoff::Cause;
use crate::section::Section;

/// Deepest nesting accepted while decoding.
const MAX_DEPTH: usize = 8;

/// First words of a source, so that a stranger's are told apart.
pub const MAGIC: &str = "drover migration";

/// The source introduces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: String,
    /// Oldest version that the source speaks.
    pub oldest: u16,
    /// Newest version that the source speaks.
    pub newest: u16,
}

/// The destination's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version to speak.
    pub version: u16,
    /// To be shown by data connections of the same migration.
    #[serde(with = "serde_bytes")]
    pub token: Vec<u8>,
    /// Where data connections go, when not to the address of this one.
    pub data_url: Option<String>,
    /// Whether this build knows of [`Offer::check`]. One that does not would take it for the
    /// beginning of a migration.
    #[serde(default, skip_serializing_if = "is_false")]
    pub checks: bool,
}

/// The machine to come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Description of the machine, opaque to the engine.
    #[serde(with = "serde_bytes")]
    pub skeleton: Vec<u8>,
    /// Memory regions: first page and count of 4 KiB pages, ascending.
    pub regions: Vec<(u64, u64)>,
    /// Data connections that the source will open.
    pub streams: u16,
    /// Whether pages may come after the machine has started, see docs/handoff.md. The source then
    /// opens one more data connection, for pages that are needed at once.
    #[serde(default, skip_serializing_if = "is_false")]
    pub postcopy: bool,
    /// Devices whose state comes as a stream, by their ids; a device's number is its place here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// Whether the machine is not to come, but only to be found out whether it could: pages are
    /// thrown away, and an abort is the good end. Said only to a destination that knows of it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub check: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_false(value: &bool) -> bool {
    !value
}

/// The number under which a new control connection attaches itself, when a post-copy was cut.
pub const CONTROL_INDEX: u16 = u16::MAX;

/// First frame of a data connection, and of every connection of a new link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// From [`Welcome::token`].
    #[serde(with = "serde_bytes")]
    pub token: Vec<u8>,
    /// Number of the connection, from 0; [`CONTROL_INDEX`] on a new control connection.
    pub index: u16,
}

/// How far the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Number of the round, from 1.
    pub number: u32,
    /// Pages to send in it.
    pub pages: u64,
}

/// Everything that was sent before a [`Message::Prepare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// Sections sent.
    pub sections: u32,
}

/// What the destination's restore took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// Microseconds.
    pub restore_us: u64,
}

/// Why something will not be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reasons {
    /// For the hand-off.
    pub cause: Cause,
    /// Lines for people.
    pub reasons: Vec<String>,
}

/// Reasons in one message at most, and bytes of each.
const MAX_REASONS: usize = 64;
const MAX_REASON_BYTES: usize = 512;

impl Reasons {
    /// As they are sent and as they are shown: not too many, none too long, and nothing in them
    /// but text, whatever the peer has put there.
    pub(crate) fn tidy(mut self) -> Self {
        let more = self.reasons.len().saturating_sub(MAX_REASONS);
        if more > 0 {
            self.reasons.truncate(MAX_REASONS - 1);
            self.reasons.push(format!("and {} more", more + 1));
        }
        for reason in &mut self.reasons {
            if reason.len() > MAX_REASON_BYTES {
                let end = reason.floor_char_boundary(MAX_REASON_BYTES - "...".len());
                reason.truncate(end);
                reason.push_str("...");
            }
            if reason.contains(char::is_control) {
                *reason = reason.replace(char::is_control, " ");
            }
        }
        self
    }

    /// One reason.
    pub fn one(cause: Cause, reason: impl Into<String>) -> Self {
        Self {
            cause,
            reasons: vec![reason.into()],
        }
    }
}

/// The source has let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// What the disk that arbitrates looks like, see [`crate::handoff::Mark`].
    pub mark: u64,
}

/// Pages that come after the machine has started. Several of these may be sent; at least one is,
/// if there is to be a post-copy. On a new link the destination sends what it has not got, ascending,
/// and ends the list with one of these that is empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// First page and count of each run.
    pub runs: Vec<(u64, u64)>,
}

/// Pages that somebody waits for at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// The first page.
    pub page: u64,
    /// How many, from 1 to [`BATCH_PAGES`](super::batch::BATCH_PAGES).
    pub count: u16,
}

/// What a post-copy was like for the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Complete {
    /// Pages that somebody had to wait for.
    pub faults: u64,
    /// How long that took in all, in microseconds.
    pub waited_us: u64,
    /// How long the longest took, in microseconds.
    pub longest_us: u64,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as the frame kinds of the same names")]
pub enum Message {
    Hello(Hello),
    Welcome(Welcome),
    Offer(Offer),
    Accept,
    Refuse(Reasons),
    Attach(Attach),
    StreamEnd,
    Round(Round),
    Section(Section),
    Prepare(Prepare),
    Prepared(Prepared),
    Abort(Reasons),
    Commit(Commit),
    Committed,
    Declined(Reasons),
    AcceptPostcopy,
    Missing(Missing),
    Fetch(Fetch),
    Complete(Complete),
}

impl Message {
    /// What it is sent as.
    #[must_use]
    pub fn kind(&self) -> FrameKind {
        match self {
            Self::Hello(_) => FrameKind::Hello,
            Self::Welcome(_) => FrameKind::Welcome,
            Self::Offer(_) => FrameKind::Offer,
            Self::Accept => FrameKind::Accept,
            Self::Refuse(_) => FrameKind::Refuse,
            Self::Attach(_) => FrameKind::Attach,
            Self::StreamEnd => FrameKind::StreamEnd,
            Self::Round(_) => FrameKind::Round,
            Self::Section(_) => FrameKind::Section,
            Self::Prepare(_) => FrameKind::Prepare,
            Self::Prepared(_) => FrameKind::Prepared,
            Self::Abort(_) => FrameKind::Abort,
            Self::Commit(_) => FrameKind::Commit,
            Self::Committed => FrameKind::Committed,
            Self::Declined(_) => FrameKind::Declined,
            Self::AcceptPostcopy => FrameKind::AcceptPostcopy,
            Self::Missing(_) => FrameKind::Missing,
            Self::Fetch(_) => FrameKind::Fetch,
            Self::Complete(_) => FrameKind::Complete,
        }
    }

    fn payload(&self) -> io::Result<Vec<u8>> {
        match self {
            Self::Hello(body) => cbor(body),
            Self::Welcome(body) => cbor(body),
            Self::Offer(body) => cbor(body),
            Self::Attach(body) => cbor(body),
            Self::Round(body) => cbor(body),
            Self::Section(section) => section_bytes(section),
            Self::Prepare(body) => cbor(body),
            Self::Prepared(body) => cbor(body),
            Self::Refuse(body) | Self::Abort(body) | Self::Declined(body) => {
                cbor(&body.clone().tidy())
            }
            Self::Commit(body) => cbor(body),
            Self::Missing(body) => cbor(body),
            Self::Fetch(body) => cbor(body),
            Self::Complete(body) => cbor(body),
            Self::Accept | Self::AcceptPostcopy | Self::StreamEnd | Self::Committed => {
                Ok(Vec::new())
            }
        }
    }

    /// The whole frame.
    ///
    /// # Errors
    /// The message is longer than a frame can be.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let payload = self.payload()?;
        let header = FrameHeader::of(self.kind(), &payload).ok_or_else(|| {
            let (kind, bytes) = (self.kind(), payload.len());
            io::Error::other(format!("{kind:?} of {bytes} bytes is too long for a frame"))
        })?;
        let mut frame = header.encode().to_vec();
        frame.extend_from_slice(&payload);
        Ok(frame)
    }

    /// Sends it.
    ///
    /// # Errors
    /// As [`Message::encode`], and the connection's.
    pub fn send(&self, to: &mut (impl Write + ?Sized)) -> io::Result<()> {
        to.write_all(&self.encode()?)?;
        to.flush()
    }

    /// Reads what a frame of `kind` holds.
    ///
    /// # Errors
    /// [`FrameError::Invalid`].
    pub fn decode(kind: FrameKind, payload: &[u8]) -> Result<Self, FrameError> {
        Ok(match kind {
            FrameKind::Hello => Self::Hello(parse(kind, payload)?),
            FrameKind::Welcome => Self::Welcome(parse(kind, payload)?),
            FrameKind::Offer => Self::Offer(parse(kind, payload)?),
            FrameKind::Refuse => Self::Refuse(parse::<Reasons>(kind, payload)?.tidy()),
            FrameKind::Attach => Self::Attach(parse(kind, payload)?),
            FrameKind::Round => Self::Round(parse(kind, payload)?),
            FrameKind::Section => Self::Section(parse_section(payload)?),
            FrameKind::Prepare => Self::Prepare(parse(kind, payload)?),
            FrameKind::Prepared => Self::Prepared(parse(kind, payload)?),
            FrameKind::Abort => Self::Abort(parse::<Reasons>(kind, payload)?.tidy()),
            FrameKind::Declined => Self::Declined(parse::<Reasons>(kind, payload)?.tidy()),
            FrameKind::Accept => empty(kind, payload, Self::Accept)?,
            FrameKind::StreamEnd => empty(kind, payload, Self::StreamEnd)?,
            FrameKind::Commit => Self::Commit(parse(kind, payload)?),
            FrameKind::Committed => empty(kind, payload, Self::Committed)?,
            FrameKind::AcceptPostcopy => empty(kind, payload, Self::AcceptPostcopy)?,
            FrameKind::Missing => Self::Missing(parse(kind, payload)?),
            FrameKind::Fetch => Self::Fetch(parse(kind, payload)?),
            FrameKind::Complete => Self::Complete(parse(kind, payload)?),
            FrameKind::Pages | FrameKind::DeviceData => {
                let text = format!("{kind:?} on the control connection");
                return Err(FrameError::Invalid(text));
            }
        })
    }

    /// Receives one.
    ///
    /// # Errors
    /// [`FrameError`]; after a timeout it can be tried again.
    pub fn receive(
        reader: &mut FrameReader,
        from: &mut (impl Read + ?Sized),
    ) -> Result<Self, FrameError> {
        let mut payload = Vec::new();
        let kind = reader.read(from, &mut payload)?;
        Self::decode(kind, &payload)
    }
}

fn cbor(body: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut payload = Vec::new();
    ciborium::into_writer(body, &mut payload).map_err(io::Error::other)?;
    Ok(payload)
}

fn parse<T: DeserializeOwned>(kind: FrameKind, payload: &[u8]) -> Result<T, FrameError> {
    let mut rest = payload;
    let value = ciborium::de::from_reader_with_recursion_limit(&mut rest, MAX_DEPTH)
        .map_err(|error| FrameError::Invalid(format!("{kind:?}: {error}")))?;
    match rest.len() {
        0 => Ok(value),
        more => Err(FrameError::Invalid(format!(
            "{kind:?}: {more} bytes behind its end"
        ))),
    }
}

fn empty(kind: FrameKind, payload: &[u8], message: Message) -> Result<Message, FrameError> {
    match payload.len() {
        0 => Ok(message),
        more => Err(FrameError::Invalid(format!(
            "{kind:?} has {more} bytes, but never has any"
        ))),
    }
}

/// Length and text of id and kind, the version, then the state to the end of the frame.
fn section_bytes(section: &Section) -> io::Result<Vec<u8>> {
    let mut payload = Vec::with_capacity(section.bytes.len() + 64);
    for text in [&section.id, &section.kind] {
        let length = u8::try_from(text.len())
            .map_err(|_| io::Error::other(format!("{text:?} is too long for a section")))?;
        payload.push(length);
        payload.extend_from_slice(text.as_bytes());
    }
    payload.extend_from_slice(&section.version.to_le_bytes());
    payload.extend_from_slice(&section.bytes);
    Ok(payload)
}

fn parse_section(payload: &[u8]) -> Result<Section, FrameError> {
    let malformed = || FrameError::Invalid("Section: its table is cut short".to_owned());
    let name = |payload: &mut &[u8]| {
        let (length, rest) = payload.split_first()?;
        let (text, rest) = rest.split_at_checked(usize::from(*length))?;
        *payload = rest;
        String::from_utf8(text.to_vec()).ok()
    };
    let mut rest = payload;
    let id = name(&mut rest).ok_or_else(malformed)?;
    let kind = name(&mut rest).ok_or_else(malformed)?;
    let (version, bytes) = rest.split_first_chunk().ok_or_else(malformed)?;
    Ok(Section {
        id,
        kind,
        version: u32::from_le_bytes(*version),
        bytes: bytes.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_text_and_few_and_short_whoever_wrote_them() {
        let long = "\u{e4}".repeat(1000);
        let mut reasons = vec!["\x1b[2Jcleared\nand more".to_owned(), long];
        reasons.resize(1000, String::new());
        let all = Reasons {
            cause: Cause::Cancelled,
            reasons,
        };
        let payload = cbor(&all).unwrap();
        let sent = Message::Refuse(all).encode().unwrap();
        let received = [
            Message::decode(FrameKind::Refuse, &payload).unwrap(),
            Message::receive(&mut FrameReader::default(), &mut sent.as_slice()).unwrap(),
        ];
        for message in received {
            let Message::Refuse(Reasons { reasons, .. }) = message else {
                panic!("{message:?}");
            };
            assert_eq!(reasons.len(), 64);
            assert_eq!(reasons[0], " [2Jcleared and more");
            assert!(reasons[1].len() <= 512 && reasons[1].ends_with("\u{e4}..."));
            assert_eq!(reasons[63], "and 937 more");
        }
    }
}
