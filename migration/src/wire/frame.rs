//! Frames.

use std::io::{self, ErrorKind, Read};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;

/// Largest payload of a control frame: a device's state, a machine's description.
pub const MAX_CONTROL_BYTES: u32 = 16 << 20;

/// Largest payload of a list of missing pages.
pub const MAX_LIST_BYTES: u32 = 1 << 20;

/// Largest payload of every other control frame. A peer may be anybody when it sends its first.
pub const MAX_SMALL_BYTES: u32 = 64 << 10;

/// Largest payload of a frame of pages: its table, and 64 pages that LZ4 has made a little larger.
pub const MAX_BATCH_BYTES: u32 = 320 << 10;

/// Largest payload of a frame of device state: its table, and as much state.
pub const MAX_DEVICE_BYTES: u32 = (256 << 10) + 16;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Source's first frame on the control connection.
    Hello = 1,
    /// Destination's answer.
    Welcome = 2,
    /// The machine to come.
    Offer = 3,
    /// The destination has built it.
    Accept = 4,
    /// The destination cannot take it.
    Refuse = 5,
    /// First frame of a data connection.
    Attach = 6,
    /// Pages.
    Pages = 7,
    /// All pages of this data connection have been sent.
    StreamEnd = 8,
    /// A round begins; also a sign of life.
    Round = 9,
    /// One device's state.
    Section = 10,
    /// All sections have been sent.
    Prepare = 11,
    /// Everything is restored.
    Prepared = 12,
    /// The sender gives the migration up.
    Abort = 13,
    /// The destination shall take over.
    Commit = 14,
    /// The destination has taken over.
    Committed = 15,
    /// The destination cannot take over.
    Declined = 16,
    /// The destination has built it and can fetch pages after it has started.
    AcceptPostcopy = 17,
    /// Pages that come after the machine has started.
    Missing = 18,
    /// The destination needs a page now.
    Fetch = 19,
    /// Every page has come.
    Complete = 20,
    /// A part of a device's state that comes as a stream.
    DeviceData = 21,
}

impl FrameKind {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::Hello,
        Self::Welcome,
        Self::Offer,
        Self::Accept,
        Self::Refuse,
        Self::Attach,
        Self::Pages,
        Self::StreamEnd,
        Self::Round,
        Self::Section,
        Self::Prepare,
        Self::Prepared,
        Self::Abort,
        Self::Commit,
        Self::Committed,
        Self::Declined,
        Self::AcceptPostcopy,
        Self::Missing,
        Self::Fetch,
        Self::Complete,
        Self::DeviceData,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    fn max_payload(self) -> u32 {
        match self {
            Self::Pages => MAX_BATCH_BYTES,
            Self::Offer | Self::Section => MAX_CONTROL_BYTES,
            Self::Missing => MAX_LIST_BYTES,
            Self::DeviceData => MAX_DEVICE_BYTES,
            Self::Hello
            | Self::Welcome
            | Self::Accept
            | Self::Refuse
            | Self::Attach
            | Self::StreamEnd
            | Self::Round
            | Self::Prepare
            | Self::Prepared
            | Self::Abort
            | Self::Commit
            | Self::Committed
            | Self::Declined
            | Self::AcceptPostcopy
            | Self::Fetch
            | Self::Complete => MAX_SMALL_BYTES,
        }
    }
}

/// What stands before every payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the payload is.
    pub kind: FrameKind,
    /// Bytes of payload.
    pub payload_bytes: u32,
    /// CRC-32 (IEEE 802.3) of the payload.
    pub payload_crc: u32,
}

/// What is damaged when a header is.
const HEADER: &str = "a frame's header";

/// A frame is not what the format says, or did not come.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection broke or fell silent.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The connection ended between two frames.
    #[error("the peer has closed the connection")]
    Closed,
    /// A check sum does not fit.
    #[error("{what} arrived damaged: check sum {found:#010x} instead of {expected:#010x}")]
    Damaged {
        /// What was checked.
        what: &'static str,
        /// As computed.
        found: u32,
        /// As sent.
        expected: u32,
    },
    /// Too long, unknown, or not expected here.
    #[error("frame is not valid: {0}")]
    Invalid(String),
}

impl FrameError {
    /// Where this is the peer's first word: whether it speaks some other protocol. Every header has
    /// a check sum, which other protocols' bytes do not fit.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        match self {
            Self::Damaged { what, .. } => *what == HEADER,
            Self::Io(error) => error.kind() == ErrorKind::UnexpectedEof,
            Self::Closed | Self::Invalid(_) => false,
        }
    }

    /// The wait for the frame has timed out; it can go on.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == ErrorKind::TimedOut)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

impl FrameHeader {
    /// The header of `payload`; `None` when it is longer than its kind allows.
    #[must_use]
    pub fn of(kind: FrameKind, payload: &[u8]) -> Option<Self> {
        let payload_bytes = u32::try_from(payload.len()).ok()?;
        (payload_bytes <= kind.max_payload()).then(|| Self {
            kind,
            payload_bytes,
            payload_crc: crc32fast::hash(payload),
        })
    }

    /// As sent: length, kind, three zeroes, check sum of the payload, check sum of all before.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let [l0, l1, l2, l3] = self.payload_bytes.to_le_bytes();
        let [c0, c1, c2, c3] = self.payload_crc.to_le_bytes();
        let checked = [l0, l1, l2, l3, self.kind as u8, 0, 0, 0, c0, c1, c2, c3];
        let [h0, h1, h2, h3] = crc32fast::hash(&checked).to_le_bytes();
        [
            l0,
            l1,
            l2,
            l3,
            self.kind as u8,
            0,
            0,
            0,
            c0,
            c1,
            c2,
            c3,
            h0,
            h1,
            h2,
            h3,
        ]
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`FrameError::Damaged`] and [`FrameError::Invalid`].
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let (checked, expected) = (bytes.split_at(12).0, word(bytes, 12));
        let found = crc32fast::hash(checked);
        if found != expected {
            return Err(FrameError::Damaged {
                what: HEADER,
                found,
                expected,
            });
        }
        let [_, _, _, _, kind, rest @ ..] = bytes;
        let kind = FrameKind::from_byte(*kind)
            .ok_or_else(|| FrameError::Invalid(format!("kind {kind} is unknown")))?;
        if rest.first_chunk() != Some(&[0, 0, 0]) {
            return Err(FrameError::Invalid("reserved bytes are not 0".to_owned()));
        }
        let payload_bytes = word(bytes, 0);
        if payload_bytes > kind.max_payload() {
            let limit = kind.max_payload();
            return Err(FrameError::Invalid(format!(
                "{kind:?} of {payload_bytes} bytes, at most {limit} are allowed"
            )));
        }
        Ok(Self {
            kind,
            payload_bytes,
            payload_crc: word(bytes, 8),
        })
    }
}

/// Bytes that a reader asks for at once.
const READ_AHEAD_BYTES: usize = 64 << 10;

/// Takes frames out of a stream of bytes. After a timeout it goes on where it was.
#[derive(Debug, Default)]
pub struct FrameReader {
    /// Whether no more is asked for than the frame has.
    is_exact: bool,
    buffer: Vec<u8>,
    /// Start of what is not consumed yet.
    start: usize,
    /// A header that was read before its payload had come.
    header: Option<FrameHeader>,
}

impl FrameReader {
    /// Reads the next frame's payload into `payload`, replacing what is there.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn read(
        &mut self,
        from: &mut (impl Read + ?Sized),
        payload: &mut Vec<u8>,
    ) -> Result<FrameKind, FrameError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                self.fill(from, HEADER_BYTES)?;
                let bytes = self.unread().first_chunk().copied();
                let header = FrameHeader::decode(&bytes.unwrap_or_default())?;
                self.start += HEADER_BYTES;
                self.header = Some(header);
                header
            }
        };
        let length = header.payload_bytes as usize;
        self.fill(from, length)?;
        payload.clear();
        payload.extend_from_slice(self.unread().get(..length).unwrap_or_default());
        self.start += length;
        self.header = None;
        let found = crc32fast::hash(payload);
        if found != header.payload_crc {
            return Err(FrameError::Damaged {
                what: "a frame",
                found,
                expected: header.payload_crc,
            });
        }
        Ok(header.kind)
    }

    /// Fills `out` with bytes that follow a frame; first from what was read ahead.
    ///
    /// # Errors
    /// [`FrameError::Io`]; what was read is lost.
    pub fn read_raw(
        &mut self,
        from: &mut (impl Read + ?Sized),
        out: &mut [u8],
    ) -> Result<(), FrameError> {
        let ahead = self.take_ahead(out.len());
        let count = ahead.len();
        let (first, rest) = out.split_at_mut_checked(count).unwrap_or_default();
        first.copy_from_slice(ahead);
        Ok(from.read_exact(rest)?)
    }

    /// From now on asks for no more than a frame has, so that what follows it can be read by
    /// others.
    pub fn read_exactly(&mut self) {
        self.is_exact = true;
    }

    /// Whether everything that was read ahead has been taken.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.unread().is_empty()
    }

    /// Takes up to `limit` bytes of what was read ahead.
    fn take_ahead(&mut self, limit: usize) -> &[u8] {
        let count = limit.min(self.buffer.len() - self.start);
        let taken = self.start..self.start + count;
        self.start += count;
        self.buffer.get(taken).unwrap_or_default()
    }

    fn unread(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// Reads until at least `wanted` bytes are there.
    fn fill(&mut self, from: &mut (impl Read + ?Sized), wanted: usize) -> Result<(), FrameError> {
        if self.unread().len() >= wanted {
            return Ok(());
        }
        self.buffer.drain(..self.start);
        self.start = 0;
        while self.buffer.len() < wanted {
            let have = self.buffer.len();
            let wished = if self.is_exact { 0 } else { READ_AHEAD_BYTES };
            let room = wanted.max(wished) - have;
            // Grown as bytes come, so that a header alone cannot make this side allocate much.
            let room = room.min(READ_AHEAD_BYTES.max(have));
            self.buffer.resize(have + room, 0);
            let target = self.buffer.get_mut(have..).unwrap_or_default();
            let read = from.read(target);
            self.buffer.truncate(have + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) if have == 0 && self.header.is_none() => return Err(FrameError::Closed),
                Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer says how long a payload is before it sends any of it.
    #[test]
    fn a_header_alone_does_not_make_room_for_its_payload() {
        let header = FrameHeader {
            kind: FrameKind::Section,
            payload_bytes: MAX_CONTROL_BYTES,
            payload_crc: 0,
        };
        for sent in [0, 100_000] {
            let mut wire = header.encode().to_vec();
            wire.resize(HEADER_BYTES + sent, 0);
            let mut reader = FrameReader::default();
            let cut = reader.read(&mut wire.as_slice(), &mut Vec::new());
            assert!(matches!(cut, Err(FrameError::Io(_))), "{cut:?}");
            let room = reader.buffer.capacity();
            assert!(room <= 4 * (sent + READ_AHEAD_BYTES), "{room} for {sent}");
        }
        let header = FrameHeader {
            payload_bytes: MAX_CONTROL_BYTES + 1,
            ..header
        };
        let refused = FrameHeader::decode(&header.encode());
        assert!(matches!(refused, Err(FrameError::Invalid(_))));
    }

    /// Whoever connects may send a first frame of any kind.
    #[test]
    fn little_is_taken_of_what_is_short_by_nature() {
        for kind in FrameKind::ALL {
            let limit = kind.max_payload();
            let of = |payload_bytes| FrameHeader {
                kind,
                payload_bytes,
                payload_crc: 0,
            };
            assert!(FrameHeader::decode(&of(limit).encode()).is_ok());
            assert!(FrameHeader::decode(&of(limit + 1).encode()).is_err());
        }
        let small = [FrameKind::Hello, FrameKind::Attach, FrameKind::Refuse];
        assert!(small.iter().all(|kind| kind.max_payload() == 64 << 10));
    }
}
