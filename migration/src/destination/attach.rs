//! Connections that come while a migration is under way: those that show its token are its own.
//!
//! Anybody may connect. Whoever has not shown the token yet is looked at now and then, costs a
//! little memory and some seconds, and holds nobody else up.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::time::{Duration, Instant};

use super::control::{Control, TICK};
use super::options::{DestinationError, DestinationOptions};
use super::stream::Stream;
use crate::ports::{Accept, Channel};
use crate::wire::message::Offer;
use crate::wire::{FrameError, FrameReader, Message};

/// How long a connection may take to show its token.
const ATTACH_TIME: Duration = Duration::from_secs(2);

/// Bytes of that, with what may follow in the same packet.
const ATTACH_BYTES: usize = 4096;

/// Connections that have not shown it yet at most; for one more the oldest goes.
const MAX_CANDIDATES: usize = 16;

/// How long a look at one of them takes, and how many are looked at in turn each time: in a
/// blackout, too, nobody waits longer for strangers.
const GLANCE: Duration = Duration::from_millis(1);
const GLANCES: usize = 4;

/// How often strangers are told of.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(1);

/// Where a migration's further connections come in.
pub(super) struct Door<'a> {
    accept: &'a mut dyn Accept,
    token: Vec<u8>,
    patience: Duration,
    pub(super) linger: Duration,
    candidates: VecDeque<Candidate>,
    complained: Option<Instant>,
    /// Strangers that were not told of.
    untold: u64,
}

/// A connection that has not shown its token yet.
struct Candidate {
    channel: Box<dyn Channel>,
    reader: FrameReader,
    /// Bytes that it may still send.
    left: usize,
    deadline: Instant,
}

/// Reads once, and at most as much as a candidate may send: one that sends byte by byte holds
/// nobody up.
struct Limited<'a> {
    channel: &'a mut dyn Channel,
    left: &'a mut usize,
    has_read: bool,
}

impl Read for Limited<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if std::mem::replace(&mut self.has_read, true) {
            return Err(ErrorKind::TimedOut.into());
        }
        if *self.left == 0 {
            return Err(io::Error::other("too much before the token"));
        }
        let room = buf.len().min(*self.left);
        let count = self.channel.read(buf.get_mut(..room).unwrap_or_default())?;
        *self.left -= count.min(*self.left);
        Ok(count)
    }
}

impl Candidate {
    /// The index that it shows with the token; `None` when it has not yet.
    fn look(&mut self, token: &[u8]) -> Result<Option<u16>, FrameError> {
        self.channel.set_timeout(GLANCE)?;
        let from = &mut Limited {
            channel: &mut *self.channel,
            left: &mut self.left,
            has_read: false,
        };
        match Message::receive(&mut self.reader, from) {
            Ok(Message::Attach(attach)) if same(&attach.token, token) => Ok(Some(attach.index)),
            Ok(other) => {
                let text = format!("{:?} without this migration's token", other.kind());
                Err(FrameError::Invalid(text))
            }
            Err(error) if error.is_timeout() && Instant::now() < self.deadline => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl<'a> Door<'a> {
    pub(super) fn new(accept: &'a mut dyn Accept, options: &DestinationOptions) -> Self {
        Self {
            accept,
            token: options.token.clone(),
            patience: options.patience,
            linger: options.linger,
            candidates: VecDeque::new(),
            complained: None,
            untold: 0,
        }
    }

    /// The next connection of this migration and its number, if one comes within about `wait`.
    ///
    /// # Errors
    /// Nobody can be accepted at present.
    pub(super) fn next(&mut self, wait: Duration) -> io::Result<Option<(u16, Stream)>> {
        let wait = match self.candidates.is_empty() {
            true => wait,
            false => wait.min(GLANCE),
        };
        match self.accept.accept(wait) {
            Ok(channel) => self.admit(channel),
            Err(error) if error.kind() == ErrorKind::TimedOut => {}
            Err(error) => return Err(error),
        }
        for _ in 0..self.candidates.len().min(GLANCES) {
            let Some(mut candidate) = self.candidates.pop_front() else {
                break;
            };
            match candidate.look(&self.token) {
                Ok(Some(index)) => {
                    let Candidate {
                        mut channel,
                        reader,
                        ..
                    } = candidate;
                    channel.set_timeout(self.patience)?;
                    return Ok(Some((index, Stream { channel, reader })));
                }
                Ok(None) => self.candidates.push_back(candidate),
                Err(error) => self.complain(&error.to_string()),
            }
        }
        Ok(None)
    }

    fn admit(&mut self, channel: Box<dyn Channel>) {
        if self.candidates.len() >= MAX_CANDIDATES {
            let deadlines = self.candidates.iter().map(|candidate| candidate.deadline);
            let oldest = deadlines.enumerate().min_by_key(|(_, deadline)| *deadline);
            if let Some((place, _)) = oldest {
                self.candidates.remove(place);
            }
            self.complain("too many others have shown no token, either");
        }
        self.candidates.push_back(Candidate {
            channel,
            reader: FrameReader::default(),
            left: ATTACH_BYTES,
            deadline: Instant::now() + ATTACH_TIME.min(self.patience),
        });
    }

    /// A connection was closed; strangers shall not fill the log.
    pub(super) fn complain(&mut self, why: &str) {
        let is_soon = |at: Instant| at.elapsed() < COMPLAINT_INTERVAL;
        if self.complained.is_some_and(is_soon) {
            self.untold += 1;
            return;
        }
        let before = std::mem::take(&mut self.untold);
        log::warn!(why, before; "a connection was turned away that is not this migration's");
        self.complained = Some(Instant::now());
    }
}

/// Waits for the data connections. Strangers are turned away.
pub(super) fn attach(
    control: &mut Control<'_>,
    door: &mut Door<'_>,
    offer: &Offer,
) -> Result<Vec<Stream>, DestinationError> {
    let deadline = Instant::now() + control.patience;
    let mut places = Places::new(offer.streams + u16::from(offer.postcopy));
    while !places.is_full() {
        let left = deadline.saturating_duration_since(Instant::now());
        let failed = |source| DestinationError::Attach {
            found: places.found,
            expected: places.expected(),
            source,
        };
        if left.is_zero() {
            return Err(failed(ErrorKind::TimedOut.into()));
        }
        match door.next(left.min(TICK)).map_err(failed)? {
            Some((index, stream)) => {
                if !places.take(index, stream) {
                    door.complain("its number is taken, or too high");
                }
            }
            None => control.check()?,
        }
    }
    Ok(places.into_streams())
}

/// Data connections by their numbers.
pub(super) struct Places {
    streams: Vec<Option<Stream>>,
    found: u16,
}

impl Places {
    pub(super) fn new(expected: u16) -> Self {
        Self {
            streams: (0..expected).map(|_| None).collect(),
            found: 0,
        }
    }

    fn expected(&self) -> u16 {
        u16::try_from(self.streams.len()).unwrap_or(u16::MAX)
    }

    pub(super) fn is_full(&self) -> bool {
        self.found == self.expected()
    }

    /// Whether `index` was free.
    pub(super) fn take(&mut self, index: u16, stream: Stream) -> bool {
        let place = self.streams.get_mut(usize::from(index));
        let Some(place @ None) = place else {
            return false;
        };
        *place = Some(stream);
        self.found += 1;
        true
    }

    pub(super) fn into_streams(self) -> Vec<Stream> {
        self.streams.into_iter().flatten().collect()
    }
}

/// Compares without telling by the time it takes how much was right.
fn same(shown: &[u8], token: &[u8]) -> bool {
    let difference = shown.iter().zip(token).fold(0, |all, (a, b)| all | (a ^ b));
    shown.len() == token.len() && difference == 0
}
