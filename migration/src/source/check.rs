//! Whether a migration would work, and what it would be like, without one.
//!
//! The destination builds the machine and takes some pages, as it would; then it is told that this
//! was all, throws everything away and goes on waiting. The guest runs undisturbed but for the
//! dirty log, which is kept for less than a second.

use std::time::{Duration, Instant};

use super::connect::{Links, describe, greet};
use super::control::Control;
use super::devices::Devices;
use super::forecast::{Forecast, Load, Prospect, forecast};
use super::handover::Handover;
use super::judge::time_of;
use super::migrate::{Breakers, Parts, run_as_before};
use super::options::{OnTimeout, SourceError, SourceOptions};
use super::pacer::Pacer;
use super::rounds::Rounds;
use super::sample::Sample;
use super::stream::{Shared, Totals};
use super::workers::Workers;
use crate::handoff::Cause;
use crate::page::{PAGE_BYTES, PageRun};
use crate::ports::{Channel, Dial};
use crate::progress::{MigrationHandle, Phase};
use crate::wire::Message;
use crate::wire::message::Reasons;

/// What a destination is told at the end.
const ALL: &str = "it was a check, and the source knows enough";

/// Why a migration that nobody refuses would not be as it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Objection {
    /// Memory takes longer than there is time.
    #[error(
        "memory would not be sent once within {} s: {} MiB are in use, which take some {:.1} s; a longer \
         --timeout, more bandwidth or --on-timeout postcopy help",
        .timeout.as_secs_f64(), .used_bytes >> 20, .needed.as_secs_f64()
    )]
    FirstRound {
        /// What was asked for.
        timeout: Duration,
        /// Bytes of memory that hold data.
        used_bytes: u64,
        /// Time that sending them once takes.
        needed: Duration,
    },
    /// The guest writes too much.
    #[error(
        "it would not converge within {} s: the guest changes {} MiB/s, and {} MiB/s of pages can be sent; a \
         larger --max-downtime, more bandwidth, --on-timeout force or postcopy help",
        .timeout.as_secs_f64(), .dirty_bytes_per_s >> 20, .page_bytes_per_s >> 20
    )]
    Diverges {
        /// What was asked for.
        timeout: Duration,
        /// Bytes of pages that the guest changes per second.
        dirty_bytes_per_s: u64,
        /// Bytes of pages that can be sent per second.
        page_bytes_per_s: u64,
    },
    /// The handing over takes too long.
    #[error(transparent)]
    Handover(SourceError),
    /// It all takes too long.
    #[error(
        "a downtime of {} ms would not be kept: the VM would stand still for some {:.1} ms; a larger \
         --max-downtime or more bandwidth helps",
        .max_downtime.as_secs_f64() * 1e3, .blackout.as_secs_f64() * 1e3
    )]
    Blackout {
        /// What was asked for.
        max_downtime: Duration,
        /// What is expected.
        blackout: Duration,
    },
}

/// What was found out.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// Why the machine cannot leave this host.
    pub blockers: Vec<String>,
    /// Why the destination does not take it.
    pub refusals: Vec<String>,
    /// Why the rest is not known: the connection, the destination's build.
    pub error: Option<SourceError>,
    /// Why it would not be as it was asked for.
    pub objections: Vec<Objection>,
    /// The shortest time that an answer has taken.
    pub round_trip: Option<Duration>,
    /// What was measured; `None` where the machine cannot move.
    pub sample: Option<Sample>,
    /// What it would be like.
    pub forecast: Option<Forecast>,
    /// How long the check took.
    pub total: Duration,
}

impl CheckReport {
    /// Whether it would move as it was asked for.
    #[must_use]
    pub fn would_move(&self) -> bool {
        let reasons = self.blockers.len() + self.refusals.len() + self.objections.len();
        reasons == 0 && self.error.is_none() && self.forecast.is_some()
    }
}

/// Finds out whether [`migrate`](super::migrate) would move the machine, and moves nothing. The
/// destination waits on afterwards.
pub fn check(
    parts: &mut Parts<'_>,
    channel: Box<dyn Channel>,
    dial: &mut dyn Dial,
    options: &SourceOptions,
    handle: &MigrationHandle,
) -> CheckReport {
    let began = Instant::now();
    let mut report = CheckReport {
        blockers: parts.machine.blockers(),
        ..CheckReport::default()
    };
    let mut control = Control::new(channel, options.patience);
    match ask(parts, &mut control, dial, (options, handle), &mut report) {
        Ok(()) => {}
        Err(SourceError::Refused(reasons)) => report.refusals = reasons,
        Err(SourceError::Blocked(reasons)) => report.blockers.extend(reasons),
        Err(error) => report.error = Some(error),
    }
    control.channel.breaker().break_off();
    run_as_before(parts);
    handle.update(|progress| progress.phase = Phase::Ended);
    report.total = began.elapsed();
    report
}

fn ask(
    parts: &mut Parts<'_>,
    control: &mut Control,
    dial: &mut dyn Dial,
    (options, handle): (&SourceOptions, &MigrationHandle),
    report: &mut CheckReport,
) -> Result<(), SourceError> {
    let devices = &Devices::new(parts.machine.device_sources(), options.streams);
    let greeting = greet(control, &devices.ids(), options, handle)?;
    report.round_trip = Some(greeting.round_trip);
    if !greeting.welcome.checks {
        // It goes on waiting as long as nothing is described to it.
        return Err(SourceError::ChecksUnknown);
    }
    describe(control, (parts, devices.ids()), true, options, handle)?;
    let result = match report.blockers.is_empty() {
        true => greeting.open(dial, options, handle).and_then(|links| {
            report.round_trip = Some(links.round_trip);
            measure(parts, control, (links, devices), (options, handle), report)
        }),
        false => Ok(()),
    };
    let _ = control.send(&Message::Abort(Reasons::one(Cause::Cancelled, ALL)));
    result
}

/// Sends some pages, and says what it would be like to send all.
fn measure(
    parts: &mut Parts<'_>,
    control: &mut Control,
    (links, devices): (Links<'_>, &Devices),
    (options, handle): (&SourceOptions, &MigrationHandle),
    report: &mut CheckReport,
) -> Result<(), SourceError> {
    let handover = Handover::over(links.round_trip, parts.machine.state_time());
    let pacer = Pacer::new(handle);
    let channels = links.data.iter().chain(&links.priority);
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
        totals: Totals::default(),
        streams: u64::from(options.streams),
        encoding: options.encoding,
        cache_bytes: 0,
    };
    parts.tracker.start()?;
    let sample = std::thread::scope(|scope| {
        // Dropped before the threads are awaited.
        let breakers = breakers;
        devices.begin(scope)?;
        let (workers, _) = Workers::start(scope, &shared, links.data)?;
        let mut rounds = Rounds::new(&shared, workers, handover, (options, handle));
        let sample = rounds.sample(control);
        drop(breakers);
        sample
    })?;
    let regions = parts.pages.regions();
    let memory_bytes = regions.iter().map(PageRun::bytes).sum::<u64>();
    let (found, objections) = judge(&sample, handover, memory_bytes, (options, handle));
    report.forecast = Some(found);
    report.objections = objections;
    report.sample = Some(sample);
    Ok(())
}

/// What it would be like, and what is not as it was asked for.
fn judge(
    sample: &Sample,
    handover: Handover,
    memory_bytes: u64,
    (options, handle): (&SourceOptions, &MigrationHandle),
) -> (Forecast, Vec<Objection>) {
    let max_downtime = handle.tuning().max_downtime;
    let mut limits = handover.limits(max_downtime);
    let rate = sample.link_bytes_per_s;
    let device_time = rate.map_or(Duration::ZERO, |rate| time_of(sample.device_bytes, rate));
    limits.fixed = limits.fixed.saturating_add(device_time);
    let load = Load {
        pages: sample.used_bytes / PAGE_BYTES,
        memory_pages: memory_bytes / PAGE_BYTES,
        page_time: sample.page_time,
        growth: sample.growth.clone(),
        timeout: options.timeout,
    };
    let mut found = forecast(&load, &limits);
    let is_later = found.prospect != Prospect::Converges;
    if is_later && options.on_timeout == OnTimeout::Postcopy {
        // What is left comes after the start.
        found.blackout = limits.fixed;
    }
    let mut objections = Vec::new();
    // Where no downtime is left for pages, that is what there is to be said.
    let is_of_pages = limits.fixed <= max_downtime || found.prospect != Prospect::Diverges;
    if is_later && is_of_pages && options.on_timeout == OnTimeout::Cancel {
        objections.push(unfinished(&load, &found));
    }
    if handover.is_beyond(max_downtime) {
        objections.push(Objection::Handover(handover.refusal(max_downtime)));
    } else if let (Some(rate), Some((id, bytes))) = (rate, &sample.largest_device)
        && limits.fixed > max_downtime
    {
        objections.push(Objection::Handover(SourceError::DeviceTooLarge {
            max_downtime,
            needed: device_time,
            bytes_per_s: rate,
            id: id.clone(),
            bytes: *bytes,
        }));
    } else if found.blackout > max_downtime && objections.is_empty() {
        objections.push(Objection::Blackout {
            max_downtime,
            blackout: found.blackout,
        });
    }
    (found, objections)
}

fn unfinished(load: &Load, found: &Forecast) -> Objection {
    let once = super::forecast::times(load.page_time, load.pages);
    match found.prospect {
        Prospect::FirstRound => Objection::FirstRound {
            timeout: load.timeout,
            used_bytes: load.pages * PAGE_BYTES,
            needed: once,
        },
        Prospect::Converges | Prospect::Diverges | Prospect::Late => Objection::Diverges {
            timeout: load.timeout,
            dirty_bytes_per_s: load.growth.bytes_per_s(),
            page_bytes_per_s: load.page_bytes_per_s(),
        },
    }
}
