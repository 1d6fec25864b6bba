//! Device states and the destination's half of the hand-off.

use std::time::Instant;

use super::options::{DestinationError, Received};
use super::receive::Control;
use crate::handoff::{
    self, Cause, DestinationAction, DestinationEvent, DestinationHandoff, DestinationOutcome, Mark,
    Mode, Reason,
};
use crate::ports::{Incoming, PortError};
use crate::section::Section;
use crate::wire::Message;
use crate::wire::message::{Prepared, Reasons};

pub(super) struct Takeover<'c, 'a> {
    control: &'c mut Control<'a>,
    machine: Box<dyn Incoming>,
    sections: Vec<Section>,
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
    ) -> Self {
        Self {
            control,
            machine,
            sections,
            restore_us: 0,
            error: None,
            start_error: None,
        }
    }

    pub(super) fn run(mut self) -> Result<Received, DestinationError> {
        let (mut handoff, mut action) = DestinationHandoff::begin(Mode::Precopy);
        let outcome = loop {
            let event = match action {
                DestinationAction::Restore => self.restore(),
                DestinationAction::Send(message) => self.send(message),
                DestinationAction::Wait(_) => self.wait(),
                DestinationAction::Claim(mark) => self.claim(mark),
                DestinationAction::Start => self.start(),
                DestinationAction::Pull => DestinationEvent::PagesComplete,
                DestinationAction::Pause => DestinationEvent::Paused,
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
        let restored = self.machine.restore(std::mem::take(&mut self.sections));
        self.restore_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        match restored {
            Ok(()) => DestinationEvent::Restored,
            Err(error) => {
                self.error = Some(DestinationError::Restore(error));
                DestinationEvent::RestoreFailed
            }
        }
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
            // The source's, and post-copy's.
            handoff::Message::Prepare
            | handoff::Message::Commit(_)
            | handoff::Message::Complete => return DestinationEvent::LinkLost,
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
