//! The device: configuration, and a worker while it is active.

use std::io;
use std::sync::Arc;

use super::PAGE_BYTES;
use super::config::{
    ACTUAL_OFFSET, F_DEFLATE_ON_OOM, F_MUST_TELL_HOST, F_PAGE_POISON, F_PAGE_REPORTING, F_STATS_VQ,
    POISON_VAL_OFFSET,
};
use super::handle::{BalloonHandle, Shared, TargetError};
use super::pages::HugePageTracker;
use super::reclaim::RamReclaim;
use super::state::BalloonStateV1;
use super::worker::{BalloonWorker, Parts, Queues};
use crate::counters::{Counter, Counters};
use crate::device::Migratability;
use crate::events::Reporter;
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::virtio::device::{
    Activation, ActivationError, DeviceIdentity, DeviceType, RING_FEATURES, VirtioDevice,
};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::Worker;

const KIND: &str = "virtio-balloon";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);
const QUEUE_SIZE: u16 = 128;
/// Inflate, deflate, statistics, free page hints, free page reports.
const QUEUES: usize = 5;

/// How a balloon behaves.
#[derive(Clone, Debug, Default)]
pub struct BalloonOptions {
    /// The guest's memory.
    pub ram_bytes: u64,
    /// Target at first.
    pub target_bytes: u64,
    /// The guest may take pages back before it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports free pages.
    pub free_page_reporting: bool,
    /// Seconds between requests for statistics; 0: never.
    pub stats_interval_s: u16,
}

/// What a balloon counts.
#[derive(Debug, Default)]
pub struct BalloonCounters {
    /// Pages of 4 KiB put into the balloon.
    pub inflated_pages: Counter,
    /// Pages of 4 KiB taken out of it.
    pub deflated_pages: Counter,
    /// Bytes that the guest reported free.
    pub reported_bytes: Counter,
    /// Bytes of host memory freed.
    pub freed_bytes: Counter,
    /// Pages refused because they are not RAM, or too many in one request.
    pub refused_pages: Counter,
    /// Ranges that the host could not free.
    pub errors: Counter,
}

impl Counters for BalloonCounters {
    fn visit(&self, visit: &mut dyn FnMut(&'static str, &'static str, u64)) {
        let all: [(_, _, &Counter); 6] = [
            (
                "balloon_inflated_pages_total",
                "4 KiB pages put into the balloon",
                &self.inflated_pages,
            ),
            (
                "balloon_deflated_pages_total",
                "4 KiB pages taken out of the balloon",
                &self.deflated_pages,
            ),
            (
                "balloon_reported_bytes_total",
                "bytes that the guest reported free",
                &self.reported_bytes,
            ),
            (
                "balloon_freed_bytes_total",
                "bytes of host memory freed",
                &self.freed_bytes,
            ),
            (
                "balloon_refused_pages_total",
                "invalid pages",
                &self.refused_pages,
            ),
            (
                "balloon_errors_total",
                "ranges that the host could not free",
                &self.errors,
            ),
        ];
        for (name, help, counter) in all {
            visit(name, help, counter.get());
        }
    }
}

/// A virtio memory balloon.
pub struct Balloon {
    identity: DeviceIdentity,
    reclaim: Arc<dyn RamReclaim>,
    stats_interval_s: u16,
    shared: Arc<Shared>,
    counters: Arc<BalloonCounters>,
    reporter: Reporter,
    /// Huge pages that are in the balloon in part, while inactive. Not saved: after a move some
    /// memory of the host is reclaimed later than it could be.
    gathered: Option<HugePageTracker>,
    worker: Option<Worker<BalloonWorker>>,
}

/// A balloon could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// The first target.
    #[error("balloon")]
    Target(#[source] TargetError),
    /// The host has no descriptor left.
    #[error("balloon event descriptor")]
    Descriptor(#[source] io::Error),
}

impl Balloon {
    /// A balloon that frees memory through `reclaim`; its size and the host's errors go to
    /// `reporter`.
    ///
    /// # Errors
    /// [`BalloonError`] when the target is impossible or the host has no descriptor left.
    pub fn new(
        reclaim: Arc<dyn RamReclaim>,
        options: &BalloonOptions,
        reporter: Reporter,
    ) -> Result<Self, BalloonError> {
        let shared = Shared::new(options.ram_bytes).map_err(BalloonError::Descriptor)?;
        let shared = Arc::new(shared);
        let handle = BalloonHandle::new(Arc::clone(&shared));
        handle
            .set_target_bytes(options.target_bytes)
            .map_err(BalloonError::Target)?;
        shared.reset();
        let huge_pages = reclaim.page_bytes() > PAGE_BYTES;
        let features = [
            (F_MUST_TELL_HOST, huge_pages),
            (F_STATS_VQ, options.stats_interval_s > 0),
            (F_DEFLATE_ON_OOM, options.deflate_on_oom),
            (F_PAGE_POISON, options.free_page_reporting),
            (F_PAGE_REPORTING, options.free_page_reporting),
        ];
        let offered = features.into_iter().filter(|(_, offered)| *offered);
        Ok(Self {
            identity: DeviceIdentity {
                device_type: DeviceType::Balloon,
                features: offered.fold(0, |bits, (bit, _)| bits | 1 << bit),
                ring_features: RING_FEATURES,
                queue_sizes: vec![QUEUE_SIZE; QUEUES],
            },
            reclaim,
            stats_interval_s: options.stats_interval_s,
            shared,
            counters: Arc::default(),
            reporter,
            gathered: None,
            worker: None,
        })
    }

    /// The owner's side.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle::new(Arc::clone(&self.shared))
    }

    fn has_huge_pages(&self) -> bool {
        self.reclaim.page_bytes() > PAGE_BYTES
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<BalloonCounters> {
        Arc::clone(&self.counters)
    }
}

/// Assigns the enabled queues. Section 5.5.2 numbers them, but many drivers, Linux's for years,
/// count only those whose feature was negotiated. Their order is the same either way.
fn assign(activation: &mut Activation) -> Result<Queues, ActivationError> {
    let wants_stats = activation.has_feature(F_STATS_VQ);
    let wants_reports = activation.has_feature(F_PAGE_REPORTING);
    let mut queues = std::mem::take(&mut activation.queues)
        .into_iter()
        .peekable();
    let mut fixed = |index| {
        let queue = queues.next_if(|queue| queue.index() == index);
        queue.ok_or(ActivationError::MissingQueue(index))
    };
    let (inflate, deflate) = (fixed(0)?, fixed(1)?);
    let mut optional = |wanted: bool, index| match wanted {
        true => {
            let queue = queues.next();
            queue.map(Some).ok_or(ActivationError::MissingQueue(index))
        }
        false => Ok(None),
    };
    Ok(Queues {
        inflate,
        deflate,
        stats: optional(wants_stats, 2)?,
        reports: optional(wants_reports, 4)?,
        idle: queues.collect(),
    })
}

impl VirtioDevice for Balloon {
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.config().read(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let &[a, b, c, d] = data else { return };
        let value = u32::from_le_bytes([a, b, c, d]);
        match offset {
            ACTUAL_OFFSET => self.shared.set_actual_pages(value),
            POISON_VAL_OFFSET => self.shared.set_poison(value),
            _ => {}
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivationError> {
        let host = |what| move |source| ActivationError::Host { what, source };
        let queues = assign(&mut activation)?;
        // Parts of a huge page can be gathered only if none is used again unseen.
        let gathers = self.has_huge_pages() && activation.has_feature(F_MUST_TELL_HOST);
        let parts = Parts {
            reclaim: Arc::clone(&self.reclaim),
            shared: Arc::clone(&self.shared),
            counters: Arc::clone(&self.counters),
            reporter: self.reporter.clone(),
            stats_interval_s: self.stats_interval_s,
            tracker: gathers.then(|| {
                let page_bytes = self.reclaim.page_bytes();
                let gathered = self.gathered.take();
                gathered.unwrap_or_else(|| HugePageTracker::new(page_bytes))
            }),
            poisons: activation.has_feature(F_PAGE_POISON),
        };
        let worker = BalloonWorker::new(queues, parts).map_err(host("balloon timer"))?;
        let name = self.reporter.device().to_string();
        let spawned = Worker::spawn(&name, worker);
        self.worker = Some(spawned.map_err(|(error, _)| host("balloon thread")(error))?);
        self.shared.connect(Some(activation.interrupt));
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Virtqueue> {
        self.shared.connect(None);
        let Some(worker) = self.worker.take() else {
            return Vec::new();
        };
        let (queues, gathered) = worker.stop().into_parts();
        self.gathered = gathered;
        queues
    }

    fn reset(&mut self) {
        self.gathered = None;
        self.shared.reset();
    }

    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }

    fn state_format(&self) -> Option<StateFormat> {
        Some(FORMAT)
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        FORMAT.encode(&self.shared.save())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: BalloonStateV1 = FORMAT.decode(state)?;
        let ram_pages = self.shared.ram_pages();
        for (field, pages) in [
            ("target_pages", wire.target_pages),
            ("actual_pages", wire.actual_pages),
        ] {
            if pages > ram_pages {
                let why = format!("the guest has {ram_pages} pages");
                return Err(RestoreError::field(KIND, field, pages, why));
            }
        }
        self.shared.restore(&wire);
        Ok(())
    }
}
