//! From a running machine to image and manifest.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::checks::ChunkChecks;
use super::devices::{DeviceRecord, Streams};
use super::image::{Image, Writer};
use super::layout::{ImageLayout, LayoutError};
use crate::bitmap::DirtyBitmap;
use crate::convergence::{Decision, Limits, decide};
use crate::page::{PAGE_BYTES, PageIndex, PageRun};
use crate::ports::{PageStore, PortError};
use crate::progress::{PageMix, RoundReport};
use crate::section::Section;
use crate::source::Parts;

/// Pages that are re-armed at once: whole words of a dirty log.
const REARM_PAGES: u64 = 1024;

/// Pages that are read and written at once.
const BATCH_PAGES: u64 = 64;

/// Memory for the last pages, which are written when the machine runs again. What is more is
/// written while it stands still.
const MAX_HELD_BYTES: u64 = 512 << 20;

/// What stopping and saving take, as long as nothing is known.
const FIXED: Duration = Duration::from_millis(1);

/// How a snapshot is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakeOptions {
    /// How long the machine may stand still. It is slowed down if it must, and stands still for
    /// longer if that does not help.
    pub max_downtime: Duration,
    /// How long memory may be copied before it is stopped all the same, after the round that is under
    /// way: what that has left would have to be written while the machine stands still.
    pub patience: Duration,
}

/// How long the machine stood still, part by part, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct StandStill {
    /// All of it.
    pub total_us: u64,
    /// Stopping vCPUs and devices.
    pub pause_us: u64,
    /// Reading the last pages.
    pub pages_us: u64,
    /// Saving device states.
    pub save_us: u64,
    /// Reading the rest of those that come as streams.
    #[serde(default)]
    pub devices_us: u64,
    /// Its bytes.
    #[serde(default)]
    pub device_bytes: u64,
    /// Making disks durable.
    pub disks_us: u64,
    /// Pages read meanwhile.
    pub pages: u64,
}

/// There is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// Devices whose state cannot be saved.
    #[error("the VM's state cannot be saved: {}", .0.join("; "))]
    Blocked(Vec<String>),
    /// This host.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The image could not be written.
    #[error("guest memory cannot be written to the snapshot")]
    Image(#[source] io::Error),
    /// Memory is laid out in a way that has no image.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A device's state cannot be read.
    #[error("{device}")]
    Device {
        /// Its id.
        device: String,
        /// Why.
        #[source]
        source: PortError,
    },
    /// A device's state could not be written.
    #[error("the state of {device} cannot be written to the snapshot")]
    DeviceImage {
        /// Its id.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody asked for it.
    #[error("it was cancelled")]
    Cancelled,
    /// The machine stands still.
    #[error("the VM could not be resumed")]
    NotResumed(#[source] PortError),
}

/// A machine at one moment; its memory is in the image.
#[derive(Debug)]
pub struct Taken {
    /// Description of the machine.
    pub skeleton: Vec<u8>,
    /// States of vCPUs, clock and devices.
    pub sections: Vec<Section>,
    /// Devices whose states are in the image.
    pub devices: Vec<DeviceRecord>,
    /// Where memory lies in the image.
    pub layout: ImageLayout,
    /// Check sums of the image.
    pub checks: ChunkChecks,
    /// The rounds before it stood still.
    pub rounds: Vec<RoundReport>,
    /// How long it stood still.
    pub still: StandStill,
    /// Bytes written to the image, those written twice included.
    pub written_bytes: u64,
}

/// Takes a snapshot of a machine, which goes on afterwards at full speed, with nothing logged. One
/// that was paused stays so. `settle` is called while it stands still, after its state was saved.
///
/// # Errors
/// [`TakeError`]; the machine goes on all the same, but for [`TakeError::NotResumed`].
pub fn take(
    parts: &mut Parts<'_>,
    image: &mut dyn Image,
    settle: Settle<'_>,
    cancelled: &dyn Fn() -> bool,
    options: &TakeOptions,
) -> Result<Taken, TakeError> {
    let blockers = parts.machine.blockers();
    if !blockers.is_empty() {
        return Err(TakeError::Blocked(blockers));
    }
    let layout = ImageLayout::new(&parts.pages.regions())?;
    let mut writer = Writer::new(image, layout);
    let mut streams = Streams::new(parts.machine.device_sources());
    parts.tracker.start()?;
    let result = streams.begin().and_then(|()| {
        let (dirty, rounds) = precopy(parts, (&mut writer, &mut streams), cancelled, options)?;
        let to = (&mut writer, &mut streams);
        let (still, saved, held) = stand_still(parts, to, (settle, cancelled), dirty)?;
        Ok((rounds, still, saved, held))
    });
    streams.end();
    full_speed(parts);
    let (rounds, still, (skeleton, sections), held) = result?;
    for (run, range) in &held.runs {
        let bytes = held.buffer.get(range.clone());
        writer.store(*run, bytes.unwrap_or_default())?;
    }
    Ok(Taken {
        skeleton,
        sections,
        devices: streams.records(),
        checks: writer.checks.seal(),
        layout: writer.layout,
        rounds,
        still,
        written_bytes: writer.written_bytes,
    })
}

fn full_speed(parts: &mut Parts<'_>) {
    let stopped = parts.tracker.stop();
    let full = parts.machine.throttle(100);
    for error in [stopped.err(), full.err()].into_iter().flatten() {
        log::error!(error:% = error; "the VM does not run at full speed after a snapshot");
    }
}

/// Writes pages until few are left; returns those.
fn precopy(
    parts: &mut Parts<'_>,
    (writer, streams): (&mut Writer<'_>, &mut Streams),
    cancelled: &dyn Fn() -> bool,
    options: &TakeOptions,
) -> Result<(Vec<DirtyBitmap>, Vec<RoundReport>), TakeError> {
    let began = Instant::now();
    let limits = Limits {
        max_downtime: options.max_downtime,
        fixed: FIXED,
    };
    let mut rounds = Vec::new();
    let mut cpu_percent = 100;
    // What a tracker may report at first is re-armed with everything else.
    drop(harvest(parts, &writer.layout));
    parts.machine.throttle(cpu_percent)?;
    let mut dirty: Vec<_> = harvest_all(&writer.layout);
    loop {
        let (round_began, before) = (Instant::now(), writer.written_bytes);
        let mut pages = 0;
        each_run(parts, &dirty, Some(cancelled), |parts, run, is_data| {
            pages += run.count;
            writer.copy(parts.pages, run, is_data)
        })?;
        let device_bytes = streams.read_early(writer.image, cancelled)?;
        dirty = harvest(parts, &writer.layout);
        let written = (writer.written_bytes - before) / PAGE_BYTES;
        rounds.push(RoundReport {
            number: u32::try_from(rounds.len())
                .unwrap_or(u32::MAX)
                .saturating_add(1),
            pages: PageMix {
                raw: written,
                zero: pages - written.min(pages),
                ..PageMix::default()
            },
            wire_bytes: writer.written_bytes - before,
            device_bytes,
            duration_us: micros(round_began.elapsed()),
            dirty_pages: dirty.iter().map(DirtyBitmap::count).sum(),
            cpu_percent,
        });
        match decide(&rounds, &limits) {
            Decision::Switchover | Decision::Diverges => return Ok((dirty, rounds)),
            _ if began.elapsed() > options.patience => return Ok((dirty, rounds)),
            Decision::Continue => {}
            Decision::Throttle(percent) => {
                log::info!(percent; "the guest is slowed down: it writes faster than the snapshot");
                cpu_percent = percent;
            }
        }
        parts.machine.throttle(cpu_percent)?;
    }
}

/// What is to be done while the machine stands still.
type Settle<'a> = &'a mut dyn FnMut() -> Result<(), PortError>;

type Saved = (Vec<u8>, Vec<Section>);

/// Stops the machine, reads what is left, and lets it go on whatever happens.
fn stand_still(
    parts: &mut Parts<'_>,
    (writer, streams): (&mut Writer<'_>, &mut Streams),
    (settle, cancelled): (Settle<'_>, &dyn Fn() -> bool),
    mut dirty: Vec<DirtyBitmap>,
) -> Result<(StandStill, Saved, Held), TakeError> {
    let mut still = StandStill::default();
    let expected: u64 = dirty.iter().map(DirtyBitmap::count).sum();
    let mut held = Held::with_room(expected * PAGE_BYTES * 5 / 4 + (1 << 20));
    let stopped = Instant::now();
    parts.machine.pause()?;
    still.pause_us = micros(stopped.elapsed());
    let mut read_rest = || -> Result<Saved, TakeError> {
        // Until then they may write to memory.
        streams.stop()?;
        let begin = Instant::now();
        for (bitmap, last) in dirty.iter_mut().zip(harvest(parts, &writer.layout)) {
            bitmap.merge(&last);
        }
        each_run(parts, &dirty, None, |parts, run, is_data| {
            still.pages += run.count;
            match held.read(parts.pages, run, is_data)? {
                true => Ok(()),
                false => writer.copy(parts.pages, run, is_data),
            }
        })?;
        still.pages_us = micros(begin.elapsed());
        let begin = Instant::now();
        still.device_bytes = streams.read_rest(writer.image, cancelled)?;
        still.devices_us = micros(begin.elapsed());
        let begin = Instant::now();
        let saved = (parts.machine.skeleton()?, parts.machine.save()?);
        still.save_us = micros(begin.elapsed());
        let begin = Instant::now();
        settle()?;
        still.disks_us = micros(begin.elapsed());
        Ok(saved)
    };
    let saved = read_rest();
    streams.end();
    let resumed = parts.machine.resume();
    still.total_us = micros(stopped.elapsed());
    resumed.map_err(TakeError::NotResumed)?;
    Ok((still, saved?, held))
}

fn harvest_all(layout: &ImageLayout) -> Vec<DirtyBitmap> {
    let full = |region: PageRun| {
        let mut bitmap = DirtyBitmap::new(region.start, region.count);
        bitmap.fill();
        bitmap
    };
    layout.regions().into_iter().map(full).collect()
}

/// Pages that were written since the last harvest.
fn harvest(parts: &Parts<'_>, layout: &ImageLayout) -> Vec<DirtyBitmap> {
    let regions = layout.regions().into_iter();
    let harvested = regions.map(|region| {
        let mut bitmap = DirtyBitmap::new(region.start, region.count);
        if let Err(error) = parts.tracker.harvest(&mut bitmap) {
            log::warn!(error:% = error; "the dirty log cannot be read, all pages are written again");
            bitmap.fill();
        }
        bitmap
    });
    harvested.collect()
}

/// Calls `work` with runs of dirty pages, of which it is told whether they hold data. While the
/// machine runs - then it can be cancelled - pages are re-armed before they are read.
fn each_run(
    parts: &Parts<'_>,
    dirty: &[DirtyBitmap],
    running: Option<&dyn Fn() -> bool>,
    mut work: impl FnMut(&Parts<'_>, PageRun, bool) -> Result<(), TakeError>,
) -> Result<(), TakeError> {
    for bitmap in dirty {
        let end = bitmap.base().0 + bitmap.pages();
        let mut start = bitmap.base().0;
        while start < end {
            let chunk = PageRun {
                start: PageIndex(start),
                count: REARM_PAGES.min(end - start),
            };
            start += chunk.count;
            if bitmap.runs_within(chunk).next().is_none() {
                continue;
            }
            if let Some(cancelled) = running {
                if cancelled() {
                    return Err(TakeError::Cancelled);
                }
                parts.tracker.rearm(chunk)?;
            }
            let mut data = DirtyBitmap::new(chunk.start, chunk.count);
            for run in parts.pages.data_runs(chunk)? {
                data.insert(run);
            }
            for run in bitmap.runs_within(chunk) {
                each_part(&data, run, |part, is_data| work(parts, part, is_data))?;
            }
        }
    }
    Ok(())
}

/// Splits `run` into batches that either hold data or do not.
fn each_part(
    data: &DirtyBitmap,
    run: PageRun,
    mut work: impl FnMut(PageRun, bool) -> Result<(), TakeError>,
) -> Result<(), TakeError> {
    let mut at = run.start.0;
    while at < run.end().0 {
        let is_data = data.contains(PageIndex(at));
        let limit = run.end().0.min(at + BATCH_PAGES);
        let same = (at..limit).take_while(|page| data.contains(PageIndex(*page)) == is_data);
        let count = same.count() as u64;
        let start = PageIndex(at);
        work(PageRun { start, count }, is_data)?;
        at += count;
    }
    Ok(())
}

/// The last pages, until the machine runs again.
struct Held {
    buffer: Vec<u8>,
    used: usize,
    runs: Vec<(PageRun, Range<usize>)>,
}

impl Held {
    /// With memory that is there already: while the machine stands still is no time for that.
    fn with_room(bytes: u64) -> Self {
        let bytes = usize::try_from(bytes.min(MAX_HELD_BYTES)).unwrap_or(0);
        let mut buffer = Vec::new();
        buffer.resize(bytes, 1);
        Self {
            buffer,
            used: 0,
            runs: Vec::new(),
        }
    }

    /// Reads `run`; false when there is no room for it.
    fn read(
        &mut self,
        pages: &dyn PageStore,
        run: PageRun,
        is_data: bool,
    ) -> Result<bool, TakeError> {
        let length = usize::try_from(run.bytes()).unwrap_or(usize::MAX);
        let range = self.used..self.used.saturating_add(length);
        let Some(target) = self.buffer.get_mut(range.clone()) else {
            return Ok(false);
        };
        match is_data {
            true => pages.read(run, target)?,
            false => target.fill(0),
        }
        self.used = range.end;
        self.runs.push((run, range));
        Ok(true)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
