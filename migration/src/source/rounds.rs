//! Pre-copy: rounds over memory that changes meanwhile.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::control::Control;
use super::handover::Handover;
use super::judge::{Hold, Trend};
use super::migrate::Parts;
use super::options::{OnTimeout, SourceError, SourceOptions};
use super::plan::{Cut, RoundPlan, Task};
use super::stream::Shared;
use super::workers::{Reopen, Workers};
use crate::bitmap::DirtyBitmap;
use crate::handoff::Mode;
use crate::page::{PAGE_BYTES, PageRun};
use crate::progress::{MigrationHandle, Observation, PageMix, Phase, RoundReport};
use crate::wire::Message;
use crate::wire::message::Round;

/// How often the peer gets a sign of life.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// How long a failed stream's peer may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Rounds with fewer bytes say little about the speed of the link: hosts take as much at once.
const TELLING_BYTES: u64 = 4 << 20;

/// How often watchers get new figures.
const REFRESH: Duration = Duration::from_millis(200);

/// Pages that are dirty when the machine is stopped, and when they travel.
pub(super) type LastPages = (Vec<DirtyBitmap>, Mode);

/// Counts at some moment.
#[derive(Clone, Copy)]
struct Tally {
    at: Instant,
    wire_bytes: u64,
    device_bytes: u64,
    pages: PageMix,
}

/// A round that is over.
struct Sent {
    report: RoundReport,
    plan: Arc<RoundPlan>,
    /// Connections that broke and were opened again.
    lost: Vec<u64>,
}

/// The coordinator of a migration.
pub(super) struct Rounds<'a> {
    pub(super) shared: &'a Shared<'a>,
    pub(super) reports: Vec<RoundReport>,
    pub(super) predicted: Option<Duration>,
    pub(super) workers: Workers,
    pub(super) handover: Handover,
    pub(super) options: &'a SourceOptions,
    pub(super) handle: &'a MigrationHandle,
    pub(super) regions: Vec<PageRun>,
    pub(super) began: Instant,
    pub(super) cpu_percent: u8,
    pub(super) number: u32,
    /// How many connections were opened again.
    pub(super) reopened: usize,
    /// The first report that convergence is judged by: those before are of a round in which a
    /// connection broke, and earlier.
    pub(super) judged_from: usize,
    /// Whether the connections were found to carry before the round that is being sent.
    pub(super) is_settled: bool,
    /// What devices mean for the machine's stop, as of the last round.
    pub(super) hold: Hold,
    pub(super) trend: Trend,
    /// Bytes per second that the connections carried when they were last at work for long.
    pub(super) link_rate: Option<u64>,
    /// For the link's speed as watchers see it.
    refreshed: Tally,
    sign_of_life: Instant,
}

impl<'a> Rounds<'a> {
    pub(super) fn new(
        shared: &'a Shared<'a>,
        workers: Workers,
        handover: Handover,
        (options, handle): (&'a SourceOptions, &'a MigrationHandle),
    ) -> Self {
        let regions = shared.pages.regions();
        let memory_bytes = regions.iter().map(PageRun::bytes).sum();
        handle.update(|progress| {
            progress.phase = Phase::Precopy;
            progress.streams = options.streams;
            progress.memory_bytes = memory_bytes;
            progress.cpu_percent = 100;
        });
        let now = Instant::now();
        Self {
            shared,
            reports: Vec::new(),
            predicted: None,
            workers,
            handover,
            options,
            handle,
            regions,
            began: now,
            cpu_percent: 100,
            number: 0,
            reopened: 0,
            judged_from: 0,
            is_settled: false,
            hold: Hold::default(),
            trend: Trend::default(),
            link_rate: None,
            refreshed: Tally {
                at: now,
                wire_bytes: 0,
                device_bytes: 0,
                pages: PageMix::default(),
            },
            sign_of_life: now,
        }
    }

    /// A clean or a full bitmap per region.
    pub(super) fn bitmaps(&self, full: bool) -> Vec<DirtyBitmap> {
        let bitmap = |region: &PageRun| {
            let mut bitmap = DirtyBitmap::new(region.start, region.count);
            if full {
                bitmap.fill();
            }
            bitmap
        };
        self.regions.iter().map(bitmap).collect()
    }

    /// Sends rounds until the machine is to be stopped; returns the pages that are dirty then, to
    /// which those of the last harvest are to be added. Connections that break meanwhile are opened
    /// again by `reopen`.
    pub(super) fn precopy(
        &mut self,
        parts: &mut Parts<'_>,
        control: &mut Control,
        reopen: &mut Reopen<'_>,
    ) -> Result<LastPages, SourceError> {
        // What a tracker may report at first is re-armed with everything else.
        drop(self.harvest());
        parts.machine.throttle(self.cpu_percent)?;
        let mut dirty = self.bitmaps(true);
        loop {
            let round = self.round(dirty, control, reopen);
            let Sent { report, plan, lost } =
                round.map_err(|error| Self::explain(control, error))?;
            if self.handle.is_cancelled() {
                return Err(SourceError::Cancelled);
            }
            dirty = self.harvest();
            plan.cut.merge_into(&mut dirty);
            drop(plan);
            let dirty_pages = dirty.iter().map(DirtyBitmap::count).sum();
            self.reports.push(RoundReport {
                dirty_pages,
                cpu_percent: self.cpu_percent,
                ..report
            });
            self.send_again(&lost, &mut dirty);
            if let Some(mode) = self.after_round()? {
                let settled = self.settle((control, reopen), (&mut dirty, mode));
                if settled.map_err(|error| Self::explain(control, error))? {
                    return Ok((dirty, mode));
                }
            } else {
                self.is_settled = false;
                self.wait_for_devices(control, dirty_pages)?;
            }
            parts.machine.throttle(self.cpu_percent)?;
        }
    }

    pub(super) fn is_late(&self) -> bool {
        self.began.elapsed() > self.options.timeout
    }

    /// Pages that were written since the last harvest.
    pub(super) fn harvest(&self) -> Vec<DirtyBitmap> {
        let mut bitmaps = self.bitmaps(false);
        for bitmap in &mut bitmaps {
            if let Err(error) = self.shared.tracker.harvest(bitmap) {
                log::warn!(error:% = error; "the dirty log cannot be read, all pages are sent again");
                bitmap.fill();
            }
        }
        bitmaps
    }

    /// Sends pages while the guest runs, all of them unless the time is up, or those of a
    /// connection that breaks.
    fn round(
        &mut self,
        dirty: Vec<DirtyBitmap>,
        control: &mut Control,
        reopen: &mut Reopen<'_>,
    ) -> Result<Sent, SourceError> {
        self.number += 1;
        let pages = dirty.iter().map(DirtyBitmap::count).sum();
        let number = self.number;
        self.tell_round(control, pages)?;
        self.handle.update(|progress| progress.round = number);
        let begin = self.tally();
        self.shared.devices.read_on();
        let plan = self.order(RoundPlan {
            number,
            dirty,
            running: true,
            last: false,
            remember: true,
            whole: false,
            cut: Cut::default(),
        });
        let lost = self.await_or_reopen(control, pages, reopen, |rounds| {
            if rounds.is_late() {
                plan.cut.make();
                rounds.shared.devices.cut();
            }
        })?;
        self.shared.devices.check()?;
        let report = self.report_since(begin);
        self.note_rate(report.wire_bytes);
        Ok(Sent { report, plan, lost })
    }

    /// Sends the last pages; the guest stands still.
    pub(super) fn last_round(&mut self, dirty: Vec<DirtyBitmap>) {
        self.number += 1;
        self.order(RoundPlan {
            number: self.number,
            dirty,
            running: false,
            last: true,
            remember: false,
            whole: false,
            cut: Cut::default(),
        });
    }

    /// Sends the pages that a post-copy has left; the machine is the destination's.
    pub(super) fn push(&mut self, missing: Vec<DirtyBitmap>) {
        self.number += 1;
        self.order(RoundPlan {
            number: self.number,
            dirty: missing,
            running: false,
            last: true,
            remember: false,
            whole: true,
            cut: Cut::default(),
        });
    }

    /// Goes on with other connections, in a post-copy; the threads of those before end.
    pub(super) fn replace_workers(&mut self, workers: Workers) {
        self.workers = workers;
    }

    /// What has become of the streams within `wait`: how many have done what they were told.
    pub(super) fn streams_done(&self, wait: Duration) -> Result<usize, SourceError> {
        self.workers.done(wait)
    }

    /// How many data connections there are.
    pub(super) fn streams(&self) -> usize {
        self.workers.count()
    }

    fn order(&self, plan: RoundPlan) -> Arc<RoundPlan> {
        self.shared.totals.done_pages.store(0, Ordering::Relaxed);
        self.shared.totals.sending_us.store(0, Ordering::Relaxed);
        let plan = Arc::new(plan);
        self.workers.order(&Task::Round(Arc::clone(&plan)));
        plan
    }

    /// Waits for all streams, calling `watch` now and then.
    pub(super) fn await_streams(
        &mut self,
        mut watch: impl FnMut(&mut Self) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let mut left = self.workers.count();
        while left > 0 {
            match self.workers.next()? {
                Some((_, Ok(()))) => left -= 1,
                // Maybe because of a device.
                Some((_, Err(error))) => {
                    return Err(self.shared.devices.check().err().unwrap_or(error));
                }
                None => watch(self)?,
            }
        }
        Ok(())
    }

    /// Whether it is still to go on.
    pub(super) fn check_wanted(&self) -> Result<(), SourceError> {
        if self.handle.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        match self.options.on_timeout {
            OnTimeout::Cancel if self.is_late() => Err(self.too_late()),
            OnTimeout::Cancel | OnTimeout::Force | OnTimeout::Postcopy => Ok(()),
        }
    }

    pub(super) fn watch(&mut self, control: &mut Control, pages: u64) -> Result<(), SourceError> {
        self.check_wanted()?;
        self.shared.devices.check()?;
        listen(control, Duration::ZERO)?;
        self.show_life(control, pages)?;
        self.show_push(pages);
        Ok(())
    }

    /// The peer waits on the control connection, where nothing comes while pages are sent.
    pub(super) fn show_life(
        &mut self,
        control: &mut Control,
        pages: u64,
    ) -> Result<(), SourceError> {
        if self.sign_of_life.elapsed() >= SIGN_OF_LIFE {
            self.tell_round(control, pages)?;
        }
        Ok(())
    }

    /// Tells the peer which round this is.
    pub(super) fn tell_round(
        &mut self,
        control: &mut Control,
        pages: u64,
    ) -> Result<(), SourceError> {
        let number = self.number;
        control.tell(&Message::Round(Round { number, pages }))?;
        self.sign_of_life = Instant::now();
        Ok(())
    }

    fn tally(&self) -> Tally {
        Tally {
            at: Instant::now(),
            wire_bytes: self.shared.totals.wire_bytes.load(Ordering::Relaxed),
            device_bytes: self.shared.totals.device_bytes.load(Ordering::Relaxed),
            pages: self.shared.totals.mix(),
        }
    }

    fn report_since(&self, begin: Tally) -> RoundReport {
        let now = self.tally();
        RoundReport {
            number: self.number,
            pages: PageMix {
                zero: now.pages.zero - begin.pages.zero,
                raw: now.pages.raw - begin.pages.raw,
                lz4: now.pages.lz4 - begin.pages.lz4,
                delta: now.pages.delta - begin.pages.delta,
            },
            wire_bytes: now.wire_bytes - begin.wire_bytes,
            device_bytes: now.device_bytes - begin.device_bytes,
            duration_us: micros(now.at - begin.at),
            ..RoundReport::default()
        }
    }

    /// A round of so many bytes is over: how fast they went where they went longest.
    fn note_rate(&mut self, wire_bytes: u64) {
        let micros = self.shared.totals.sending_us.load(Ordering::Relaxed);
        if wire_bytes >= TELLING_BYTES {
            let rate = u128::from(wire_bytes) * 1_000_000 / u128::from(micros.max(1));
            self.link_rate = Some(u64::try_from(rate).unwrap_or(u64::MAX));
        }
    }

    /// New figures for watchers.
    fn refresh(&mut self) {
        let now = self.tally();
        let before = std::mem::replace(&mut self.refreshed, now);
        let rate = RoundReport {
            wire_bytes: now.wire_bytes - before.wire_bytes,
            duration_us: micros(now.at - before.at),
            ..RoundReport::default()
        };
        let cache_bytes = self.shared.totals.cache_bytes();
        let elapsed = self.began.elapsed().as_millis();
        self.handle.update(|progress| {
            progress.pages = now.pages;
            progress.wire_bytes = now.wire_bytes;
            progress.link_bytes_per_s = rate.link_bytes_per_s();
            progress.cache_bytes = cache_bytes;
            progress.elapsed_ms = u64::try_from(elapsed).unwrap_or(u64::MAX);
        });
    }

    /// What a finished round has shown.
    pub(super) fn publish(&mut self, predicted: Duration) {
        let Some(last) = self.reports.last().copied() else {
            return;
        };
        self.handle.observe(Observation::Round(last));
        log::debug!(
            round = last.number, pages = last.pages.total(), wire_bytes = last.wire_bytes,
            duration_us = last.duration_us, dirty_pages = last.dirty_pages,
            predicted_us = micros(predicted); "round of pre-copy");
        self.handle.update(|progress| {
            progress.remaining_pages = last.dirty_pages;
            progress.dirty_bytes_per_s = last.dirty_bytes_per_s();
            progress.predicted_blackout_us = Some(micros(predicted));
            progress.cpu_percent = last.cpu_percent;
        });
        if self.refreshed.at.elapsed() >= REFRESH {
            self.refresh();
        }
    }

    /// A stream has failed: the peer's own words say more, if there are any.
    pub(super) fn explain(control: &mut Control, error: SourceError) -> SourceError {
        match error {
            SourceError::Link(_) | SourceError::DeviceCut { .. } => {
                match listen(control, LAST_WORDS) {
                    Err(words @ SourceError::Peer(_)) => words,
                    Ok(()) | Err(_) => error,
                }
            }
            error => error,
        }
    }

    /// New figures while pages are pushed, now and then.
    pub(super) fn show_push(&mut self, pages: u64) {
        if self.refreshed.at.elapsed() >= REFRESH {
            let done = self.shared.totals.done_pages.load(Ordering::Relaxed);
            self.handle
                .update(|progress| progress.remaining_pages = pages.saturating_sub(done));
            self.refresh();
        }
    }

    /// Bytes that pages of these bitmaps have.
    pub(super) fn bytes_of(dirty: &[DirtyBitmap]) -> u64 {
        dirty.iter().map(DirtyBitmap::count).sum::<u64>() * PAGE_BYTES
    }
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Whether the peer has given up meanwhile.
pub(super) fn listen(control: &mut Control, time: Duration) -> Result<(), SourceError> {
    match control.poll(time)? {
        None => Ok(()),
        Some(Message::Abort(reasons)) => Err(SourceError::Peer(reasons.reasons.join("; "))),
        Some(other) => Err(super::connect::unexpected(&other)),
    }
}
