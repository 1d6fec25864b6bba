//! Device states and the destination's half of the hand-off.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::{Control, TICK};
use super::missing::Missing;
use super::options::{DestinationError, Received};
use super::pull::Puller;
use super::transfer::Ended;
use crate::handoff::{
    self, Awaited, Cause, DestinationAction, DestinationEvent, DestinationHandoff,
    DestinationOutcome, Mark, Mode, Reason,
};
use crate::ports::{Incoming, PortError};
use crate::section::Section;
use crate::wire::Message;
use crate::wire::message::{Prepared, Reasons};

pub(super) struct Takeover<'c, 'a> {
    control: &'c mut Control<'a>,
    machine: Box<dyn Incoming>,
    sections: Vec<Section>,
    /// In a post-copy.
    puller: Option<(Puller, Ended)>,
    missing: Option<Arc<Missing>>,
    restore_us: u64,
    /// What went wrong here, in more words than the hand-off knows.
    error: Option<DestinationError>,
    start_error: Option<PortError>,
}

impl<'c, 'a> Takeover<'c, 'a> {
    pub(super) fn new(
        control: &'c mut Control<'a>,
        machine: Box<dyn Incoming>,
        sections: Vec<Section>,
        puller: Option<(Puller, Ended)>,
    ) -> Self {
        Self {
            control,
            machine,
            sections,
            puller,
            missing: None,
            restore_us: 0,
            error: None,
            start_error: None,
        }
    }

    pub(super) fn run(mut self) -> Result<Received, DestinationError> {
        let (mut handoff, mut action) = DestinationHandoff::begin(match self.puller {
            Some(_) => Mode::Postcopy,
            None => Mode::Precopy,
        });
        let outcome = loop {
            let event = match action {
                DestinationAction::Restore => self.restore(),
                DestinationAction::Send(message) => self.send(message),
                DestinationAction::Wait(Awaited::Link) => self.wait_for_link(),
                DestinationAction::Wait(_) => self.wait(),
                DestinationAction::Claim(mark) => self.claim(mark),
                DestinationAction::Start => self.start(),
                DestinationAction::Pull => self.pull(),
                DestinationAction::Pause => self.hold(),
                DestinationAction::Finish(outcome) => break outcome,
            };
            action = handoff
                .step(event)
                .map_err(|error| DestinationError::Protocol(error.to_string()))?;
        };
        match outcome {
            DestinationOutcome::Started | DestinationOutcome::StartFailed => Ok(Received {
                machine: self.machine,
                start_error: self.start_error,
            }),
            DestinationOutcome::Discarded(reason) => {
                Err(self.error.unwrap_or(DestinationError::Handoff(reason)))
            }
        }
    }

    fn restore(&mut self) -> DestinationEvent {
        let begin = Instant::now();
        let lazy = self.make_lazy();
        let sections = std::mem::take(&mut self.sections);
        let restored = lazy.and_then(|()| self.machine.restore(sections));
        self.restore_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        match restored {
            Ok(()) => DestinationEvent::Restored,
            Err(error) => {
                self.error = Some(DestinationError::Restore(error));
                DestinationEvent::RestoreFailed
            }
        }
    }

    /// In a post-copy, pages come when they are touched from here on: already a device that takes
    /// its state over may look at its queues.
    fn make_lazy(&mut self) -> Result<(), PortError> {
        if let Some((puller, _)) = &mut self.puller {
            let lazy = self.machine.make_lazy(&puller.later)?;
            self.missing = Some(puller.begin(lazy));
        }
        Ok(())
    }

    /// Waits until every page has come.
    fn pull(&mut self) -> DestinationEvent {
        let (Some((_, ended)), Some(missing)) = (&mut self.puller, &self.missing) else {
            return DestinationEvent::LinkLost;
        };
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
                (Ok(()), Ok(Some(other))) => Some(super::receive::unexpected(&other)),
                (Ok(()), Err(error)) => Some(error.into()),
                (Err(error), _) => Some(error),
            };
            let lost = match lost {
                None if ended.missing == 0 && missing.left() == 0 => match missing.complete() {
                    Ok(()) => return DestinationEvent::PagesComplete,
                    Err(error) => Some(error.into()),
                },
                None if ended.missing == 0 => {
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

    fn hold(&mut self) -> DestinationEvent {
        self.machine.hold();
        DestinationEvent::Paused
    }

    /// The machine stands still, with parts of its memory at the source, until somebody ends it.
    fn wait_for_link(&mut self) -> DestinationEvent {
        if let Some((puller, _)) = &self.puller {
            puller.stop();
        }
        self.control.break_off();
        // It may not have been started yet; whoever can end it is to see it.
        self.machine.hold();
        while !self.machine.has_ended() {
            std::thread::sleep(TICK);
        }
        DestinationEvent::GiveUp
    }

    fn claim(&mut self, mark: Mark) -> DestinationEvent {
        match self.machine.claim(mark) {
            Ok(()) => DestinationEvent::Claimed,
            Err(error) => {
                self.error = Some(DestinationError::Claim(error));
                DestinationEvent::ClaimFailed
            }
        }
    }

    fn start(&mut self) -> DestinationEvent {
        match self.machine.start() {
            Ok(()) => DestinationEvent::Started,
            Err(error) => {
                log::error!(error:% = error; "the VM has come over, but cannot be started");
                self.start_error = Some(error);
                DestinationEvent::StartFailed
            }
        }
    }

    fn send(&mut self, message: handoff::Message) -> DestinationEvent {
        let reasons = |cause: Cause| {
            let words = self.error.as_ref().map(DestinationError::chain);
            Reasons::one(cause, words.unwrap_or_else(|| cause.to_string()))
        };
        let message = match message {
            handoff::Message::Prepared => Message::Prepared(Prepared {
                restore_us: self.restore_us,
            }),
            handoff::Message::Committed => Message::Committed,
            handoff::Message::Declined(cause) => Message::Declined(reasons(cause)),
            handoff::Message::Abort(cause) => Message::Abort(reasons(cause)),
            handoff::Message::Complete => {
                let summary = self.missing.as_ref().map(|missing| missing.summary());
                Message::Complete(summary.unwrap_or_default())
            }
            // The source's.
            handoff::Message::Prepare | handoff::Message::Commit(_) => {
                return DestinationEvent::LinkLost;
            }
        };
        match self.control.send(&message) {
            Ok(()) => DestinationEvent::Sent,
            Err(error) => {
                log::debug!(error:% = error; "hand-off message was not sent");
                DestinationEvent::LinkLost
            }
        }
    }

    /// Waits for the source's word.
    fn wait(&mut self) -> DestinationEvent {
        let deadline = Instant::now() + self.control.patience;
        loop {
            match self.control.poll() {
                Ok(Some(message)) => return DestinationEvent::Received(self.understand(message)),
                Ok(None) => {}
                Err(error) => {
                    log::debug!(error:% = error; "connection lost in the hand-off");
                    self.error = Some(DestinationError::Link(error));
                    return DestinationEvent::LinkLost;
                }
            }
            if self.control.is_cancelled() {
                self.error = Some(DestinationError::Cancelled);
                return DestinationEvent::Cancel;
            }
            if Instant::now() > deadline {
                self.error = Some(DestinationError::Handoff(Reason::Here(Cause::Deadline)));
                return DestinationEvent::DeadlinePassed;
            }
        }
    }

    fn understand(&mut self, message: Message) -> handoff::Message {
        match message {
            Message::Commit(commit) => handoff::Message::Commit(Mark(commit.mark)),
            Message::Abort(reasons) => {
                self.error = Some(DestinationError::Peer(reasons.reasons.join("; ")));
                handoff::Message::Abort(reasons.cause)
            }
            other => {
                self.error = Some(super::receive::unexpected(&other));
                handoff::Message::Prepared
            }
        }
    }
}
