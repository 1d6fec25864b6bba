//! The world of a hand-off: two processes, a connection, and a disk that one of them may hold.

use migration::handoff::{
    Awaited, DestinationAction, DestinationEvent, DestinationHandoff, DestinationOutcome, Message,
    Mode, SourceAction, SourceEvent, SourceHandoff,
};

/// Who.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Who {
    Source,
    Destination,
    /// A third process that should not touch the disk.
    Stranger,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    pub(crate) alive: bool,
    pub(crate) handoff: SourceHandoff,
    pub(crate) action: SourceAction,
    pub(crate) running: bool,
}

/// How far the destination's process is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// `Prepare` has not come.
    Receiving,
    Handoff(DestinationHandoff, DestinationAction),
    /// It gave up before there was a hand-off.
    Dropped,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Destination {
    pub(crate) alive: bool,
    pub(crate) stage: Stage,
    pub(crate) running: bool,
}

/// One direction of the connection: in order, at any delay, and from the cut on nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Direction {
    pub(crate) queue: Vec<Message>,
    pub(crate) cut: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    pub(crate) there: Direction,
    pub(crate) back: Direction,
    pub(crate) source_left: bool,
    pub(crate) destination_left: bool,
}

impl Link {
    pub(crate) fn broken(&self) -> bool {
        self.there.cut || self.back.cut || self.source_left || self.destination_left
    }

    /// Whether a side that waits may find it lost. A reset or a cut overtakes what is on its way;
    /// a peer that ends in order lets the other read everything.
    pub(crate) fn ends_for(&self, who: Who, peer_alive: bool) -> bool {
        let (queue, peer_left) = match who {
            Who::Source => (&self.back.queue, self.destination_left),
            Who::Destination | Who::Stranger => (&self.there.queue, self.source_left),
        };
        let reset = self.there.cut || self.back.cut || !peer_alive;
        reset || peer_left && queue.is_empty()
    }

    pub(crate) fn send_there(&mut self, message: Message) {
        if !self.there.cut && !self.destination_left {
            self.there.queue.push(message);
        }
    }

    pub(crate) fn send_back(&mut self, message: Message) {
        if !self.back.cut && !self.source_left {
            self.back.queue.push(message);
        }
    }
}

/// The disk that arbitrates.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Disk {
    pub(crate) lockable: bool,
    pub(crate) holder: Option<Who>,
    /// The holder has the lock, but has not looked at the mark yet.
    pub(crate) taking: bool,
    /// Changed by every write and by whoever takes the disk.
    pub(crate) mark: u64,
}

impl Disk {
    pub(crate) fn free(&mut self, who: Who) {
        if self.holder == Some(who) {
            self.holder = None;
            self.taking = false;
        }
    }

    pub(crate) fn lock(&mut self, who: Who) {
        self.holder = Some(who);
        self.taking = true;
    }

    pub(crate) fn is_taking(&self, who: Who) -> bool {
        self.holder == Some(who) && self.taking
    }
}

/// What the properties ask about the past.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Past {
    pub(crate) commit_begun: bool,
    /// The source ran again.
    pub(crate) resumed: bool,
    /// The destination ran.
    pub(crate) ran: bool,
    /// The destination took the VM over.
    pub(crate) claimed: bool,
    pub(crate) cut: bool,
    pub(crate) deadline: bool,
    /// A host could not even do what leaves its VM paused: resume, start, take its disk back.
    pub(crate) stuck: bool,
    /// The destination crashed while the source had not begun to send Commit.
    pub(crate) crashed_early: bool,
    /// Post-copy: an operator gave up.
    pub(crate) given_up: bool,
    pub(crate) source_wrote: bool,
    pub(crate) destination_wrote: bool,
    pub(crate) relinked: bool,
    /// A machine refused an event.
    pub(crate) impossible: bool,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) mode: Mode,
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(crate) link: Link,
    pub(crate) disk: Disk,
    pub(crate) past: Past,
}

impl World {
    /// The source has just paused the VM.
    pub(crate) fn new(mode: Mode, lockable: bool) -> Self {
        let (handoff, action) = SourceHandoff::begin(mode);
        Self {
            mode,
            source: Source {
                alive: true,
                handoff,
                action,
                running: false,
            },
            destination: Destination {
                alive: true,
                stage: Stage::Receiving,
                running: false,
            },
            link: Link::default(),
            disk: Disk {
                lockable,
                holder: lockable.then_some(Who::Source),
                taking: false,
                mark: 0,
            },
            past: Past::default(),
        }
    }

    /// The source's driver answers its action.
    pub(crate) fn tell_source(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::DeadlinePassed => self.past.deadline = true,
            SourceEvent::Resumed => {
                self.source.running = true;
                self.past.resumed = true;
            }
            SourceEvent::ResumeFailed => self.past.stuck = true,
            SourceEvent::GiveUp => self.past.given_up = true,
            _ => {}
        }
        match self.source.handoff.step(event) {
            Ok(action) => self.source.action = action,
            Err(_) => self.past.impossible = true,
        }
        if matches!(
            self.source.action,
            SourceAction::Finish(_) | SourceAction::Wait(Awaited::Link)
        ) {
            self.link.source_left = true;
        }
    }

    /// The destination's driver answers its action.
    pub(crate) fn tell_destination(&mut self, event: DestinationEvent) {
        match event {
            DestinationEvent::DeadlinePassed => self.past.deadline = true,
            DestinationEvent::Claimed => self.past.claimed = true,
            DestinationEvent::Started => {
                self.destination.running = true;
                self.past.ran = true;
            }
            DestinationEvent::StartFailed => self.past.stuck = true,
            DestinationEvent::Paused => self.destination.running = false,
            DestinationEvent::GiveUp => self.past.given_up = true,
            _ => {}
        }
        if let Stage::Handoff(handoff, action) = &mut self.destination.stage {
            match handoff.step(event) {
                Ok(next) => *action = next,
                Err(_) => self.past.impossible = true,
            }
        }
        match self.destination_outcome() {
            Some(DestinationOutcome::Discarded(_)) => self.drop_destination(),
            Some(_) => self.link.destination_left = true,
            None => {}
        }
    }

    /// The destination lets its copy go, and all that belongs to it.
    pub(crate) fn drop_destination(&mut self) {
        self.link.destination_left = true;
        self.destination.running = false;
        self.disk.free(Who::Destination);
    }

    pub(crate) fn destination_outcome(&self) -> Option<DestinationOutcome> {
        match self.destination.stage {
            Stage::Handoff(_, DestinationAction::Finish(outcome)) => Some(outcome),
            Stage::Receiving | Stage::Handoff(..) | Stage::Dropped => None,
        }
    }

    /// Killed: nothing runs, nothing is locked, nobody listens.
    pub(crate) fn crash(&mut self, who: Who) {
        self.disk.free(who);
        if who == Who::Source {
            self.source.alive = false;
            self.source.running = false;
            self.link.source_left = true;
        } else {
            self.past.crashed_early |= !self.past.commit_begun;
            self.destination.alive = false;
            self.destination.running = false;
            self.link.destination_left = true;
        }
    }
}
