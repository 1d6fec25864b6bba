//! A disk in host memory whose delays and errors a test decides.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::GuestRam;
use crate::virtio::block::{
    BlockBackend, BlockInfo, BlockIo, BlockOp, BlockRequest, Completion, SECTOR_BYTES,
};
use crate::virtio::buffers;

/// An operation that reached a [`MemoryDisk`]: what, first byte, bytes.
pub type SeenOp = (BlockOp, u64, u64);

/// Storage in host memory behind [`BlockBackend`].
///
/// Requests finish as soon as the device asks for completions, in order, unless the disk is held
/// ([`MemoryDisk::hold`]): then they stay in flight until it is released.
pub struct MemoryDisk {
    info: BlockInfo,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    seen: Vec<SeenOp>,
    failures: VecDeque<io::ErrorKind>,
    held: bool,
    /// One per queue ever opened, to be signalled when the disk is released.
    events: Vec<EventFd>,
}

impl MemoryDisk {
    /// A writable disk of `sectors` zeroed sectors that can discard and write zeroes.
    #[must_use]
    pub fn new(sectors: u64) -> Arc<Self> {
        Self::with_info(BlockInfo {
            capacity_bytes: sectors * SECTOR_BYTES,
            block_bytes: 512,
            physical_block_bytes: 512,
            read_only: false,
            discard: true,
            write_zeroes: true,
        })
    }

    /// A zeroed disk with these abilities.
    ///
    /// # Panics
    /// When the capacity is more than the host can address.
    #[must_use]
    pub fn with_info(info: BlockInfo) -> Arc<Self> {
        let len = usize::try_from(info.capacity_bytes).expect("a test's disk is small");
        let state = State {
            bytes: vec![0; len],
            ..State::default()
        };
        let shared = Shared {
            state: Mutex::new(state),
            released: Condvar::new(),
        };
        Arc::new(Self {
            info,
            shared: Arc::new(shared),
        })
    }

    /// Keeps requests in flight from now on.
    pub fn hold(&self) {
        self.shared.state.lock().held = true;
    }

    /// Finishes what is in flight and holds nothing any more.
    pub fn release(&self) {
        let mut state = self.shared.state.lock();
        state.held = false;
        for event in &state.events {
            // The counter cannot overflow within a test.
            let _ = event.write(1);
        }
        self.shared.released.notify_all();
    }

    /// Lets the next operation that would run fail with this kind of error.
    pub fn fail_next(&self, kind: io::ErrorKind) {
        self.shared.state.lock().failures.push_back(kind);
    }

    /// Operations run so far, failed ones included, in order.
    #[must_use]
    pub fn seen(&self) -> Vec<SeenOp> {
        self.shared.state.lock().seen.clone()
    }

    /// A copy of the contents.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        self.shared.state.lock().bytes.clone()
    }

    /// Puts `data` at byte `offset`.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn fill(&self, offset: usize, data: &[u8]) {
        let mut state = self.shared.state.lock();
        let target = state.bytes.get_mut(offset..offset + data.len());
        target.expect("within the disk").copy_from_slice(data);
    }
}

impl BlockBackend for MemoryDisk {
    fn info(&self) -> &BlockInfo {
        &self.info
    }

    fn open_queue(&self, memory: Arc<GuestRam>, _depth: u16) -> io::Result<Box<dyn BlockIo>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let mut state = self.shared.state.lock();
        state.events.push(event.try_clone()?);
        Ok(Box::new(MemoryQueue {
            shared: Arc::clone(&self.shared),
            memory,
            event,
            waiting: VecDeque::new(),
        }))
    }
}

struct MemoryQueue {
    shared: Arc<Shared>,
    memory: Arc<GuestRam>,
    event: EventFd,
    waiting: VecDeque<BlockRequest>,
}

impl BlockIo for MemoryQueue {
    fn submit(&mut self, request: BlockRequest) {
        self.waiting.push_back(request);
    }

    fn flush_submissions(&mut self) {}

    fn events(&self) -> Vec<RawFd> {
        vec![self.event.as_raw_fd()]
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        let _ = self.event.read();
        let mut state = self.shared.state.lock();
        if state.held {
            return;
        }
        for request in self.waiting.drain(..) {
            let result = state.run(&self.memory, &request);
            done.push(Completion {
                token: request.token,
                result,
            });
        }
    }

    fn wait(&mut self) {
        let mut state = self.shared.state.lock();
        while state.held {
            self.shared.released.wait(&mut state);
        }
    }
}

impl State {
    fn run(&mut self, memory: &GuestRam, request: &BlockRequest) -> io::Result<()> {
        let &BlockRequest {
            op, offset, len, ..
        } = request;
        self.seen.push((op, offset, len));
        if let Some(kind) = self.failures.pop_front() {
            return Err(kind.into());
        }
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let range = self.bytes.get_mut(start..start + len);
        let range = range.ok_or(io::ErrorKind::UnexpectedEof)?;
        let copied = match op {
            BlockOp::Read => buffers::write(memory, &request.segments, 0, range),
            BlockOp::Write => buffers::read(memory, &request.segments, 0, range),
            BlockOp::Flush => Ok(len),
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => {
                range.fill(0);
                Ok(len)
            }
        };
        match copied.map_err(io::Error::other)? {
            copied if copied == len => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
