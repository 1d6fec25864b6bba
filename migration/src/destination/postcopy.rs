//! Post-copy as the one who drives the hand-off sees it.

use std::time::{Duration, Instant};

use super::control::Control;
use super::options::DestinationError;
use super::receive::unexpected;
use super::takeover::Takeover;
use crate::handoff::DestinationEvent;
use crate::wire::Message;

/// How long it may take to answer, when the machine has ended and its process waits.
const FAREWELL: Duration = Duration::from_secs(1);

impl Takeover<'_, '_, '_> {
    /// Waits until every page has come.
    pub(super) fn pull(&mut self) -> DestinationEvent {
        let (Some(later), Some(missing)) = (&mut self.later, &self.missing) else {
            return DestinationEvent::LinkLost;
        };
        let ended = &mut later.ended;
        let mut heard = Instant::now();
        loop {
            if self.machine.has_ended() {
                return DestinationEvent::PagesComplete;
            }
            let lost = match (ended.check(Duration::ZERO), self.control.poll()) {
                (Ok(()), Ok(None)) => None,
                (Ok(()), Ok(Some(Message::Round(_)))) => {
                    heard = Instant::now();
                    None
                }
                (Ok(()), Ok(Some(other))) => Some(unexpected(&other)),
                (Ok(()), Err(error)) => Some(error.into()),
                (Err(error), _) => Some(error),
            };
            let lost = match lost {
                None if ended.running == 0 && missing.left() == 0 => match missing.complete() {
                    Ok(()) => return DestinationEvent::PagesComplete,
                    Err(error) => Some(error.into()),
                },
                None if ended.running == 0 => {
                    let text = format!("{} pages were not sent", missing.left());
                    Some(DestinationError::Protocol(text))
                }
                None if heard.elapsed() > self.control.patience => {
                    Some(std::io::Error::from(std::io::ErrorKind::TimedOut).into())
                }
                lost => lost,
            };
            if let Some(error) = lost {
                log::error!(error:% = error.chain(), missing_pages = missing.left(); "the source's pages do not come any more");
                self.error = Some(error);
                return DestinationEvent::LinkLost;
            }
        }
    }

    pub(super) fn hold(&mut self) -> DestinationEvent {
        if !self.held {
            self.machine.hold();
            self.held = true;
        }
        DestinationEvent::Paused
    }

    /// The machine stands still, with parts of its memory at the source, until that connects again
    /// or somebody ends the machine.
    pub(super) fn wait_for_link(&mut self) -> DestinationEvent {
        self.control.break_off();
        // It may not have been started yet; whoever can end it is to see it.
        self.hold();
        let (Some(later), Some(missing)) = (&mut self.later, &self.missing) else {
            return DestinationEvent::GiveUp;
        };
        later.puller.stop();
        // A thread that still lived could be told of a page and keep that to itself.
        later.ended.wait_for_all();
        let machine = &*self.machine;
        let is_over = || machine.has_ended();
        match later.link.wait(self.control, missing, &is_over) {
            Some((puller, ended)) => {
                later.puller = puller;
                later.ended = ended;
                self.error = None;
                DestinationEvent::Linked
            }
            None => DestinationEvent::GiveUp,
        }
    }

    /// Tells the source that its pages are all here, until it has heard it: if not, it would keep
    /// them, and its operator waiting.
    pub(super) fn say_complete(&mut self) -> DestinationEvent {
        let (Some(later), Some(missing)) = (&mut self.later, &self.missing) else {
            return DestinationEvent::LinkLost;
        };
        let complete = Message::Complete(missing.summary());
        let deadline = Instant::now() + later.linger;
        let machine = &*self.machine;
        let is_over = || machine.has_ended() || Instant::now() > deadline;
        loop {
            let told = self.control.send(&complete).map_err(DestinationError::from);
            let time = match machine.has_ended() {
                true => FAREWELL.min(self.control.patience),
                false => self.control.patience,
            };
            match told.and_then(|()| hear_end(self.control, time)) {
                Ok(()) => return DestinationEvent::Sent,
                Err(error) => {
                    log::warn!(error:% = error.chain(); "the source has not heard that its pages are all here")
                }
            }
            if later.link.wait(self.control, missing, &is_over).is_none() {
                return DestinationEvent::LinkLost;
            }
        }
    }
}

/// The source's last word.
fn hear_end(control: &mut Control<'_>, time: Duration) -> Result<(), DestinationError> {
    let deadline = Instant::now() + time;
    loop {
        match control.poll()? {
            Some(Message::StreamEnd) => return Ok(()),
            None | Some(Message::Round(_)) => {}
            Some(other) => return Err(unexpected(&other)),
        }
        if Instant::now() > deadline {
            return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
        }
    }
}
