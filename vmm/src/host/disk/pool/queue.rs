//! One queue's channel into the pool.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use devices::GuestRam;
use devices::virtio::block::{BlockIo, BlockRequest, Completion};
use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::threads::{Job, Pool};

/// Where threads put completions of one queue.
pub(super) struct Channel {
    memory: Arc<GuestRam>,
    done: Mutex<Vec<Completion>>,
    /// Length of `done`, to be looked at without the lock.
    ready: AtomicUsize,
    /// Readable while there is something in `done`.
    event: EventFd,
    /// Signalled when `done` is no longer empty.
    finished: Condvar,
}

impl Channel {
    pub(super) fn memory(&self) -> &GuestRam {
        &self.memory
    }

    pub(super) fn finish(&self, token: u16, result: io::Result<()>) {
        let mut done = self.done.lock();
        done.push(Completion { token, result });
        self.ready.store(done.len(), Ordering::Release);
        if done.len() == 1 {
            // The counter cannot overflow: it is read before `done` is emptied.
            let _ = self.event.write(1);
            self.finished.notify_one();
        }
    }
}

/// A queue whose requests are executed by a [`Pool`].
pub(in crate::host::disk) struct PoolQueue {
    pool: Arc<Pool>,
    channel: Arc<Channel>,
    submitted: Vec<BlockRequest>,
    /// Handed to the pool and not taken back.
    in_flight: usize,
}

impl PoolQueue {
    /// A queue of `pool`, whose requests use `memory`.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub(in crate::host::disk) fn new(pool: Arc<Pool>, memory: Arc<GuestRam>) -> io::Result<Self> {
        let channel = Channel {
            memory,
            done: Mutex::default(),
            ready: AtomicUsize::new(0),
            event: EventFd::new(EFD_NONBLOCK)?,
            finished: Condvar::new(),
        };
        Ok(Self {
            pool,
            channel: Arc::new(channel),
            submitted: Vec::new(),
            in_flight: 0,
        })
    }

    /// Requests that have not been taken back.
    pub(in crate::host::disk) fn in_flight(&self) -> usize {
        self.in_flight + self.submitted.len()
    }
}

impl BlockIo for PoolQueue {
    fn submit(&mut self, request: BlockRequest) {
        self.submitted.push(request);
    }

    fn flush_submissions(&mut self) {
        if self.submitted.is_empty() {
            return;
        }
        self.in_flight += self.submitted.len();
        let channel = &self.channel;
        self.pool
            .submit(self.submitted.drain(..).map(|request| Job {
                request,
                channel: Arc::clone(channel),
            }));
    }

    fn events(&self) -> Vec<RawFd> {
        vec![self.channel.event.as_raw_fd()]
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        if self.channel.ready.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut finished = self.channel.done.lock();
        let _ = self.channel.event.read();
        self.in_flight -= finished.len();
        done.append(&mut finished);
        self.channel.ready.store(0, Ordering::Release);
    }

    fn wait(&mut self) {
        self.flush_submissions();
        let mut finished = self.channel.done.lock();
        while finished.is_empty() && self.in_flight > 0 {
            self.channel.finished.wait(&mut finished);
        }
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight() > 0 {
            self.wait();
            self.completions(&mut done);
        }
    }
}
