//! The side that takes the VM over.

use super::{Awaited, Cause, Impossible, Mark, Message, Mode, Reason};

/// What has become of the destination's copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationOutcome {
    /// It runs.
    Started,
    /// It is this side's, but could not be started: kept paused, for an operator.
    StartFailed,
    /// It is gone: drop the machine.
    Discarded(Reason),
}

/// What the driver is to do. It answers each with an event; which, is said here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// [`Incoming::restore`](crate::ports::Incoming::restore): `Restored` or `RestoreFailed`.
    Restore,
    /// Write it to the connection, to the end: `Sent` or `LinkLost`.
    Send(Message),
    /// Wait: `Received`, `LinkLost`, `DeadlinePassed`, `Cancel`; for a link: `Linked`, `GiveUp`.
    Wait(Awaited),
    /// [`Incoming::claim`](crate::ports::Incoming::claim), if the disk still bears this mark:
    /// `Claimed` or `ClaimFailed`.
    Claim(Mark),
    /// [`Incoming::start`](crate::ports::Incoming::start), or resume after `Pause`: `Started` or
    /// `StartFailed`.
    Start,
    /// Post-copy: fetch the missing pages: `PagesComplete` or `LinkLost`.
    Pull,
    /// Post-copy: hold the VM, as far as it does not stand still anyway: `Paused`.
    Pause,
    /// It is over.
    Finish(DestinationOutcome),
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationEvent {
    /// The saved state is taken over.
    Restored,
    /// It is not.
    RestoreFailed,
    /// The message is on its way.
    Sent,
    /// The peer's message.
    Received(Message),
    /// The connection is of no use any more. While waiting, this comes after the last message that
    /// the peer has sent and that can be had.
    LinkLost,
    /// What is waited for did not come in time.
    DeadlinePassed,
    /// Somebody asks to give up. Ignored once `Commit` has come.
    Cancel,
    /// This side holds every disk, and the mark is replaced.
    Claimed,
    /// It holds none, and the mark is as it was found.
    ClaimFailed,
    /// The VM runs.
    Started,
    /// It stays paused.
    StartFailed,
    /// Post-copy: every page is here.
    PagesComplete,
    /// Post-copy: the VM stands still.
    Paused,
    /// Post-copy: the source is connected again and goes on serving pages.
    Linked,
    /// Post-copy: an operator stops waiting for it.
    GiveUp,
}

/// Where the destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Restoring,
    SendingPrepared,
    AwaitingCommit,
    /// It will not run: the peer is told, if it still listens.
    Telling(Reason),
    Claiming,
    /// From here on the VM is this side's.
    SendingCommitted,
    Starting,
    /// Post-copy, `failed` when the VM could not be started.
    Pulling {
        failed: bool,
    },
    Pausing,
    Unlinked,
    SendingComplete {
        failed: bool,
    },
    Ended(DestinationOutcome),
}

/// The destination's half of a hand-off. It begins when [`Message::Prepare`] has come, and with it
/// all that the source had to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DestinationHandoff {
    mode: Mode,
    state: State,
}

impl DestinationHandoff {
    /// The hand-off and its first action.
    #[must_use]
    pub fn begin(mode: Mode) -> (Self, DestinationAction) {
        let state = State::Restoring;
        (Self { mode, state }, DestinationAction::Restore)
    }

    /// Takes in what came of the last action.
    ///
    /// # Errors
    /// [`Impossible`] when `event` does not answer the last action. Whatever the peer sends does.
    pub fn step(&mut self, event: DestinationEvent) -> Result<DestinationAction, Impossible> {
        let next = match self.state {
            State::Restoring => self.restoring(event),
            State::SendingPrepared => self.sending_prepared(event),
            State::AwaitingCommit => self.awaiting_commit(event),
            State::Telling(reason) => match event {
                DestinationEvent::Sent | DestinationEvent::LinkLost => Some(self.discard(reason)),
                _ => None,
            },
            State::Claiming => self.claiming(event),
            State::SendingCommitted => self.sending_committed(event),
            State::Starting => self.starting(event),
            State::Pulling { failed } => self.pulling(event, failed),
            State::Pausing => match event {
                DestinationEvent::Paused => Some(self.wait_for_link()),
                _ => None,
            },
            State::Unlinked => self.unlinked(event),
            State::SendingComplete { failed } => match event {
                // This side is whole. A source that does not hear it keeps its pages in vain.
                DestinationEvent::Sent | DestinationEvent::LinkLost => Some(self.started(failed)),
                _ => None,
            },
            State::Ended(_) => None,
        };
        next.ok_or_else(|| Impossible::new(&self.state, &event))
    }

    fn restoring(&mut self, event: DestinationEvent) -> Option<DestinationAction> {
        match event {
            DestinationEvent::Restored => {
                self.state = State::SendingPrepared;
                Some(DestinationAction::Send(Message::Prepared))
            }
            DestinationEvent::RestoreFailed => Some(self.abort(Cause::RestoreFailed)),
            DestinationEvent::Cancel => Some(self.abort(Cause::Cancelled)),
            DestinationEvent::LinkLost => Some(self.discard(Reason::LinkLost)),
            _ => None,
        }
    }

    fn sending_prepared(&mut self, event: DestinationEvent) -> Option<DestinationAction> {
        match event {
            DestinationEvent::Sent => {
                self.state = State::AwaitingCommit;
                Some(DestinationAction::Wait(Awaited::Commit))
            }
            DestinationEvent::LinkLost => Some(self.discard(Reason::LinkLost)),
            _ => None,
        }
    }

    fn awaiting_commit(&mut self, event: DestinationEvent) -> Option<DestinationAction> {
        match event {
            DestinationEvent::Received(Message::Commit(mark)) => {
                self.state = State::Claiming;
                Some(DestinationAction::Claim(mark))
            }
            DestinationEvent::Received(Message::Abort(cause)) => {
                Some(self.discard(Reason::Peer(cause)))
            }
            DestinationEvent::Received(_) => Some(self.abort(Cause::Protocol)),
            DestinationEvent::LinkLost => Some(self.discard(Reason::LinkLost)),
            // Said aloud, it spares a source whose Commit is on its way the doubt.
            DestinationEvent::DeadlinePassed => Some(self.abort(Cause::Deadline)),
            DestinationEvent::Cancel => Some(self.abort(Cause::Cancelled)),
            _ => None,
        }
    }

    fn claiming(&mut self, event: DestinationEvent) -> Option<DestinationAction> {
        match event {
            DestinationEvent::Claimed => {
                self.state = State::SendingCommitted;
                Some(DestinationAction::Send(Message::Committed))
            }
            DestinationEvent::ClaimFailed => {
                let cause = Cause::ClaimFailed;
                self.state = State::Telling(Reason::Here(cause));
                Some(DestinationAction::Send(Message::Declined(cause)))
            }
            _ => None,
        }
    }

    fn sending_committed(&mut self, event: DestinationEvent) -> Option<DestinationAction> {
        match (event, self.mode) {
            // Without a link, too: the source has let go, and finds the disks taken.
            (DestinationEvent::Sent, _) | (DestinationEvent::LinkLost, Mode::Precopy) => {
                Some(self.start())
            }
            (DestinationEvent::LinkLost, Mode::Postcopy) => Some(self.wait_for_link()),
            _ => None,
        }
    }

    fn starting(&mut self, event: DestinationEvent) -> Option<DestinationAction> {
        let failed = match event {
            DestinationEvent::Started => false,
            DestinationEvent::StartFailed => true,
            _ => return None,
        };
        Some(match self.mode {
            Mode::Precopy => self.started(failed),
            // Also what does not run wants its memory whole.
            Mode::Postcopy => {
                self.state = State::Pulling { failed };
                DestinationAction::Pull
            }
        })
    }

    fn pulling(&mut self, event: DestinationEvent, failed: bool) -> Option<DestinationAction> {
        match event {
            DestinationEvent::PagesComplete => {
                self.state = State::SendingComplete { failed };
                Some(DestinationAction::Send(Message::Complete))
            }
            DestinationEvent::LinkLost => {
                self.state = State::Pausing;
                Some(DestinationAction::Pause)
            }
            DestinationEvent::Cancel => Some(DestinationAction::Pull),
            _ => None,
        }
    }

    fn unlinked(&mut self, event: DestinationEvent) -> Option<DestinationAction> {
        match event {
            DestinationEvent::Linked => Some(self.start()),
            DestinationEvent::GiveUp => Some(self.discard(Reason::PagesGivenUp)),
            DestinationEvent::Cancel => Some(DestinationAction::Wait(Awaited::Link)),
            _ => None,
        }
    }

    fn abort(&mut self, cause: Cause) -> DestinationAction {
        self.state = State::Telling(Reason::Here(cause));
        DestinationAction::Send(Message::Abort(cause))
    }

    fn start(&mut self) -> DestinationAction {
        self.state = State::Starting;
        DestinationAction::Start
    }

    fn wait_for_link(&mut self) -> DestinationAction {
        self.state = State::Unlinked;
        DestinationAction::Wait(Awaited::Link)
    }

    fn started(&mut self, failed: bool) -> DestinationAction {
        self.finish(if failed {
            DestinationOutcome::StartFailed
        } else {
            DestinationOutcome::Started
        })
    }

    fn discard(&mut self, reason: Reason) -> DestinationAction {
        self.finish(DestinationOutcome::Discarded(reason))
    }

    fn finish(&mut self, outcome: DestinationOutcome) -> DestinationAction {
        self.state = State::Ended(outcome);
        DestinationAction::Finish(outcome)
    }
}
