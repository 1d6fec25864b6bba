//! The end of a migration: which of two paused copies lives.
//!
//! Both sides are state machines without I/O. A driver performs one action at a time and answers
//! it with what came of it, until the action is `Finish`:
//!
//! ```text
//! let (mut handoff, mut action) = SourceHandoff::begin(mode);
//! loop {
//!     let event = match action {
//!         SourceAction::Send(message) => write(message).map_or(LinkLost, |()| Sent),
//!         SourceAction::Wait(awaited) => next_message_or(deadline_of(awaited)),
//!         ...
//!         SourceAction::Finish(outcome) => return outcome,
//!     };
//!     action = handoff.step(event)?;
//! }
//! ```
//!
//! The rules, what they are built on and how they are checked: `docs/handoff.md`. In short: until
//! it begins to send [`Message::Commit`] the source may resume; afterwards only when the disks' locks
//! or the destination's own word prove that the destination has not run and never will.
//!
//! The model in `tests/handoff_model.rs` drives these very types.

mod destination;
mod message;
mod source;

#[cfg(test)]
mod tests;

pub use destination::{
    DestinationAction, DestinationEvent, DestinationHandoff, DestinationOutcome,
};
pub use message::{Awaited, Cause, Impossible, Mark, Message, Mode, Reason};
pub use source::{Doubt, Outcome, SourceAction, SourceEvent, SourceHandoff};
