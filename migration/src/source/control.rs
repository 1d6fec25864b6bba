//! The control connection, as the source uses it.

use std::time::{Duration, Instant};

use super::options::SourceError;
use crate::ports::Channel;
use crate::wire::{FrameError, FrameReader, Message};

/// How often a wait looks whether it is still wanted.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// A connection with its half-read frame.
pub(super) struct Control {
    pub(super) channel: Box<dyn Channel>,
    reader: FrameReader,
    patience: Duration,
}

impl Control {
    pub(super) fn new(channel: Box<dyn Channel>, patience: Duration) -> Self {
        Self {
            channel,
            reader: FrameReader::default(),
            patience,
        }
    }

    /// Sends a message.
    pub(super) fn send(&mut self, message: &Message) -> Result<(), FrameError> {
        self.channel.set_timeout(self.patience)?;
        Ok(message.send(&mut *self.channel)?)
    }

    /// The same for a peer that may have given up meanwhile: it has said why before it closed, and
    /// that may still be there to be read.
    pub(super) fn tell(&mut self, message: &Message) -> Result<(), SourceError> {
        let Err(error) = self.send(message) else {
            return Ok(());
        };
        match self.poll(TICK) {
            Ok(Some(Message::Abort(reasons))) => Err(SourceError::Peer(reasons.reasons.join("; "))),
            Ok(Some(Message::Refuse(refuse))) => Err(SourceError::Refused(refuse.reasons)),
            _ => Err(error.into()),
        }
    }

    /// Sends bytes of frames.
    pub(super) fn send_bytes(&mut self, frames: &[u8]) -> Result<(), FrameError> {
        self.channel.set_timeout(self.patience)?;
        self.channel.write_all(frames)?;
        Ok(self.channel.flush()?)
    }

    /// A message that has come within `time`, if any.
    pub(super) fn poll(&mut self, time: Duration) -> Result<Option<Message>, FrameError> {
        self.channel
            .set_timeout(time.max(Duration::from_millis(1)))?;
        match Message::receive(&mut self.reader, &mut *self.channel) {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.is_timeout() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The next message, unless `give_up` turns true or `time` passes.
    pub(super) fn receive(
        &mut self,
        time: Duration,
        give_up: impl Fn() -> bool,
    ) -> Result<Message, SourceError> {
        let deadline = Instant::now() + time;
        loop {
            if give_up() {
                return Err(SourceError::Cancelled);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let silent = std::io::Error::from(std::io::ErrorKind::TimedOut);
                return Err(silent.into());
            }
            match self.poll(left.min(TICK))? {
                Some(Message::Abort(reasons)) => {
                    return Err(SourceError::Peer(reasons.reasons.join("; ")));
                }
                Some(message) => return Ok(message),
                None => {}
            }
        }
    }
}
