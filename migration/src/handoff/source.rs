//! The side that gives the VM away.

use super::{Awaited, Cause, Impossible, Mark, Message, Mode, Reason};
use crate::ports::Reclaim;

/// What has become of the source's copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The VM is the destination's. This copy must never run again.
    Surrendered,
    /// The VM runs on here.
    Resumed(Reason),
    /// This copy is paused and kept. An operator looks at the destination and decides.
    InDoubt(Doubt),
}

/// Why a VM stays paused at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Doubt {
    /// The destination may run it: it was told to, did not answer, and no lock can tell.
    PeerMayRun(Reason),
    /// The destination does not run it, but its disks could not be had back.
    DisksMissing(Reason),
    /// It is this side's alone, but could not be resumed.
    ResumeFailed(Reason),
}

/// What the driver is to do. It answers each with an event; which, is said here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Write it to the connection, to the end: `Sent` or `LinkLost`.
    Send(Message),
    /// Wait: `Received`, `LinkLost`, `DeadlinePassed`, `Cancel`; for a link: `Linked`, `GiveUp`.
    Wait(Awaited),
    /// [`Machine::release`](crate::ports::Machine::release): `Released` or `ReleaseFailed`.
    Release,
    /// [`Machine::reclaim`](crate::ports::Machine::reclaim): `Reclaim` or `ReclaimFailed`.
    Reclaim,
    /// [`Machine::resume`](crate::ports::Machine::resume): `Resumed` or `ResumeFailed`.
    Resume,
    /// Post-copy: serve pages: `Received` when a message of the hand-off comes, or `LinkLost`.
    Serve,
    /// It is over.
    Finish(Outcome),
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// The message is on its way.
    Sent,
    /// The peer's message.
    Received(Message),
    /// The connection is of no use any more. A message that was being sent may have arrived.
    /// While waiting, this comes after the last message that the peer has sent and that can be had.
    LinkLost,
    /// What is waited for did not come in time. While [`SourceHandoff::may_give_up`] it may also
    /// answer an action that was not begun.
    DeadlinePassed,
    /// Somebody asks to give up. While [`SourceHandoff::may_give_up`] it may also answer an action
    /// that was not begun. Later it is ignored.
    Cancel,
    /// The disks are synced and free, and look like this.
    Released(Mark),
    /// They are held as before.
    ReleaseFailed,
    /// What an attempt to take them back showed. Held by the peer is what is locked *and* bears
    /// another mark: a lock alone may be let go again. Unknown is what cannot be locked.
    Reclaim(Reclaim),
    /// The disks can be locked, but who had them last is not clear: locked and the mark is the old
    /// one, or free and it is not. Whatever could be locked stays so.
    ReclaimFailed,
    /// The VM runs.
    Resumed,
    /// It stays paused.
    ResumeFailed,
    /// Post-copy: the destination has connected again and goes on asking for pages.
    Linked,
    /// Post-copy: an operator stops waiting for it.
    GiveUp,
}

/// Where the source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    SendingPrepare,
    AwaitingPrepared,
    Releasing,
    /// From here on the destination may run.
    SendingCommit,
    AwaitingCommitted,
    Reclaiming {
        reason: Reason,
        /// Whether the destination may have run, or may yet.
        peer_may_run: bool,
    },
    Resuming {
        reason: Reason,
        /// What the peer is to be told, if it still listens.
        tell: Option<Cause>,
    },
    Telling(Reason),
    Serving,
    /// Post-copy, the link is cut. In doubt, the destination may not even have started.
    Unlinked {
        doubt: Option<Reason>,
    },
    Ended(Outcome),
}

/// The source's half of a hand-off. It begins when the VM is paused and its last pages and all its
/// sections are on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceHandoff {
    mode: Mode,
    state: State,
}

impl SourceHandoff {
    /// The hand-off and its first action.
    #[must_use]
    pub fn begin(mode: Mode) -> (Self, SourceAction) {
        let state = State::SendingPrepare;
        (Self { mode, state }, SourceAction::Send(Message::Prepare))
    }

    /// Whether the source can still go back of itself. False as soon as it has begun to send
    /// [`Message::Commit`]; while that action stands but was not begun, true.
    #[must_use]
    pub fn may_give_up(&self) -> bool {
        matches!(
            self.state,
            State::SendingPrepare
                | State::AwaitingPrepared
                | State::Releasing
                | State::SendingCommit
        )
    }

    /// Takes in what came of the last action.
    ///
    /// # Errors
    /// [`Impossible`] when `event` does not answer the last action. Whatever the peer sends does.
    pub fn step(&mut self, event: SourceEvent) -> Result<SourceAction, Impossible> {
        let next = match self.state {
            State::SendingPrepare => self.preparing(event),
            State::AwaitingPrepared => self.awaiting_prepared(event),
            State::Releasing => self.releasing(event),
            State::SendingCommit => self.sending_commit(event),
            State::AwaitingCommitted => self.awaiting_committed(event),
            State::Reclaiming { .. } => self.reclaiming(event),
            State::Resuming { .. } => self.resuming(event),
            State::Telling(reason) => match event {
                // The peer notices a lost link by itself.
                SourceEvent::Sent | SourceEvent::LinkLost => {
                    Some(self.finish(Outcome::Resumed(reason)))
                }
                _ => None,
            },
            State::Serving => self.serving(event),
            State::Unlinked { doubt } => self.unlinked(event, doubt),
            State::Ended(_) => None,
        };
        next.ok_or_else(|| Impossible::new(&self.state, &event))
    }

    fn preparing(&mut self, event: SourceEvent) -> Option<SourceAction> {
        match event {
            SourceEvent::Sent => {
                self.state = State::AwaitingPrepared;
                Some(SourceAction::Wait(Awaited::Prepared))
            }
            SourceEvent::LinkLost => Some(self.resume(Reason::LinkLost, None)),
            _ => self.give_up(event),
        }
    }

    fn awaiting_prepared(&mut self, event: SourceEvent) -> Option<SourceAction> {
        match event {
            SourceEvent::Received(Message::Prepared) => {
                self.state = State::Releasing;
                Some(SourceAction::Release)
            }
            SourceEvent::Received(Message::Abort(cause)) => {
                Some(self.resume(Reason::Peer(cause), None))
            }
            SourceEvent::Received(_) => {
                Some(self.resume(Reason::Here(Cause::Protocol), Some(Cause::Protocol)))
            }
            SourceEvent::LinkLost => Some(self.resume(Reason::LinkLost, None)),
            _ => self.give_up(event),
        }
    }

    fn releasing(&mut self, event: SourceEvent) -> Option<SourceAction> {
        match event {
            SourceEvent::Released(mark) => {
                self.state = State::SendingCommit;
                Some(SourceAction::Send(Message::Commit(mark)))
            }
            SourceEvent::ReleaseFailed => {
                let cause = Cause::ReleaseFailed;
                Some(self.resume(Reason::Here(cause), Some(cause)))
            }
            _ => self.give_up(event),
        }
    }

    fn sending_commit(&mut self, event: SourceEvent) -> Option<SourceAction> {
        match event {
            // Lost, it may have arrived; and the peer's last words may still lie there to be read.
            SourceEvent::Sent | SourceEvent::LinkLost => {
                self.state = State::AwaitingCommitted;
                Some(SourceAction::Wait(Awaited::Committed))
            }
            // Not a byte of it has left.
            SourceEvent::Cancel => Some(self.reclaim(Reason::Here(Cause::Cancelled), false)),
            SourceEvent::DeadlinePassed => Some(self.reclaim(Reason::Here(Cause::Deadline), false)),
            _ => None,
        }
    }

    fn awaiting_committed(&mut self, event: SourceEvent) -> Option<SourceAction> {
        match event {
            SourceEvent::Received(Message::Committed) => Some(self.surrender()),
            // Abort: the destination's patience ended before Commit arrived.
            SourceEvent::Received(Message::Declined(cause) | Message::Abort(cause)) => {
                Some(self.reclaim(Reason::Peer(cause), false))
            }
            SourceEvent::Received(_) => Some(self.reclaim(Reason::Here(Cause::Protocol), true)),
            SourceEvent::LinkLost => Some(self.reclaim(Reason::LinkLost, true)),
            SourceEvent::DeadlinePassed => Some(self.reclaim(Reason::Here(Cause::Deadline), true)),
            SourceEvent::Cancel => Some(SourceAction::Wait(Awaited::Committed)),
            _ => None,
        }
    }

    fn reclaiming(&mut self, event: SourceEvent) -> Option<SourceAction> {
        let State::Reclaiming {
            reason,
            peer_may_run,
        } = self.state
        else {
            return None;
        };
        let reclaim = match event {
            SourceEvent::Reclaim(reclaim) => reclaim,
            SourceEvent::ReclaimFailed if peer_may_run => Reclaim::Unknown,
            SourceEvent::ReclaimFailed => {
                return Some(self.finish(Outcome::InDoubt(Doubt::DisksMissing(reason))));
            }
            _ => return None,
        };
        Some(match (reclaim, peer_may_run) {
            (Reclaim::Reclaimed, true) => self.resume(reason, None),
            // With its word that it will not run, a machine without locks is this side's, too.
            (Reclaim::Reclaimed | Reclaim::Unknown, false) => match reason {
                Reason::Here(cause) => self.resume(reason, Some(cause)),
                Reason::LinkLost | Reason::Peer(_) | Reason::PagesGivenUp => {
                    self.resume(reason, None)
                }
            },
            (Reclaim::HeldByPeer, false) => {
                self.finish(Outcome::InDoubt(Doubt::DisksMissing(reason)))
            }
            (Reclaim::HeldByPeer, true) => self.surrender_unlinked(None),
            (Reclaim::Unknown, true) => self.surrender_unlinked(Some(reason)),
        })
    }

    fn resuming(&mut self, event: SourceEvent) -> Option<SourceAction> {
        let State::Resuming { reason, tell } = self.state else {
            return None;
        };
        match (event, tell) {
            (SourceEvent::Resumed, Some(cause)) => {
                self.state = State::Telling(reason);
                Some(SourceAction::Send(Message::Abort(cause)))
            }
            (SourceEvent::Resumed, None) => Some(self.finish(Outcome::Resumed(reason))),
            // The link closes with the hand-off; that tells the peer.
            (SourceEvent::ResumeFailed, _) => {
                Some(self.finish(Outcome::InDoubt(Doubt::ResumeFailed(reason))))
            }
            _ => None,
        }
    }

    fn serving(&mut self, event: SourceEvent) -> Option<SourceAction> {
        match event {
            SourceEvent::Received(Message::Complete) => Some(self.finish(Outcome::Surrendered)),
            // The answer to Commit that a cut link had swallowed.
            SourceEvent::Received(Message::Committed) | SourceEvent::Cancel => {
                Some(SourceAction::Serve)
            }
            // Whatever the peer says now, its pages are kept until it has them or is given up.
            SourceEvent::Received(_) | SourceEvent::LinkLost | SourceEvent::DeadlinePassed => {
                self.state = State::Unlinked { doubt: None };
                Some(SourceAction::Wait(Awaited::Link))
            }
            _ => None,
        }
    }

    fn unlinked(&mut self, event: SourceEvent, doubt: Option<Reason>) -> Option<SourceAction> {
        match event {
            SourceEvent::Linked => {
                self.state = State::Serving;
                Some(SourceAction::Serve)
            }
            SourceEvent::GiveUp => Some(self.finish(match doubt {
                Some(reason) => Outcome::InDoubt(Doubt::PeerMayRun(reason)),
                None => Outcome::Surrendered,
            })),
            SourceEvent::Cancel => Some(SourceAction::Wait(Awaited::Link)),
            _ => None,
        }
    }

    /// Cancel and deadline, while the destination cannot run and nothing was released.
    fn give_up(&mut self, event: SourceEvent) -> Option<SourceAction> {
        let cause = match event {
            SourceEvent::Cancel => Cause::Cancelled,
            SourceEvent::DeadlinePassed => Cause::Deadline,
            _ => return None,
        };
        Some(self.resume(Reason::Here(cause), Some(cause)))
    }

    /// The VM first: the guest waits, the peer need not.
    fn resume(&mut self, reason: Reason, tell: Option<Cause>) -> SourceAction {
        self.state = State::Resuming { reason, tell };
        SourceAction::Resume
    }

    fn reclaim(&mut self, reason: Reason, peer_may_run: bool) -> SourceAction {
        self.state = State::Reclaiming {
            reason,
            peer_may_run,
        };
        SourceAction::Reclaim
    }

    fn surrender(&mut self) -> SourceAction {
        match self.mode {
            Mode::Precopy => self.finish(Outcome::Surrendered),
            Mode::Postcopy => {
                self.state = State::Serving;
                SourceAction::Serve
            }
        }
    }

    /// The destination has the VM or, in doubt, may have it, and there is no link.
    fn surrender_unlinked(&mut self, doubt: Option<Reason>) -> SourceAction {
        match (self.mode, doubt) {
            (Mode::Precopy, None) => self.finish(Outcome::Surrendered),
            (Mode::Precopy, Some(reason)) => {
                self.finish(Outcome::InDoubt(Doubt::PeerMayRun(reason)))
            }
            (Mode::Postcopy, doubt) => {
                self.state = State::Unlinked { doubt };
                SourceAction::Wait(Awaited::Link)
            }
        }
    }

    fn finish(&mut self, outcome: Outcome) -> SourceAction {
        self.state = State::Ended(outcome);
        SourceAction::Finish(outcome)
    }
}
