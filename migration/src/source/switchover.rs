//! The time that the VM stands still: last pages, device states, the hand-off.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::connect::Further;
use super::control::{Control, TICK};
use super::migrate::{Parts, Record, resume};
use super::options::{OnTimeout, SourceError, SourceOptions};
use super::postcopy::Later;
use super::rounds::{LastPages, Rounds, micros};
use crate::bitmap::DirtyBitmap;
use crate::handoff::{
    self, Awaited, Cause, Mode, Outcome, SourceAction, SourceEvent, SourceHandoff,
};
use crate::ports::{Breaker, Channel, PortError, Reclaim};
use crate::progress::{Blackout, MigrationHandle, Phase, Postcopy};
use crate::wire::message::{Commit, Prepare, Reasons};
use crate::wire::{FrameError, Message};
use crate::words;

/// How a migration ended.
pub(super) struct Ending {
    pub(super) outcome: Outcome,
    /// Why the machine is not the destination's.
    pub(super) error: Option<SourceError>,
}

pub(super) struct Switchover<'r, 'a, 'd> {
    pub(super) rounds: &'r mut Rounds<'a>,
    pub(super) control: &'r mut Control,
    pub(super) handle: &'a MigrationHandle,
    /// Opens the connections of a new link.
    pub(super) further: Further<'d>,
    pub(super) patience: Duration,
    pub(super) retry: Duration,
    /// However long the last pages take: a stream that makes no progress still ends it.
    pub(super) forced: bool,
    pub(super) blackout: Blackout,
    pub(super) stopped: Instant,
    pub(super) sections: u32,
    pub(super) mode: Mode,
    pub(super) later: Later,
    /// What the peer said last, when it gave up.
    pub(super) words: Option<String>,
    /// Why the disks could not be let go.
    pub(super) not_released: Option<PortError>,
}

impl<'r, 'a, 'd> Switchover<'r, 'a, 'd> {
    pub(super) fn new(
        rounds: &'r mut Rounds<'a>,
        control: &'r mut Control,
        (further, breakers): (Further<'d>, Vec<Arc<dyn Breaker>>),
        (options, handle): (&SourceOptions, &'a MigrationHandle),
    ) -> Self {
        Self {
            rounds,
            control,
            handle,
            further,
            patience: options.patience,
            retry: options.retry,
            forced: options.on_timeout == OnTimeout::Force,
            blackout: Blackout::default(),
            stopped: Instant::now(),
            sections: 0,
            mode: Mode::Precopy,
            later: Later::over(breakers),
            words: None,
            not_released: None,
        }
    }

    /// Stops the machine, sends the rest and hands over. An error means that it runs again.
    pub(super) fn run(
        &mut self,
        parts: &mut Parts<'_>,
        (dirty, mode): LastPages,
        priority: Option<Box<dyn Channel>>,
        record: &mut Record,
    ) -> Result<Ending, SourceError> {
        self.handle
            .update(|progress| progress.phase = Phase::Switchover);
        self.mode = mode;
        self.stopped = Instant::now();
        parts.machine.pause()?;
        self.blackout.pause_us = micros(self.stopped.elapsed());
        let ending = std::thread::scope(|scope| {
            let spawned = match (mode, priority) {
                (Mode::Postcopy, Some(channel)) => self.start_server(scope, channel),
                (Mode::Postcopy | Mode::Precopy, _) => Ok(()),
            };
            let sent = spawned.map_err(SourceError::from);
            let ending = match sent.and_then(|()| self.send_rest(parts, dirty)) {
                Ok(()) => Ok(self.hand_over(parts)),
                // First the machine; what the peer has to say about it can wait.
                Err(error) => {
                    self.rounds.shared.devices.end();
                    resume(parts, error).map_err(|error| Rounds::explain(self.control, error))
                }
            };
            self.stop_serving();
            ending
        });
        if self.later.began.is_none() {
            self.blackout.total_us = micros(self.stopped.elapsed());
        }
        record.blackout = Some(self.blackout);
        record.postcopy = self.later.report.map(|report| Postcopy {
            reconnections: self.later.reconnections,
            ..report
        });
        ending
    }

    fn send_rest(
        &mut self,
        parts: &mut Parts<'_>,
        mut dirty: Vec<DirtyBitmap>,
    ) -> Result<(), SourceError> {
        let totals = &self.rounds.shared.totals;
        let device_bytes = totals.device_bytes.load(Ordering::Relaxed);
        self.stop_devices()?;
        let begin = Instant::now();
        for (bitmap, last) in dirty.iter_mut().zip(self.rounds.harvest()) {
            bitmap.merge(&last);
        }
        self.blackout.harvest_us = micros(begin.elapsed());
        if self.mode == Mode::Postcopy {
            // The streams only say that they are done; their pages come later.
            let none = self.rounds.bitmaps(false);
            self.later.missing = std::mem::replace(&mut dirty, none);
        }
        self.blackout.pages = Rounds::bytes_of(&dirty) / crate::PAGE_BYTES;
        let sent = |rounds: &Rounds<'_>| {
            let bytes = &rounds.shared.totals.wire_bytes;
            bytes.load(Ordering::Relaxed)
        };
        let (before, begin) = (sent(self.rounds), Instant::now());
        self.rounds.last_round(dirty);
        // Meanwhile the streams are at work.
        let frames = self.save(parts)?;
        self.control.send_bytes(&frames)?;
        self.send_missing()?;
        let (handle, pages) = (self.handle, self.blackout.pages);
        let deadline = Instant::now() + self.patience * 10;
        let (control, forced) = (&mut *self.control, self.forced);
        self.rounds.await_streams(|rounds| {
            if handle.is_cancelled() {
                return Err(SourceError::Cancelled);
            }
            if Instant::now() > deadline && !forced {
                return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
            }
            rounds.shared.devices.check()?;
            rounds.show_life(control, pages)
        })?;
        // Also one that failed right before the end.
        self.rounds.shared.devices.check()?;
        let totals = &self.rounds.shared.totals;
        self.blackout.device_bytes = totals.device_bytes.load(Ordering::Relaxed) - device_bytes;
        self.blackout.pages_us = micros(begin.elapsed());
        self.blackout.wire_bytes = sent(self.rounds) - before;
        Ok(())
    }

    /// Stops devices whose state comes as a stream: only then nobody writes to memory any more.
    fn stop_devices(&mut self) -> Result<(), SourceError> {
        let devices = self.rounds.shared.devices;
        if devices.is_empty() {
            return Ok(());
        }
        let begin = Instant::now();
        let deadline = begin + self.patience * 10;
        devices.stop();
        while !devices.have_stopped(TICK)? {
            if self.handle.is_cancelled() {
                return Err(SourceError::Cancelled);
            }
            if Instant::now() > deadline && !self.forced {
                return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
            }
            self.rounds.show_life(self.control, 0)?;
        }
        self.blackout.devices_us = micros(begin.elapsed());
        Ok(())
    }

    /// The device states as frames.
    fn save(&mut self, parts: &Parts<'_>) -> Result<Vec<u8>, SourceError> {
        let begin = Instant::now();
        let sections = parts.machine.save()?;
        self.sections = u32::try_from(sections.len()).unwrap_or(u32::MAX);
        let mut frames = Vec::new();
        for section in sections {
            frames.extend_from_slice(&Message::Section(section).encode()?);
        }
        self.blackout.save_us = micros(begin.elapsed());
        Ok(frames)
    }

    /// Drives the hand-off to its end.
    fn hand_over(&mut self, parts: &mut Parts<'_>) -> Ending {
        let (mut handoff, mut action) = SourceHandoff::begin(self.mode);
        let mut begin = Instant::now();
        let outcome = loop {
            if handoff.may_give_up()
                && self.handle.is_cancelled()
                && let Ok(next) = handoff.step(SourceEvent::Cancel)
            {
                action = next;
                continue;
            }
            let event = match action {
                SourceAction::Send(message) => self.send(message),
                SourceAction::Wait(Awaited::Link) => self.wait_for_link(),
                SourceAction::Wait(awaited) => self.wait(awaited),
                SourceAction::Serve => self.serve(begin),
                SourceAction::Release => {
                    self.blackout.prepare_us = micros(begin.elapsed());
                    begin = Instant::now();
                    match parts.machine.release() {
                        Ok(mark) => SourceEvent::Released(mark),
                        Err(error) => {
                            let words = words::chain(&error);
                            log::error!(error:% = words; "the disks could not be let go");
                            self.words = Some(words);
                            self.not_released = Some(error);
                            SourceEvent::ReleaseFailed
                        }
                    }
                }
                SourceAction::Reclaim => match parts.machine.reclaim() {
                    Ok(reclaim) => {
                        self.later.peer_has_it |= reclaim == Reclaim::HeldByPeer;
                        SourceEvent::Reclaim(reclaim)
                    }
                    Err(error) => {
                        log::error!(error:% = error; "the disks could not be taken back");
                        SourceEvent::ReclaimFailed
                    }
                },
                SourceAction::Resume => self.resume(parts),
                SourceAction::Finish(outcome) => break outcome,
            };
            action = match handoff.step(event) {
                Ok(action) => action,
                Err(error) => {
                    // A fault of this loop; what stands still can be resumed by an operator.
                    log::error!(error:% = error; "hand-off");
                    let reason = handoff::Reason::Here(Cause::Protocol);
                    break Outcome::InDoubt(handoff::Doubt::PeerMayRun(reason));
                }
            };
        };
        if self.later.began.is_none() {
            self.blackout.commit_us = micros(begin.elapsed());
        }
        self.ending(outcome)
    }

    fn resume(&self, parts: &mut Parts<'_>) -> SourceEvent {
        self.rounds.shared.devices.end();
        match parts.machine.resume() {
            Ok(()) => SourceEvent::Resumed,
            Err(error) => {
                log::error!(error:% = error; "the VM could not be resumed");
                SourceEvent::ResumeFailed
            }
        }
    }

    fn ending(&mut self, outcome: Outcome) -> Ending {
        if outcome == Outcome::Surrendered && self.later.given_up {
            log::error!("the VM's missing pages were given up: it cannot go on at its destination");
            return Ending {
                outcome,
                error: Some(SourceError::PagesGivenUp),
            };
        }
        let error = match outcome {
            Outcome::Surrendered => None,
            Outcome::Resumed(reason) => Some(reason),
            Outcome::InDoubt(
                handoff::Doubt::PeerMayRun(reason)
                | handoff::Doubt::DisksMissing(reason)
                | handoff::Doubt::ResumeFailed(reason),
            ) => Some(reason),
        };
        let (words, not_released) = (self.words.take(), self.not_released.take());
        let error = error.map(|reason| match (reason, words, not_released) {
            (handoff::Reason::Here(Cause::Cancelled), ..) => SourceError::Cancelled,
            (handoff::Reason::Here(Cause::ReleaseFailed), _, Some(error)) => {
                SourceError::Release(error)
            }
            (handoff::Reason::Peer(_), Some(words), _) => SourceError::Peer(words),
            _ => SourceError::Handoff(reason),
        });
        Ending { outcome, error }
    }

    fn send(&mut self, message: handoff::Message) -> SourceEvent {
        let reasons = |cause: Cause, words: Option<String>| {
            Reasons::one(cause, words.unwrap_or_else(|| cause.to_string()))
        };
        let message = match message {
            handoff::Message::Prepare => Message::Prepare(Prepare {
                sections: self.sections,
            }),
            handoff::Message::Commit(mark) => Message::Commit(Commit { mark: mark.0 }),
            handoff::Message::Abort(cause) => Message::Abort(reasons(cause, self.words.clone())),
            // The destination's.
            handoff::Message::Prepared
            | handoff::Message::Committed
            | handoff::Message::Declined(_)
            | handoff::Message::Complete => return SourceEvent::LinkLost,
        };
        match self.control.send(&message) {
            Ok(()) => SourceEvent::Sent,
            Err(error) => {
                log::debug!(error:% = error; "hand-off message was not sent");
                SourceEvent::LinkLost
            }
        }
    }

    fn wait(&mut self, awaited: Awaited) -> SourceEvent {
        // Gigabytes of a device's state may take it long to take over.
        let has_devices = !self.rounds.shared.devices.is_empty();
        let patience = match awaited == Awaited::Prepared && has_devices {
            true => self.patience * 10,
            false => self.patience,
        };
        let deadline = Instant::now() + patience;
        loop {
            // Once the destination may run, only its word counts.
            if awaited == Awaited::Prepared && self.handle.is_cancelled() {
                return SourceEvent::Cancel;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return SourceEvent::DeadlinePassed;
            }
            match self.control.poll(left.min(TICK)) {
                Ok(None) => {}
                Ok(Some(message)) => return SourceEvent::Received(self.understand(message)),
                Err(error @ (FrameError::Invalid(_) | FrameError::Damaged { .. })) => {
                    log::warn!(error:% = error; "the destination's answer cannot be understood");
                    return SourceEvent::LinkLost;
                }
                Err(error) => {
                    log::debug!(error:% = error; "connection lost in the hand-off");
                    return SourceEvent::LinkLost;
                }
            }
        }
    }

    /// A message as the hand-off knows it; one that has no place there becomes one that has none.
    pub(super) fn understand(&mut self, message: Message) -> handoff::Message {
        match message {
            Message::Prepared(prepared) => {
                self.blackout.restore_us = prepared.restore_us;
                handoff::Message::Prepared
            }
            Message::Committed => handoff::Message::Committed,
            Message::Complete(_) => handoff::Message::Complete,
            Message::Abort(reasons) => {
                self.words = Some(reasons.reasons.join("; "));
                handoff::Message::Abort(reasons.cause)
            }
            Message::Declined(reasons) => {
                self.words = Some(reasons.reasons.join("; "));
                handoff::Message::Declined(reasons.cause)
            }
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Offer(_)
            | Message::Accept
            | Message::Refuse(_)
            | Message::Attach(_)
            | Message::StreamEnd
            | Message::Round(_)
            | Message::Section(_)
            | Message::Prepare(_)
            | Message::Commit(_)
            | Message::AcceptPostcopy
            | Message::Missing(_)
            | Message::Fetch(_) => handoff::Message::Prepare,
        }
    }
}
