//! What all queues of a device share.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use parking_lot::Mutex;
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::backend::{BlockInfo, BlockOp};
use super::device::BlockCounters;
use super::request::Extent;
use crate::events::{DeviceEvent, Reporter};
use crate::rate::RateLimiter;
use crate::rate_log::RateLimit;

pub(super) struct Shared {
    pub(super) serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    pub(super) info: BlockInfo,
    pub(super) limiter: Option<Mutex<RateLimiter>>,
    pub(super) counters: Arc<BlockCounters>,
    pub(super) reporter: Reporter,
    pub(super) writeback: AtomicBool,
    /// A failing disk fails often; operators need not hear of each request.
    pub(super) io_errors: RateLimit,
}

impl Shared {
    /// Tells the operator that the host could not complete an operation.
    pub(super) fn report(&self, extent: &Extent, error: &io::Error) {
        self.counters.errors.add(1);
        let Some(suppressed) = self.io_errors.admit(Instant::now()) else {
            return;
        };
        let operation = extent.op.name();
        let device = self.reporter.device();
        log::error!(device:%, operation, offset = extent.offset, bytes = extent.len, error:%, suppressed; "host I/O error, passed on to the guest");
        self.reporter.report(DeviceEvent::IoError {
            operation,
            offset: extent.offset,
            error: error.to_string(),
        });
    }

    /// Counts a request of `bytes` bytes that succeeded.
    pub(super) fn count(&self, op: BlockOp, bytes: u64) {
        let counters = &self.counters;
        match op {
            BlockOp::Read => {
                counters.reads.add(1);
                counters.read_bytes.add(bytes);
            }
            BlockOp::Write => {
                counters.writes.add(1);
                counters.written_bytes.add(bytes);
            }
            BlockOp::Flush => counters.flushes.add(1),
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => counters.discards.add(1),
        }
    }
}
