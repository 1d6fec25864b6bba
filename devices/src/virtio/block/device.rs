//! The device: configuration, and a worker per queue while it is active.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::backend::{BlockBackend, SECTOR_BYTES};
use super::config::{self, ConfigSpace, WRITEBACK_OFFSET};
use super::request;
use super::shared::Shared;
use super::state::BlockStateV1;
use super::worker::BlockWorker;
use crate::counters::{Counter, Counters};
use crate::device::Migratability;
use crate::events::Reporter;
use crate::rate::{RateLimiter, RateLimits};
use crate::rate_log::RateLimit;
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::virtio::device::{
    Activation, ActivationError, DeviceIdentity, DeviceType, RING_FEATURES, VirtioDevice,
};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::Worker;

const KIND: &str = "virtio-block";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);

/// How a block device appears to the guest.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// Serial number, up to 20 bytes.
    pub serial: String,
    /// Request queues, at least 1.
    pub queues: u16,
    /// Entries per queue, a power of two.
    pub queue_size: u16,
    /// I/O limits, shared by all queues.
    pub rate_limits: RateLimits,
}

/// What a block device counts.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Read requests completed.
    pub reads: Counter,
    /// Write requests completed.
    pub writes: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
    /// Flush requests completed.
    pub flushes: Counter,
    /// Discard and write-zeroes requests completed.
    pub discards: Counter,
    /// Requests that the host could not complete.
    pub errors: Counter,
    /// Requests refused because the driver got them wrong.
    pub refused: Counter,
    /// Times that a request waited for the rate limit.
    pub throttled: Counter,
}

impl Counters for BlockCounters {
    fn visit(&self, visit: &mut dyn FnMut(&'static str, &'static str, u64)) {
        visit(
            "block_reads_total",
            "read requests completed",
            self.reads.get(),
        );
        visit(
            "block_writes_total",
            "write requests completed",
            self.writes.get(),
        );
        visit(
            "block_read_bytes_total",
            "bytes read",
            self.read_bytes.get(),
        );
        visit(
            "block_written_bytes_total",
            "bytes written",
            self.written_bytes.get(),
        );
        visit(
            "block_flushes_total",
            "flush requests completed",
            self.flushes.get(),
        );
        visit(
            "block_discards_total",
            "discard and write-zeroes requests completed",
            self.discards.get(),
        );
        visit(
            "block_errors_total",
            "requests that the host failed",
            self.errors.get(),
        );
        visit(
            "block_refused_total",
            "invalid requests",
            self.refused.get(),
        );
        visit(
            "block_throttled_total",
            "waits for the rate limit",
            self.throttled.get(),
        );
    }
}

/// A virtio block device.
pub struct Block {
    identity: DeviceIdentity,
    backend: Arc<dyn BlockBackend>,
    options: BlockOptions,
    /// What the driver has chosen; the workers follow [`Shared::writeback`], which also depends
    /// on the flush feature.
    writeback: bool,
    /// The driver has negotiated the flush feature.
    can_flush: bool,
    shared: Arc<Shared>,
    workers: Vec<Worker<BlockWorker>>,
}

impl Block {
    /// A device over `backend`; I/O errors go to `reporter`.
    #[must_use]
    pub fn new(backend: Arc<dyn BlockBackend>, options: BlockOptions, reporter: Reporter) -> Self {
        let info = backend.info().clone();
        let limiter = RateLimiter::new(options.rate_limits, Instant::now());
        let shared = Shared {
            serial: request::serial_bytes(&options.serial),
            info: info.clone(),
            limiter: (!limiter.is_unlimited()).then(|| Mutex::new(limiter)),
            counters: Arc::default(),
            reporter,
            writeback: AtomicBool::new(true),
            io_errors: RateLimit::new(),
        };
        Self {
            identity: DeviceIdentity {
                device_type: DeviceType::Block,
                features: config::features(&info, options.queues),
                ring_features: RING_FEATURES,
                queue_sizes: vec![options.queue_size; usize::from(options.queues)],
            },
            backend,
            options,
            writeback: true,
            can_flush: false,
            shared: Arc::new(shared),
            workers: Vec::new(),
        }
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.shared.counters)
    }

    fn spawn(&self, queue: Virtqueue) -> Result<Worker<BlockWorker>, ActivationError> {
        let host = |what| move |source| ActivationError::Host { what, source };
        let io = self
            .backend
            .open_queue(Arc::clone(queue.memory()), queue.size())
            .map_err(host("disk queue"))?;
        let name = format!("{}-q{}", self.shared.reporter.device(), queue.index());
        let worker =
            BlockWorker::new(queue, io, Arc::clone(&self.shared)).map_err(host("disk timer"))?;
        Worker::spawn(&name, worker).map_err(|(error, _)| host("disk thread")(error))
    }
}

impl VirtioDevice for Block {
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let info = &self.shared.info;
        let BlockOptions {
            queue_size, queues, ..
        } = self.options;
        ConfigSpace::new(info, queue_size, queues, self.writeback).read(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK_OFFSET, &[value @ (0 | 1)]) = (offset, data) {
            self.writeback = value == 1;
            let writeback = self.writeback && self.can_flush;
            self.shared.writeback.store(writeback, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        // A driver that cannot flush gets write-through (section 5.2.5.2).
        self.can_flush = activation.has_feature(VIRTIO_BLK_F_FLUSH);
        let writeback = self.writeback && self.can_flush;
        self.shared.writeback.store(writeback, Ordering::Relaxed);
        for queue in activation.queues {
            let worker = self.spawn(queue)?;
            self.workers.push(worker);
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Virtqueue> {
        let workers = std::mem::take(&mut self.workers);
        workers
            .into_iter()
            .map(|worker| worker.stop().into_queue())
            .collect()
    }

    fn reset(&mut self) {
        self.writeback = true;
        self.can_flush = false;
    }

    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }

    fn state_format(&self) -> Option<StateFormat> {
        Some(FORMAT)
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let info = &self.shared.info;
        let wire = BlockStateV1 {
            capacity_sectors: info.capacity_bytes / SECTOR_BYTES,
            block_bytes: info.block_bytes,
            read_only: info.read_only,
            writeback: self.writeback,
        };
        FORMAT.encode(&wire)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: BlockStateV1 = FORMAT.decode(state)?;
        let info = &self.shared.info;
        let capacity = info.capacity_bytes / SECTOR_BYTES;
        if wire.capacity_sectors != capacity {
            let why = format!("this image has {capacity} sectors");
            return Err(RestoreError::field(
                KIND,
                "capacity_sectors",
                wire.capacity_sectors,
                why,
            ));
        }
        if wire.block_bytes != info.block_bytes {
            let why = format!("this image has blocks of {}", info.block_bytes);
            let found = wire.block_bytes;
            return Err(RestoreError::field(KIND, "block_bytes", found, why));
        }
        if wire.read_only != info.read_only {
            let why = format!("this image has read_only = {}", info.read_only);
            return Err(RestoreError::field(KIND, "read_only", wire.read_only, why));
        }
        self.writeback = wire.writeback;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
