//! What can happen next: each move yields another world.

use std::fmt;

use migration::handoff::{
    Awaited, DestinationAction, DestinationEvent, DestinationHandoff, Mark, Message, SourceAction,
    SourceEvent,
};
use migration::ports::Reclaim;

use crate::world::{Link, Stage, Who, World};
use crate::{Bug, Hazards};

use DestinationEvent as D;
use SourceEvent as S;

/// A thing that happens, and the world after it.
#[derive(Clone, PartialEq)]
pub(crate) struct Move {
    pub(crate) name: &'static str,
    pub(crate) world: World,
}

/// A path is told by its moves and its last world.
impl fmt::Debug for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Moves out of one world.
pub(crate) struct Moves<'a> {
    hazards: Hazards,
    now: &'a World,
    found: Vec<Move>,
}

impl<'a> Moves<'a> {
    /// Those that the two processes make by themselves: a world without any is at rest.
    pub(crate) fn of_sides(hazards: Hazards, now: &'a World) -> Vec<Move> {
        let mut moves = Self {
            hazards,
            now,
            found: Vec::new(),
        };
        if now.source.alive {
            moves.source();
        }
        if now.destination.alive {
            moves.destination();
        }
        moves.found
    }

    /// Those, and what befalls them and what people ask of them.
    pub(crate) fn all(hazards: Hazards, now: &'a World) -> Vec<Move> {
        let mut moves = Self {
            hazards,
            now,
            found: Self::of_sides(hazards, now),
        };
        moves.fate();
        moves.people();
        moves.found
    }

    fn push(&mut self, name: &'static str, change: impl FnOnce(&mut World)) {
        let mut world = self.now.clone();
        change(&mut world);
        self.found.push(Move { name, world });
    }

    fn source(&mut self) {
        let bug = self.hazards.bug;
        match self.now.source.action {
            SourceAction::Send(message) => self.source_sends(message),
            SourceAction::Wait(Awaited::Link) | SourceAction::Finish(_) => {}
            SourceAction::Wait(_) => {
                self.source_listens();
                if self.hazards.deadlines {
                    self.push("source's deadline", |w| w.tell_source(S::DeadlinePassed));
                }
            }
            SourceAction::Serve => self.source_listens(),
            SourceAction::Release => {
                self.push("source releases", |w| {
                    w.disk.free(Who::Source);
                    let mark = Mark(w.disk.mark);
                    w.tell_source(S::Released(mark));
                });
                if self.hazards.failures {
                    self.push("source cannot release", |w| {
                        w.tell_source(S::ReleaseFailed);
                    });
                }
            }
            SourceAction::Reclaim if bug == Some(Bug::ResumesOnSilence) => {
                self.push("source does not ask", |w| {
                    w.tell_source(S::Reclaim(Reclaim::Reclaimed));
                });
            }
            SourceAction::Reclaim => self.source_reclaims(),
            SourceAction::Resume => {
                self.push("source resumes", |w| w.tell_source(S::Resumed));
                if self.hazards.failures {
                    self.push("source cannot resume", |w| w.tell_source(S::ResumeFailed));
                }
            }
        }
        let waits = matches!(self.now.source.action, SourceAction::Wait(_));
        if self.hazards.deadlines && !waits && self.now.source.handoff.may_give_up() {
            self.push("source is too late", |w| w.tell_source(S::DeadlinePassed));
        }
    }

    fn source_sends(&mut self, message: Message) {
        let commit = matches!(message, Message::Commit(_));
        self.push("source sends", |w| {
            w.past.commit_begun |= commit;
            w.link.send_there(message);
            w.tell_source(S::Sent);
        });
        if self.now.link.broken() {
            self.push("source sends in vain", |w| {
                w.past.commit_begun |= commit;
                w.tell_source(S::LinkLost);
            });
            self.push("source sends, and does not know", |w| {
                w.past.commit_begun |= commit;
                w.link.send_there(message);
                w.tell_source(S::LinkLost);
            });
        }
    }

    fn source_listens(&mut self) {
        if !self.now.link.source_left && !self.now.link.back.queue.is_empty() {
            self.push("source receives", |w| {
                let message = w.link.back.queue.remove(0);
                w.tell_source(S::Received(message));
            });
        }
        let peer = self.now.destination.alive;
        if self.now.link.ends_for(Who::Source, peer) {
            self.push("source loses the link", |w| {
                w.link.source_left = true;
                w.tell_source(S::LinkLost);
            });
        }
    }

    fn source_reclaims(&mut self) {
        let disk = &self.now.disk;
        let released = 0;
        let marked = disk.mark != released || self.hazards.bug == Some(Bug::LockMeansTaken);
        if !disk.lockable {
            self.push("source knows nothing", |w| {
                w.tell_source(S::Reclaim(Reclaim::Unknown));
            });
        } else if disk.is_taking(Who::Source) {
            if disk.mark == released {
                self.push("source takes back", |w| {
                    w.disk.taking = false;
                    w.disk.mark += 1;
                    w.tell_source(S::Reclaim(Reclaim::Reclaimed));
                });
            } else {
                self.push("source finds a change", |w| {
                    w.disk.taking = false;
                    w.tell_source(S::ReclaimFailed);
                });
            }
            if self.hazards.failures {
                self.push("source fails to take back", |w| {
                    w.past.stuck = true;
                    w.disk.free(Who::Source);
                    w.tell_source(S::ReclaimFailed);
                });
            }
        } else if disk.holder.is_none() {
            self.push("source locks", |w| w.disk.lock(Who::Source));
        } else if marked {
            self.push("source finds it taken", |w| {
                w.tell_source(S::Reclaim(Reclaim::HeldByPeer));
            });
        } else {
            self.push("source finds it locked, still", |w| {
                w.tell_source(S::ReclaimFailed);
            });
        }
    }

    fn destination(&mut self) {
        match self.now.destination.stage.clone() {
            Stage::Receiving => self.destination_receives(),
            Stage::Dropped => {}
            Stage::Handoff(_, action) => self.destination_acts(action),
        }
    }

    fn destination_receives(&mut self) {
        if !self.now.link.there.queue.is_empty() {
            self.push("destination receives", |w| {
                w.destination.stage = match w.link.there.queue.remove(0) {
                    Message::Prepare => {
                        let (handoff, action) = DestinationHandoff::begin(w.mode);
                        Stage::Handoff(handoff, action)
                    }
                    _ => Stage::Dropped,
                };
                if w.destination.stage == Stage::Dropped {
                    w.drop_destination();
                }
            });
        }
        let source = self.now.source.alive;
        if self.now.link.ends_for(Who::Destination, source) {
            self.push("destination loses the link", |w| {
                w.destination.stage = Stage::Dropped;
                w.drop_destination();
            });
        }
    }

    fn destination_acts(&mut self, action: DestinationAction) {
        let failures = self.hazards.failures;
        match action {
            DestinationAction::Restore => {
                self.push("destination restores", |w| w.tell_destination(D::Restored));
                if failures {
                    self.push("destination cannot restore", |w| {
                        w.tell_destination(D::RestoreFailed);
                    });
                }
            }
            DestinationAction::Send(message) => self.destination_sends(message),
            DestinationAction::Wait(Awaited::Link) | DestinationAction::Finish(_) => {}
            DestinationAction::Wait(_) => self.destination_listens(),
            DestinationAction::Claim(_) if self.hazards.bug == Some(Bug::StartsUnclaimed) => {
                self.push("destination does not claim", |w| {
                    w.tell_destination(D::Claimed);
                });
            }
            DestinationAction::Claim(mark) => self.destination_claims(mark),
            DestinationAction::Start => {
                self.push("destination starts", |w| w.tell_destination(D::Started));
                if failures {
                    self.push("destination cannot start", |w| {
                        w.tell_destination(D::StartFailed);
                    });
                }
            }
            DestinationAction::Pull => {
                if self.now.source.action == SourceAction::Serve && !self.now.link.broken() {
                    self.push("pages are complete", |w| {
                        w.tell_destination(D::PagesComplete);
                    });
                }
                if self.now.link.broken() {
                    self.push("destination loses the link", |w| {
                        w.link.destination_left = true;
                        w.tell_destination(D::LinkLost);
                    });
                }
            }
            DestinationAction::Pause => {
                self.push("destination pauses", |w| w.tell_destination(D::Paused));
            }
        }
    }

    fn destination_sends(&mut self, message: Message) {
        self.push("destination sends", |w| {
            w.link.send_back(message);
            w.tell_destination(D::Sent);
        });
        if !self.now.link.broken() {
            return;
        }
        if self.hazards.bug == Some(Bug::DropsUnheard) && message == Message::Committed {
            self.push("destination drops what is its own", |w| {
                w.destination.stage = Stage::Dropped;
                w.drop_destination();
            });
            return;
        }
        self.push("destination sends in vain", |w| {
            w.tell_destination(D::LinkLost);
        });
        self.push("destination sends, and does not know", |w| {
            w.link.send_back(message);
            w.tell_destination(D::LinkLost);
        });
    }

    fn destination_listens(&mut self) {
        let link = &self.now.link;
        let ends = link.ends_for(Who::Destination, self.now.source.alive);
        if !link.destination_left && !link.there.queue.is_empty() {
            self.push("destination receives", |w| {
                let message = w.link.there.queue.remove(0);
                w.tell_destination(D::Received(message));
            });
        }
        if self.hazards.bug != Some(Bug::WaitsForever) {
            if ends {
                self.push("destination loses the link", |w| {
                    w.link.destination_left = true;
                    w.tell_destination(D::LinkLost);
                });
            }
            if self.hazards.deadlines {
                self.push("destination's deadline", |w| {
                    w.tell_destination(D::DeadlinePassed);
                });
            }
        }
    }

    fn destination_claims(&mut self, mark: Mark) {
        let disk = &self.now.disk;
        let bug = self.hazards.bug;
        let takes = !disk.lockable || disk.is_taking(Who::Destination);
        let unchanged = !disk.lockable || disk.mark == mark.0 || bug == Some(Bug::ClaimsUnseen);
        if !takes && disk.holder.is_none() {
            self.push("destination locks", |w| w.disk.lock(Who::Destination));
            return;
        }
        if takes && unchanged {
            self.push("destination claims", |w| {
                w.disk.taking = false;
                if w.disk.lockable && bug != Some(Bug::ClaimsUnmarked) {
                    w.disk.mark += 1;
                }
                w.tell_destination(D::Claimed);
            });
            if !self.hazards.failures {
                return;
            }
        }
        // By a lock, by a mark, or by the host.
        self.push("destination cannot claim", |w| {
            w.disk.free(Who::Destination);
            w.tell_destination(D::ClaimFailed);
        });
    }

    /// What happens to the processes, the link and the disk from outside.
    fn fate(&mut self) {
        let now = self.now;
        if self.hazards.crashes && now.source.alive {
            self.push("source crashes", |w| w.crash(Who::Source));
        }
        if self.hazards.crashes && now.destination.alive {
            self.push("destination crashes", |w| w.crash(Who::Destination));
        }
        if self.hazards.cuts {
            self.cuts();
        }
        if now.source.running && !now.past.source_wrote {
            self.push("source writes", |w| {
                w.past.source_wrote = true;
                w.disk.mark += 1;
            });
        }
        if now.destination.running && !now.past.destination_wrote {
            self.push("destination writes", |w| {
                w.past.destination_wrote = true;
                w.disk.mark += 1;
            });
        }
        if self.hazards.stranger && now.disk.lockable && now.disk.holder.is_none() {
            self.push("a stranger locks", |w| {
                w.past.stuck = true;
                w.disk.holder = Some(Who::Stranger);
            });
        }
        self.relink();
    }

    /// Nothing may depend on anybody doing these.
    fn people(&mut self) {
        let source = &self.now.source;
        if source.alive && source.handoff.may_give_up() {
            self.push("source cancels", |w| w.tell_source(S::Cancel));
        }
        if source.alive && source.action == SourceAction::Wait(Awaited::Link) {
            self.push("source gives up", |w| w.tell_source(S::GiveUp));
        }
        let Stage::Handoff(_, action) = self.now.destination.stage else {
            return;
        };
        if !self.now.destination.alive {
            return;
        }
        match action {
            DestinationAction::Restore | DestinationAction::Wait(Awaited::Commit) => {
                self.push("destination cancels", |w| w.tell_destination(D::Cancel));
            }
            DestinationAction::Wait(Awaited::Link) => {
                self.push("destination gives up", |w| w.tell_destination(D::GiveUp));
            }
            _ => {}
        }
    }

    fn cuts(&mut self) {
        if !self.now.link.there.cut {
            for kept in 0..=self.now.link.there.queue.len() {
                self.push("the way there is cut", |w| {
                    w.past.cut = true;
                    w.link.there.cut = true;
                    w.link.there.queue.truncate(kept);
                });
            }
        }
        if !self.now.link.back.cut {
            for kept in 0..=self.now.link.back.queue.len() {
                self.push("the way back is cut", |w| {
                    w.past.cut = true;
                    w.link.back.cut = true;
                    w.link.back.queue.truncate(kept);
                });
            }
        }
    }

    fn relink(&mut self) {
        let now = self.now;
        let source = now.source.alive && now.source.action == SourceAction::Wait(Awaited::Link);
        let destination = now.destination.alive
            && matches!(
                now.destination.stage,
                Stage::Handoff(_, DestinationAction::Wait(Awaited::Link))
            );
        if source && destination && !now.past.relinked {
            self.push("both connect again", |w| {
                w.past.relinked = true;
                w.link = Link::default();
                w.tell_source(S::Linked);
                w.tell_destination(D::Linked);
            });
        }
    }
}
