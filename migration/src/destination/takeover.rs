//! Device states and the destination's half of the hand-off.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Control;
use super::devices::Devices;
use super::missing::Missing;
use super::options::{DestinationError, Received};
use super::pull::Puller;
use super::relink::NewLinks;
use super::transfer::Ended;
use crate::handoff::{
    self, Awaited, Cause, DestinationAction, DestinationEvent, DestinationHandoff,
    DestinationOutcome, Mark, Mode, Reason,
};
use crate::ports::{Incoming, PortError};
use crate::section::Section;
use crate::wire::Message;
use crate::wire::message::{Prepared, Reasons};

/// How pages come after the machine has started.
pub(super) struct Later<'a> {
    pub(super) puller: Puller,
    pub(super) ended: Ended,
    pub(super) link: NewLinks<'a>,
    /// See [`DestinationOptions::linger`](super::options::DestinationOptions::linger).
    pub(super) linger: Duration,
}

pub(super) struct Takeover<'c, 'a, 'd> {
    pub(super) control: &'c mut Control<'a>,
    pub(super) machine: Box<dyn Incoming>,
    /// Those whose states have come as streams.
    devices: &'c Devices,
    sections: Vec<Section>,
    /// In a post-copy.
    pub(super) later: Option<Later<'d>>,
    pub(super) missing: Option<Arc<Missing>>,
    /// The connection was cut, and the machine stands still because of it.
    pub(super) held: bool,
    restore_us: u64,
    /// What went wrong here, in more words than the hand-off knows.
    pub(super) error: Option<DestinationError>,
    start_error: Option<PortError>,
}

impl<'c, 'a, 'd> Takeover<'c, 'a, 'd> {
    pub(super) fn new(
        control: &'c mut Control<'a>,
        (machine, devices): (Box<dyn Incoming>, &'c Devices),
        sections: Vec<Section>,
        later: Option<Later<'d>>,
    ) -> Self {
        Self {
            control,
            machine,
            devices,
            sections,
            later,
            missing: None,
            held: false,
            restore_us: 0,
            error: None,
            start_error: None,
        }
    }

    pub(super) fn run(mut self) -> Result<Received, DestinationError> {
        let (mut handoff, mut action) = DestinationHandoff::begin(match self.later {
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
        let restored = lazy.map_err(DestinationError::Restore);
        let restored = restored.and_then(|()| self.devices.finish());
        let restored = restored.and_then(|()| {
            let restored = self.machine.restore(sections);
            restored.map_err(DestinationError::Restore)
        });
        self.restore_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        match restored {
            Ok(()) => DestinationEvent::Restored,
            Err(error) => {
                self.error = Some(error);
                DestinationEvent::RestoreFailed
            }
        }
    }

    /// In a post-copy, pages come when they are touched from here on: already a device that takes
    /// its state over may look at its queues.
    fn make_lazy(&mut self) -> Result<(), PortError> {
        if let Some(later) = &mut self.later {
            let lazy = self.machine.make_lazy(&later.puller.later)?;
            self.missing = Some(later.puller.begin(lazy));
        }
        Ok(())
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
        self.held = false;
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
            handoff::Message::Complete => return self.say_complete(),
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
