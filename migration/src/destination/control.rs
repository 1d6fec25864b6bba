//! The control connection, as the destination uses it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::options::DestinationError;
use super::stream::Stream;
use crate::ports::Channel;
use crate::wire::{FrameError, FrameReader, Message};

/// How often a wait looks whether it is still wanted.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// How long a look takes whether there is a message.
const GLANCE: Duration = Duration::from_millis(1);

/// The control connection.
pub(super) struct Control<'a> {
    pub(super) channel: Box<dyn Channel>,
    pub(super) reader: FrameReader,
    pub(super) patience: Duration,
    pub(super) cancelled: &'a AtomicBool,
    /// A message that was read before anybody waited for it.
    pub(super) early: Option<Message>,
    /// Whether the source only asks: the machine is not to come.
    pub(super) is_check: bool,
}

impl Control<'_> {
    pub(super) fn send(&mut self, message: &Message) -> Result<(), FrameError> {
        self.channel.set_timeout(self.patience)?;
        Ok(message.send(&mut *self.channel)?)
    }

    /// Goes on over another connection.
    pub(super) fn replace(&mut self, stream: Stream) {
        self.break_off();
        self.channel = stream.channel;
        self.reader = stream.reader;
    }

    pub(super) fn break_off(&self) {
        self.channel.breaker().break_off();
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// A message that has come within a moment, if any.
    pub(super) fn poll(&mut self) -> Result<Option<Message>, FrameError> {
        self.poll_within(TICK)
    }

    /// A message that has come within `time`, if any.
    pub(super) fn poll_within(&mut self, time: Duration) -> Result<Option<Message>, FrameError> {
        if let Some(message) = self.early.take() {
            return Ok(Some(message));
        }
        self.channel.set_timeout(time)?;
        match Message::receive(&mut self.reader, &mut *self.channel) {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.is_timeout() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the peer has given up, while something else than its messages is waited for.
    pub(super) fn check(&mut self) -> Result<(), DestinationError> {
        if self.is_cancelled() {
            return Err(DestinationError::Cancelled);
        }
        while self.early.is_none() {
            match self.poll_within(GLANCE)? {
                Some(Message::Abort(reasons)) => {
                    return Err(DestinationError::Peer(reasons.reasons.join("; ")));
                }
                // Its connections are on their way.
                Some(Message::Round(_)) => {}
                Some(message) => self.early = Some(message),
                None => break,
            }
        }
        Ok(())
    }

    /// The next message; meanwhile `check` is called now and then.
    pub(super) fn receive(
        &mut self,
        mut check: impl FnMut() -> Result<(), DestinationError>,
    ) -> Result<Message, DestinationError> {
        let deadline = Instant::now() + self.patience;
        loop {
            // Also of a peer that never stops talking.
            if self.is_cancelled() {
                return Err(DestinationError::Cancelled);
            }
            match self.poll()? {
                Some(Message::Abort(reasons)) => {
                    return Err(DestinationError::Peer(reasons.reasons.join("; ")));
                }
                Some(message) => return Ok(message),
                None => {}
            }
            check()?;
            if Instant::now() > deadline {
                let silent = std::io::Error::from(std::io::ErrorKind::TimedOut);
                return Err(silent.into());
            }
        }
    }
}
