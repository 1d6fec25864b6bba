//! The port behind a block device.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::GuestRam;
use crate::virtio::queue::Segments;

/// Virtio counts in sectors of this size whatever the medium has (section 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// What a backend is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// Capacity, a multiple of 512.
    pub capacity_bytes: u64,
    /// Smallest unit that is written without a read, a power of two of at least 512.
    pub block_bytes: u32,
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
    /// Given back with the completion; unique among requests in flight.
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

    /// A channel for up to `depth` requests in flight, used by one thread. Channels of one
    /// backend work side by side.
    ///
    /// # Errors
    /// The host has no ring, thread or descriptor left.
    fn open_queue(&self, memory: Arc<GuestRam>, depth: u16) -> io::Result<Box<dyn BlockIo>>;
}

/// A channel into a backend.
pub trait BlockIo: Send {
    /// Accepts a request. It may begin at once or with the next [`BlockIo::flush_submissions`].
    fn submit(&mut self, request: BlockRequest);

    /// Begins everything submitted.
    fn flush_submissions(&mut self);

    /// Readable when completions may wait. Reset it before calling [`BlockIo::completions`].
    fn event(&self) -> &EventFd;

    /// Appends finished requests to `done` without waiting.
    fn completions(&mut self, done: &mut Vec<Completion>);

    /// Waits until at least one more request has finished. Called only with requests in flight.
    fn wait(&mut self);
}
