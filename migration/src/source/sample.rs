//! A look at what a migration would have to do: some pages are sent, and what the guest writes
//! meanwhile is counted.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::control::{Control, TICK};
use super::forecast::Growth;
use super::options::SourceError;
use super::plan::{Cut, RoundPlan, Task};
use super::rounds::{Rounds, listen, micros};
use crate::bitmap::DirtyBitmap;
use crate::page::{PAGE_BYTES, PageRun};

/// How long pages are sent, and writes are counted.
const SAMPLE_TIME: Duration = Duration::from_millis(300);

/// When writes are counted before that: what a guest writes again and again shows early.
const LOOKS: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_millis(40),
    Duration::from_millis(120),
];

/// Little memory is sent several times, until so many bytes have gone.
const TELLING_BYTES: u64 = 4 << 20;

/// Fewer bytes than this say nothing of how fast they go.
const LEAST_BYTES: u64 = 64 << 10;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Bytes of memory that hold data: they would be sent.
    pub used_bytes: u64,
    /// Time that sending a page takes, zeroes included.
    pub page_time: Duration,
    /// What all connections carry together; `None`: too little was there to be sent.
    pub link_bytes_per_s: Option<u64>,
    /// Bytes of pages that the guest has changed per second.
    pub dirty_bytes_per_s: u64,
    /// Bytes of devices' states that would be sent while the VM stands still, as far as known.
    pub device_bytes: u64,
    /// The device with most of them.
    pub largest_device: Option<(String, u64)>,
    pub(super) growth: Growth,
}

/// Counts what the guest writes.
struct Watch {
    since: Instant,
    seen: Vec<DirtyBitmap>,
    looks: usize,
    growth: Growth,
}

impl Watch {
    /// Counts if it is time for that.
    fn look(&mut self, rounds: &Rounds<'_>) {
        let due = LOOKS.get(self.looks).copied().unwrap_or(SAMPLE_TIME);
        if self.looks <= LOOKS.len() && self.since.elapsed() >= due {
            self.count(rounds);
        }
    }

    fn count(&mut self, rounds: &Rounds<'_>) {
        let after = self.since.elapsed();
        for (seen, found) in self.seen.iter_mut().zip(rounds.harvest()) {
            seen.merge(&found);
        }
        let pages = self.seen.iter().map(DirtyBitmap::count).sum();
        self.growth.note(after, pages);
        self.looks += 1;
    }

    fn is_over(&self) -> bool {
        self.looks > LOOKS.len()
    }
}

impl Rounds<'_> {
    /// Sends pages for a short time, and counts what the guest writes.
    ///
    /// # Errors
    /// The connections', the tracker's, the devices'.
    pub(super) fn sample(&mut self, control: &mut Control) -> Result<Sample, SourceError> {
        let left = self.shared.devices.ask()?;
        let device_bytes = left.as_ref().map_or(0, |left| left.total.at_stop);
        let used_pages = self.used_pages()?;
        self.arm()?;
        let mut watch = Watch {
            since: Instant::now(),
            seen: self.bitmaps(false),
            looks: 0,
            growth: Growth::default(),
        };
        watch.look(self);
        let (page_time, link_bytes_per_s) = self.send_some(control, &mut watch)?;
        while !watch.is_over() {
            std::thread::sleep(TICK);
            self.attend(control)?;
            watch.look(self);
        }
        Ok(Sample {
            used_bytes: used_pages * PAGE_BYTES,
            page_time,
            link_bytes_per_s,
            dirty_bytes_per_s: watch.growth.bytes_per_s(),
            device_bytes,
            largest_device: left.map(|left| left.largest),
            growth: watch.growth,
        })
    }

    /// Pages that hold data.
    fn used_pages(&self) -> Result<u64, SourceError> {
        let mut pages: u64 = 0;
        for region in &self.regions {
            let runs = self.shared.pages.data_runs(*region)?;
            pages += runs.iter().map(|run| run.count).sum::<u64>();
        }
        Ok(pages)
    }

    /// Has every write from now on marked.
    fn arm(&self) -> Result<(), SourceError> {
        // What a tracker may report at first.
        drop(self.harvest());
        for index in 0..self.shared.streams {
            for (_, chunk) in self.shared.share_of(index, &self.regions) {
                self.shared.tracker.rearm(chunk)?;
            }
        }
        Ok(())
    }

    /// Sends pages until the time is up, or enough has gone; the time that a page takes, and what
    /// the connections carry.
    fn send_some(
        &mut self,
        control: &mut Control,
        watch: &mut Watch,
    ) -> Result<(Duration, Option<u64>), SourceError> {
        let begin = Instant::now();
        let totals = &self.shared.totals;
        let mut sent = 0;
        loop {
            self.number += 1;
            let plan = self.plan();
            self.await_sample(control, watch, &plan.cut)?;
            let now = totals.wire_bytes.load(Ordering::Relaxed);
            let more = now - std::mem::replace(&mut sent, now);
            if sent >= TELLING_BYTES || more < LEAST_BYTES || begin.elapsed() >= SAMPLE_TIME {
                break;
            }
        }
        let sending = begin.elapsed();
        // What lies in this host's buffers has not gone.
        self.workers.order(&Task::Settle(self.options.patience));
        self.await_sample(control, watch, &Cut::default())?;
        let took = begin.elapsed();
        let pages = totals.mix().total();
        let page_time = match pages {
            0 => Duration::ZERO,
            // Where little was sent, the way back is no small part of it.
            _ if sent < TELLING_BYTES => sending,
            _ => took,
        };
        let nanos = page_time.as_nanos() / u128::from(pages.max(1));
        let page_time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let rate = u128::from(sent) * 1_000_000 / u128::from(micros(took).max(1));
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        Ok((page_time, (sent >= LEAST_BYTES).then_some(rate)))
    }

    /// Orders all of memory.
    fn plan(&self) -> Arc<RoundPlan> {
        let plan = Arc::new(RoundPlan {
            number: self.number,
            dirty: self.bitmaps(true),
            running: true,
            last: false,
            remember: false,
            whole: false,
            cut: Cut::default(),
        });
        self.workers.order(&Task::Round(Arc::clone(&plan)));
        plan
    }

    /// Waits until all streams have done what they were told, or gets them to end.
    fn await_sample(
        &mut self,
        control: &mut Control,
        watch: &mut Watch,
        cut: &Cut,
    ) -> Result<(), SourceError> {
        self.await_streams(|rounds| {
            watch.look(rounds);
            if watch.since.elapsed() >= SAMPLE_TIME {
                cut.make();
            }
            rounds.attend(control)
        })
        .map_err(|error| Self::explain(control, error))
    }

    /// Whether it is still wanted, here and there.
    fn attend(&mut self, control: &mut Control) -> Result<(), SourceError> {
        if self.handle.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        self.shared.devices.check()?;
        listen(control, Duration::ZERO)?;
        let pages = self.regions.iter().map(|run: &PageRun| run.count).sum();
        self.show_life(control, pages)
    }
}
