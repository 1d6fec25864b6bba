//! One queue's ring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::virtio::block::{BlockIo, BlockOp, BlockRequest, Completion};
use devices::{GuestRam, warn_limited};
use io_uring::{IoUring, opcode, squeue, types};

use super::pace::{self, Pace};
use super::setup;
use super::slots::{Slot, Slots};
use crate::host::disk::image::{RawImage, Scratch, SyncImage, progress};
use crate::host::disk::pieces::mark_written;
use crate::host::disk::pool::{Pool, PoolQueue};
use crate::host::disk::syscalls::{self, Fallocate};

/// Most requests that the kernel works on at once.
const MAX_SLOTS: u16 = 1024;

/// The kernel is out of memory for requests: how long to wait before the next try.
const STARVED: Duration = Duration::from_millis(1);

/// A queue of a raw image.
pub(in crate::host::disk) struct RingQueue {
    ring: IoUring,
    image: Arc<RawImage>,
    /// Kept until nothing is in flight: the kernel knows addresses in it.
    memory: Arc<GuestRam>,
    slots: Slots,
    /// Requests for which there was no slot.
    waiting: VecDeque<BlockRequest>,
    /// Requests that have finished and were not taken.
    finished: Vec<Completion>,
    /// Completions just taken from the ring: slot and result.
    entries: Vec<(u64, i32)>,
    /// For requests that the ring cannot do.
    pool: Arc<Pool>,
    pooled: PoolQueue,
    /// None: everything that can goes through the ring.
    pace: Option<Pace>,
    scratch: Scratch,
}

/// Which way a request takes.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    Ring,
    Direct(Instant),
    Pool,
}

impl RingQueue {
    /// A ring for `depth` requests in flight. With `direct_execution`, requests that the page
    /// cache serves run on the queue's thread.
    ///
    /// # Errors
    /// The host has no `io_uring`, or no memory or descriptor for one.
    pub(in crate::host::disk) fn new(
        image: Arc<RawImage>,
        pool: Arc<Pool>,
        memory: Arc<GuestRam>,
        depth: u16,
        direct_execution: bool,
    ) -> io::Result<Self> {
        let depth = depth.clamp(1, MAX_SLOTS);
        Ok(Self {
            ring: setup::create(u32::from(depth).next_power_of_two())?,
            slots: Slots::new(depth),
            waiting: VecDeque::new(),
            finished: Vec::new(),
            entries: Vec::new(),
            pooled: PoolQueue::new(Arc::clone(&pool), Arc::clone(&memory))?,
            pool,
            pace: direct_execution.then(Pace::default),
            scratch: Scratch::default(),
            image,
            memory,
        })
    }

    fn way(&mut self, request: &BlockRequest) -> Way {
        let &BlockRequest {
            op, offset, len, ..
        } = request;
        match op {
            BlockOp::Flush => Way::Ring,
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => {
                match self.image.fallocate_for(op, offset, len) {
                    Some(_) => Way::Ring,
                    None => Way::Pool,
                }
            }
            BlockOp::Read | BlockOp::Write => {
                let copies = match op {
                    BlockOp::Write => self.image.is_buffered(),
                    _ => self.image.is_buffered() && self.image.is_in_memory(),
                };
                match &mut self.pace {
                    Some(pace) if copies && len <= pace::MAX_BYTES => {
                        let now = Instant::now();
                        if pace.admits(now) {
                            Way::Direct(now)
                        } else {
                            Way::Ring
                        }
                    }
                    _ => Way::Ring,
                }
            }
        }
    }

    fn execute_directly(&mut self, request: &BlockRequest, start: Instant) {
        let result = self.image.execute(&self.memory, request, &mut self.scratch);
        if let Some(pace) = &mut self.pace {
            pace.note(start, Instant::now());
        }
        self.finish(request.token, result);
    }

    fn finish(&mut self, token: u16, result: io::Result<()>) {
        self.finished.push(Completion { token, result });
    }

    fn give_to_pool(&mut self, request: BlockRequest) {
        match self.pool.start() {
            Ok(()) => self.pooled.submit(request),
            Err(error) => self.finish(request.token, Err(error)),
        }
    }

    fn give_to_ring(&mut self, request: BlockRequest) {
        if !self.slots.has_free() {
            self.waiting.push_back(request);
            return;
        }
        let mut pieces = self.slots.spare_pieces();
        let fits = pieces
            .fill(&self.memory, &request.segments, 0)
            .map(|pieces| self.image.takes(&pieces, request.offset, request.len));
        match fits {
            Ok(true) => {
                let slot = self.slots.insert(request, pieces);
                self.push(slot);
            }
            Ok(false) => {
                self.slots.keep_pieces(pieces);
                self.give_to_pool(request);
            }
            Err(error) => {
                self.slots.keep_pieces(pieces);
                self.finish(request.token, Err(error));
            }
        }
    }

    /// Describes what is left of a slot's request to the kernel.
    fn push(&mut self, index: u16) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let entry = match entry(slot, &self.memory, &self.image) {
            Ok(Some(entry)) => entry.user_data(u64::from(index)),
            Ok(None) => return self.pass_on(index),
            Err(error) => return self.fail(index, error),
        };
        // SAFETY: the entry's buffers lie in `memory`, its vector in the slot, and its descriptor
        // is the image's; all stay until the completion is here: slots are freed by it only, and
        // dropping the queue waits.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // The ring has an entry for each slot.
            self.fail(index, io::Error::other("the submission ring is full"));
        }
    }

    fn fail(&mut self, index: u16, error: io::Error) {
        if let Some(request) = self.slots.remove(index) {
            self.finish(request.token, Err(error));
        }
    }

    /// Gives a slot's request to the pool.
    fn pass_on(&mut self, index: u16) {
        if let Some(request) = self.slots.remove(index) {
            self.give_to_pool(request);
        }
    }

    /// Tells the kernel about new entries, in one system call unless something is wrong.
    fn enter(&mut self) {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // EAGAIN and EBUSY pass. Nothing else is known to come back from a ring that
                    // has worked before, and what is queued cannot be taken back.
                    warn_limited!(error:% = error; "io_uring_enter, trying again");
                    std::thread::sleep(STARVED);
                }
            }
        }
    }

    /// Takes completions from the ring.
    fn reap(&mut self) {
        let mut entries = std::mem::take(&mut self.entries);
        for entry in self.ring.completion() {
            entries.push((entry.user_data(), entry.result()));
        }
        for (slot, result) in entries.drain(..) {
            // Only slot numbers were given.
            if let Ok(slot) = u16::try_from(slot) {
                self.completed(slot, result);
            }
        }
        self.entries = entries;
    }

    fn completed(&mut self, index: u16, result: i32) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let op = slot.request.op;
        if op == BlockOp::Read {
            // Also when it has failed: the kernel may have filled a part.
            mark_written(&self.memory, &slot.request.segments);
        }
        if let Ok(moved) = u64::try_from(result) {
            let moves = matches!(op, BlockOp::Read | BlockOp::Write);
            match progress(moved, op) {
                _ if !moves => slot.done = slot.request.len,
                Ok(moved) => slot.done += moved,
                Err(error) => return self.fail(index, error),
            }
            if slot.done < slot.request.len {
                return self.push(index);
            }
            if let Some(request) = self.slots.remove(index) {
                self.finish(request.token, Ok(()));
            }
            return;
        }
        let error = io::Error::from_raw_os_error(-result);
        match -result {
            // The ring could not; a thread can wait, or knows another way.
            libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP => self.pass_on(index),
            _ if self.image.is_picky(&error) => self.pass_on(index),
            _ => self.fail(index, error),
        }
    }

    /// Gives slots that have become free to requests that wait for one.
    fn refill(&mut self) {
        while self.slots.has_free()
            && let Some(request) = self.waiting.pop_front()
        {
            self.submit(request);
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.in_use() + self.waiting.len() + self.pooled.in_flight()
    }
}

/// The entry for what is left of a request, or `None` when the ring cannot do it.
fn entry(
    slot: &mut Slot,
    memory: &GuestRam,
    image: &RawImage,
) -> io::Result<Option<squeue::Entry>> {
    let BlockRequest {
        op, offset, len, ..
    } = slot.request;
    let file = types::Fd(image.file().as_raw_fd());
    let write = match op {
        BlockOp::Read => false,
        BlockOp::Write => true,
        BlockOp::Flush => {
            let flags = types::FsyncFlags::DATASYNC;
            return Ok(Some(opcode::Fsync::new(file).flags(flags).build()));
        }
        BlockOp::Discard | BlockOp::WriteZeroes { .. } => {
            let how = image.fallocate_for(op, offset, len);
            let entry = |how: Fallocate| opcode::Fallocate::new(file, len).mode(how.mode());
            return Ok(how.map(|how| entry(how).offset(offset).build()));
        }
    };
    let segments = &slot.request.segments;
    let pieces = slot.pieces.fill(memory, segments, slot.done)?;
    let at = offset + slot.done;
    // Without a vector the kernel has less to copy.
    if let &[piece] = pieces.as_slice()
        && let Ok(len) = u32::try_from(piece.len)
    {
        let buffer = piece.host as *mut u8;
        return Ok(Some(match write {
            true => opcode::Write::new(file, buffer, len).offset(at).build(),
            false => opcode::Read::new(file, buffer, len).offset(at).build(),
        }));
    }
    let (vector, count) = (pieces.as_iovecs(), pieces.count().unsigned_abs());
    Ok(Some(match write {
        true => opcode::Writev::new(file, vector, count).offset(at).build(),
        false => opcode::Readv::new(file, vector, count).offset(at).build(),
    }))
}

impl BlockIo for RingQueue {
    fn submit(&mut self, request: BlockRequest) {
        match self.way(&request) {
            Way::Ring => self.give_to_ring(request),
            Way::Direct(start) => self.execute_directly(&request, start),
            Way::Pool => self.give_to_pool(request),
        }
    }

    fn flush_submissions(&mut self) {
        self.enter();
        self.pooled.flush_submissions();
    }

    fn events(&self) -> Vec<RawFd> {
        let mut events = self.pooled.events();
        events.push(self.ring.as_raw_fd());
        events
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        self.reap();
        self.refill();
        self.flush_submissions();
        done.append(&mut self.finished);
        self.pooled.completions(done);
    }

    fn wait(&mut self) {
        loop {
            self.reap();
            self.refill();
            self.flush_submissions();
            let idle = self.in_flight() == 0;
            // Interrupted sleep: that is how the kernel delivers completions to a sleeping thread.
            if idle || !self.finished.is_empty() || syscalls::wait_readable(&self.events()) {
                return;
            }
        }
    }
}

impl Drop for RingQueue {
    fn drop(&mut self) {
        self.waiting.clear();
        let mut done = Vec::new();
        while self.in_flight() > 0 {
            self.wait();
            self.completions(&mut done);
        }
    }
}
