//! Post-copy: a new link after the first was cut.
//!
//! The destination alone knows what it has not got. A new control connection shows the token of the
//! first and is told; then the connections for pages are opened as they were at first.

use std::time::Instant;

use super::connect::unexpected;
use super::control::{Control, TICK};
use super::options::SourceError;
use super::switchover::Switchover;
use crate::bitmap::DirtyBitmap;
use crate::handoff::SourceEvent;
use crate::page::PageIndex;
use crate::ports::Channel;
use crate::progress::{MigrationHandle, Observation, Phase};
use crate::wire::message::CONTROL_INDEX;
use crate::wire::{Message, missing};

/// The connections of a new link, but for the control connection, and what is to go over them.
pub(super) struct NewLink {
    pub(super) missing: Vec<DirtyBitmap>,
    pub(super) data: Vec<Box<dyn Channel>>,
    /// For pages that are needed at once. None where nothing is missing.
    pub(super) priority: Option<Box<dyn Channel>>,
}

impl Switchover<'_, '_, '_> {
    /// The machine's halves stand still on both sides until there is a new link, or somebody gives
    /// up.
    pub(super) fn wait_for_link(&mut self) -> SourceEvent {
        self.control.channel.breaker().break_off();
        self.stop_serving();
        log::error!(
            "the connection broke in post-copy: the VM stands still, with parts of its memory here"
        );
        self.handle
            .update(|progress| progress.phase = Phase::Unlinked);
        self.handle.observe(Observation::Cut);
        let mut said = String::new();
        let mut next = Instant::now() + self.retry;
        while !self.gives_up() {
            if Instant::now() < next {
                std::thread::sleep(TICK.min(self.retry));
                continue;
            }
            match self.relink() {
                Ok(link) => {
                    self.note_linked(link);
                    return SourceEvent::Linked;
                }
                Err(error) => {
                    self.control.channel.breaker().break_off();
                    // The same again and again is said once.
                    let text = error.to_string();
                    if text != said {
                        log::warn!(error:% = text; "the destination cannot be reached again so far");
                        said = text;
                    }
                }
            }
            next = Instant::now() + self.retry;
        }
        self.later.given_up = true;
        SourceEvent::GiveUp
    }

    /// An operator no longer waits. In doubt it is enough to cancel: the machine may be nowhere else.
    fn gives_up(&self) -> bool {
        is_given_up(self.handle, !self.later.peer_has_it)
    }

    fn note_linked(&mut self, link: NewLink) {
        self.later.link = Some(link);
        self.later.reconnections += 1;
        self.handle
            .update(|progress| progress.phase = Phase::Postcopy);
        self.handle.observe(Observation::Linked);
    }

    fn relink(&mut self) -> Result<NewLink, SourceError> {
        let (handle, in_doubt) = (self.handle, !self.later.peer_has_it);
        let gives_up = || is_given_up(handle, in_doubt);
        let channel = self.further.open(CONTROL_INDEX, &gives_up)?;
        *self.control = Control::new(channel, self.patience);
        let missing = self.hear_missing(&gives_up)?;
        let (data, priority) = match missing.iter().any(|bitmap| bitmap.runs().next().is_some()) {
            true => self.further.open_data(true, &gives_up)?,
            false => (Vec::new(), None),
        };
        Ok(NewLink {
            missing,
            data,
            priority,
        })
    }

    /// What the destination has not got, by its own word.
    fn hear_missing(
        &mut self,
        gives_up: &dyn Fn() -> bool,
    ) -> Result<Vec<DirtyBitmap>, SourceError> {
        let mut pages = self.rounds.bitmaps(false);
        let mut at = PageIndex(0);
        loop {
            match self.control.receive(self.patience, gives_up)? {
                Message::Missing(list) if list.runs.is_empty() => return Ok(pages),
                // Ascending, so that it has an end.
                Message::Missing(list) => at = missing::mark(&mut pages, &list.runs, at)?,
                other => return Err(unexpected(&other)),
            }
        }
    }
}

fn is_given_up(handle: &MigrationHandle, in_doubt: bool) -> bool {
    handle.is_abandoned() || (in_doubt && handle.is_cancelled())
}
