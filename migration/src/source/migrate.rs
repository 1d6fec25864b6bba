//! A migration from beginning to end, as the source sees it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::connect;
use super::control::Control;
use super::devices::Devices;
use super::handover::Handover;
use super::options::{OnTimeout, SourceError, SourceOptions, SourceReport};
use super::pacer::Pacer;
use super::rounds::{Rounds, micros};
use super::stream::{Shared, Stream, Totals};
use super::switchover::{Ending, Switchover};
use super::workers::{Workers, start_thread};
use crate::handoff::{Cause, Doubt, Outcome, Reason};
use crate::ports::{Breaker, Channel, Dial, DirtyTracker, Machine, PageStore};
use crate::progress::{Blackout, MigrationHandle, Phase, Postcopy, RoundReport};
use crate::wire::Message;
use crate::wire::message::Reasons;
use crate::words;

/// The machine that is to move, through its ports.
pub struct Parts<'a> {
    /// vCPUs and devices.
    pub machine: &'a mut dyn Machine,
    /// Memory.
    pub pages: &'a dyn PageStore,
    /// Who writes to it.
    pub tracker: &'a dyn DirtyTracker,
}

/// Breaks connections off when it is dropped and lets devices go, so that no thread waits on one,
/// or to use one.
pub(super) struct Breakers<'a> {
    pub(super) connections: Vec<Arc<dyn Breaker>>,
    pub(super) pacer: &'a Pacer<'a>,
    pub(super) devices: &'a Devices,
}

impl Drop for Breakers<'_> {
    fn drop(&mut self) {
        self.pacer.end();
        for breaker in &self.connections {
            breaker.break_off();
        }
        self.devices.end();
    }
}

/// What there is to report, whatever the end.
#[derive(Default)]
pub(super) struct Record {
    rounds: Vec<RoundReport>,
    totals: Totals,
    pub(super) blackout: Option<Blackout>,
    pub(super) postcopy: Option<Postcopy>,
    predicted: Option<Duration>,
}

/// Moves the machine over `channel`, the control connection, and further ones that `dial` opens.
///
/// When the report's outcome is `Resumed`, the machine runs at full speed, with nothing logged,
/// and may be tried again. A machine that was paused before is paused afterwards.
pub fn migrate(
    parts: &mut Parts<'_>,
    channel: Box<dyn Channel>,
    dial: &mut dyn Dial,
    options: &SourceOptions,
    handle: &MigrationHandle,
) -> SourceReport {
    let began = Instant::now();
    let mut record = Record::default();
    let mut control = Control::new(channel, options.patience);
    let ending = attempt(parts, &mut control, dial, (options, handle), &mut record);
    let ending = ending.unwrap_or_else(|error| {
        // The peer may be the one that does not listen.
        let reasons = Reasons::one(cause(&error), words::chain(&error));
        let _ = control.send(&Message::Abort(reasons));
        Ending {
            outcome: Outcome::Resumed(reason(&error)),
            error: Some(error),
        }
    });
    control.channel.breaker().break_off();
    let outcome = restore_speed(parts, ending.outcome);
    if outcome == Outcome::Surrendered && options.on_timeout == OnTimeout::Postcopy {
        // There was nothing left for it: that is told, too.
        record.postcopy.get_or_insert_default();
    }
    let totals = &record.totals;
    let pages = totals.mix();
    handle.update(|progress| {
        progress.phase = Phase::Ended;
        progress.pages = pages;
        progress.wire_bytes = totals.wire_bytes.load(Ordering::Relaxed);
        progress.elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        progress.cpu_percent = 100;
    });
    let batches = totals.batches.load(Ordering::Relaxed).max(1);
    let congested = totals.congested.load(Ordering::Relaxed) * 100 / batches;
    SourceReport {
        outcome,
        error: ending.error,
        total: began.elapsed(),
        predicted_blackout: record.predicted,
        blackout: record.blackout,
        postcopy: record.postcopy,
        pages,
        wire_bytes: totals.wire_bytes.load(Ordering::Relaxed),
        device_bytes: totals.device_bytes.load(Ordering::Relaxed),
        streams: options.streams,
        congested_percent: u8::try_from(congested).unwrap_or(100),
        cache_bytes: totals.most_cache_bytes(),
        rounds: record.rounds,
    }
}

fn restore_speed(parts: &mut Parts<'_>, outcome: Outcome) -> Outcome {
    if outcome != Outcome::Surrendered {
        run_as_before(parts);
    }
    outcome
}

/// A machine that stays here runs at full speed, with nothing logged.
pub(super) fn run_as_before(parts: &mut Parts<'_>) {
    let stopped = parts.tracker.stop();
    let full = parts.machine.throttle(100);
    for error in [stopped.err(), full.err()].into_iter().flatten() {
        log::error!(error:% = error; "the VM does not run at full speed after a migration");
    }
}

fn cause(error: &SourceError) -> Cause {
    match error {
        SourceError::Timeout(_)
        | SourceError::FirstRound { .. }
        | SourceError::Distance { .. }
        | SourceError::State { .. }
        | SourceError::DeviceTooLarge { .. }
        | SourceError::DeviceNotReady { .. } => Cause::Deadline,
        SourceError::Unexpected(_) | SourceError::NotDrover(_) | SourceError::Version { .. } => {
            Cause::Protocol
        }
        _ => Cause::Cancelled,
    }
}

fn reason(error: &SourceError) -> Reason {
    match error {
        SourceError::Link(_) | SourceError::Dial { .. } | SourceError::DeviceCut { .. } => {
            Reason::LinkLost
        }
        SourceError::Peer(_) | SourceError::Refused(_) => Reason::Peer(Cause::Cancelled),
        SourceError::Handoff(reason) => *reason,
        _ => Reason::Here(cause(error)),
    }
}

/// Everything; an error means that the machine was not stopped, or runs again.
fn attempt(
    parts: &mut Parts<'_>,
    control: &mut Control,
    dial: &mut dyn Dial,
    (options, handle): (&SourceOptions, &MigrationHandle),
    record: &mut Record,
) -> Result<Ending, SourceError> {
    let blockers = parts.machine.blockers();
    if !blockers.is_empty() {
        return Err(SourceError::Blocked(blockers));
    }
    let devices = &Devices::new(parts.machine.device_sources(), options.streams);
    let mut links = connect::connect(control, dial, (parts, devices.ids()), options, handle)?;
    let channels = links.data.iter().chain(&links.priority);
    let handover = Handover::over(links.round_trip, parts.machine.state_time());
    log::debug!(round_trip_us = micros(links.round_trip); "connected");
    let pacer = Pacer::new(handle);
    let breakers = Breakers {
        connections: channels.map(|channel| channel.breaker()).collect(),
        pacer: &pacer,
        devices,
    };
    let shared = Shared {
        pages: parts.pages,
        direct: parts.pages.direct(),
        tracker: parts.tracker,
        handle,
        pacer: &pacer,
        devices,
        totals: std::mem::take(&mut record.totals),
        streams: u64::from(options.streams),
        encoding: options.encoding,
        cache_bytes: options.cache_bytes,
    };
    let priority = links.priority;
    parts.tracker.start()?;
    let result = std::thread::scope(|scope| {
        // Dropped before the threads are awaited.
        let mut breakers = breakers;
        devices.begin(scope)?;
        let (workers, results) = Workers::start(scope, &shared, links.data)?;
        let mut rounds = Rounds::new(&shared, workers, handover, (options, handle));
        let precopied = rounds.precopy(parts, control, &mut |index| {
            let channel = links.further.reopen(index, &|| handle.is_cancelled())?;
            let place = usize::try_from(index).unwrap_or(usize::MAX);
            if let Some(breaker) = breakers.connections.get_mut(place) {
                *breaker = channel.breaker();
            }
            let stream = Stream::again(&shared, index, channel);
            Ok(start_thread(scope, stream, &results)?)
        });
        // Once all threads have ended, nothing more comes.
        drop(results);
        let ending = precopied.and_then(|last| {
            let links = (links.further, breakers.connections.clone());
            let mut switchover = Switchover::new(&mut rounds, control, links, (options, handle));
            switchover.run(parts, last, priority, record)
        });
        record.rounds = std::mem::take(&mut rounds.reports);
        record.predicted = rounds.predicted;
        drop(breakers);
        ending
    });
    record.totals = shared.totals;
    result
}

/// Lets a machine run again that was stopped before the hand-off began.
pub(super) fn resume(parts: &mut Parts<'_>, error: SourceError) -> Result<Ending, SourceError> {
    match parts.machine.resume() {
        Ok(()) => Err(error),
        Err(failed) => {
            log::error!(error:% = failed; "the VM could not be resumed after a failed migration");
            Ok(Ending {
                outcome: Outcome::InDoubt(Doubt::ResumeFailed(reason(&error))),
                error: Some(error),
            })
        }
    }
}
