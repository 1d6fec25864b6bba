//! A disk in memory that a byte string slows down and breaks.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use devices::GuestRam;
use devices::virtio::block::{
    BlockBackend, BlockInfo, BlockIo, BlockOp, BlockRequest, Completion, SECTOR_BYTES,
};
use devices::virtio::buffers;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Storage of a few sectors. Unlike a test's disk it never blocks: whoever waits for a request
/// gets it done.
pub struct FakeDisk {
    info: BlockInfo,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    failures: VecDeque<io::ErrorKind>,
    held: bool,
    /// One per queue ever opened, to be signalled when the disk is released.
    events: Vec<EventFd>,
}

impl FakeDisk {
    pub fn new(sectors: u64) -> Arc<Self> {
        let info = BlockInfo {
            capacity_bytes: sectors * SECTOR_BYTES,
            block_bytes: 512,
            physical_block_bytes: 512,
            read_only: false,
            discard: true,
            write_zeroes: true,
        };
        let len = usize::try_from(info.capacity_bytes).expect("a few sectors");
        let state = State {
            bytes: vec![0; len],
            ..State::default()
        };
        Arc::new(Self {
            info,
            state: Arc::new(Mutex::new(state)),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic ends everything")
    }

    /// Keeps requests in flight.
    pub fn hold(&self) {
        self.state().held = true;
    }

    pub fn release(&self) {
        let mut state = self.state();
        state.held = false;
        for event in &state.events {
            event.write(1).expect("the counter cannot overflow");
        }
    }

    pub fn fail_next(&self, kind: io::ErrorKind) {
        self.state().failures.push_back(kind);
    }
}

impl BlockBackend for FakeDisk {
    fn info(&self) -> &BlockInfo {
        &self.info
    }

    fn open_queue(&self, memory: Arc<GuestRam>, _depth: u16) -> io::Result<Box<dyn BlockIo>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.state().events.push(event.try_clone()?);
        let state = Arc::clone(&self.state);
        Ok(Box::new(FakeQueue {
            state,
            memory,
            event,
            waiting: VecDeque::new(),
            urgent: false,
        }))
    }
}

struct FakeQueue {
    state: Arc<Mutex<State>>,
    memory: Arc<GuestRam>,
    event: EventFd,
    waiting: VecDeque<BlockRequest>,
    /// Somebody waits: nothing is held any longer.
    urgent: bool,
}

impl BlockIo for FakeQueue {
    fn submit(&mut self, request: BlockRequest) {
        self.waiting.push_back(request);
    }

    fn flush_submissions(&mut self) {}

    fn events(&self) -> Vec<RawFd> {
        vec![self.event.as_raw_fd()]
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        // Nothing to read is as good: the descriptor is quiet then.
        let _ = self.event.read();
        let mut state = self.state.lock().expect("a panic ends everything");
        if state.held && !self.urgent {
            return;
        }
        self.urgent = false;
        for request in self.waiting.drain(..) {
            let result = state.run(&self.memory, &request);
            done.push(Completion {
                token: request.token,
                result,
            });
        }
    }

    fn wait(&mut self) {
        assert!(!self.waiting.is_empty(), "nothing is in flight");
        self.urgent = true;
    }
}

impl State {
    fn run(&mut self, memory: &GuestRam, request: &BlockRequest) -> io::Result<()> {
        let start = usize::try_from(request.offset).expect("checked by the device");
        let len = usize::try_from(request.len).expect("checked by the device");
        let range = self.bytes.get_mut(start..start + len);
        let range = range.expect("the device passes on only what lies on the disk");
        if let Some(kind) = self.failures.pop_front() {
            return Err(kind.into());
        }
        let copied = match request.op {
            BlockOp::Read => buffers::write(memory, &request.segments, 0, range),
            BlockOp::Write => buffers::read(memory, &request.segments, 0, range),
            BlockOp::Flush => Ok(len),
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => {
                range.fill(0);
                Ok(len)
            }
        };
        let copied = copied.expect("the device passes on only what lies in RAM");
        assert_eq!(copied, len, "segments and length differ");
        Ok(())
    }
}
