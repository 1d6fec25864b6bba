//! The port behind a block device.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::GuestRam;
use crate::virtio::queue::Segments;

/// Virtio counts in sectors of this size whatever the medium has (section 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// What a backend is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// Capacity, a multiple of 512.
    pub capacity_bytes: u64,
    /// The block size that the guest sees, a power of two of at least 512. Part of the disk's
    /// identity: partition tables count in it.
    pub block_bytes: u32,
    /// Smallest unit that is written without a read, a power of two of at least `block_bytes`.
    pub physical_block_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Discard frees storage.
    pub discard: bool,
    /// Write-zeroes is faster than writing zeroes.
    pub write_zeroes: bool,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOp {
    /// Storage to guest memory.
    Read,
    /// Guest memory to storage.
    Write,
    /// Everything completed so far becomes durable.
    Flush,
    /// The range's contents may be lost.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Storage may be freed.
        unmap: bool,
    },
}

impl BlockOp {
    /// The operation's name, for events and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes { .. } => "write-zeroes",
        }
    }
}

/// One operation on storage, checked against capacity and RAM before it is submitted.
#[derive(Debug)]
pub struct BlockRequest {
    /// Given back with the completion. The ranges of one discard share it.
    pub token: u16,
    /// What to do.
    pub op: BlockOp,
    /// First byte.
    pub offset: u64,
    /// Bytes; the sum of the segments for reads and writes.
    pub len: u64,
    /// Guest buffers of reads and writes.
    pub segments: Segments,
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// The request's token.
    pub token: u16,
    /// Success means that all bytes were transferred.
    pub result: io::Result<()>,
}

/// A disk image or device, opened and locked.
pub trait BlockBackend: Send + Sync {
    /// Its size and abilities.
    fn info(&self) -> &BlockInfo;

    /// A channel for about `depth` requests in flight (more wait inside), used by one thread at
    /// a time. Channels of one backend work side by side.
    ///
    /// # Errors
    /// The host has no ring, thread or descriptor left, or the image is not locked for this
    /// process.
    fn open_queue(&self, memory: Arc<GuestRam>, depth: u16) -> io::Result<Box<dyn BlockIo>>;
}

/// A channel into a backend. Dropping it waits for what is in flight: no guest memory is
/// accessed afterwards.
pub trait BlockIo: Send {
    /// Accepts a request. It may begin with the next [`BlockIo::flush_submissions`] only, and it
    /// may be finished on return; [`BlockIo::completions`] tells.
    fn submit(&mut self, request: BlockRequest);

    /// Begins everything submitted.
    fn flush_submissions(&mut self);

    /// Descriptors to watch, the same ones for the channel's life. One of them is readable while
    /// requests wait that have finished since the last [`BlockIo::completions`]. Those that
    /// finished within `submit` or `flush_submissions` may make none readable: look once after
    /// each batch.
    fn events(&self) -> Vec<RawFd>;

    /// Appends finished requests to `done` without waiting. Costs next to nothing when there are
    /// none.
    fn completions(&mut self, done: &mut Vec<Completion>);

    /// Waits until at least one more request has finished. Called only with requests in flight.
    fn wait(&mut self);
}
