//! The threads, shared by the queues of an image.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use devices::virtio::block::BlockRequest;
use parking_lot::{Condvar, Mutex};

use super::queue::Channel;
use crate::host::disk::image::{Scratch, SyncImage};

/// Most threads of an image: what a disk with a long queue of its own can use, without letting
/// one guest fill the host.
const MAX_THREADS: usize = 16;

/// A request and where its completion goes.
pub(super) struct Job {
    pub(super) request: BlockRequest,
    pub(super) channel: Arc<Channel>,
}

/// Threads that execute requests of one image. They start as there is work for them; dropping the
/// pool ends them.
pub(in crate::host::disk) struct Pool {
    name: String,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    image: Arc<dyn SyncImage>,
    state: Mutex<State>,
    /// Signalled for each new job, and to all when the pool stops.
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Threads that wait for work and have not been promised any.
    idle: usize,
    stopping: bool,
}

impl Pool {
    /// A pool without threads, whose threads will be named after `name`.
    pub(in crate::host::disk) fn new(name: &str, image: Arc<dyn SyncImage>) -> Self {
        Self {
            name: name.to_owned(),
            shared: Arc::new(Shared {
                image,
                state: Mutex::default(),
                work: Condvar::new(),
            }),
            threads: Mutex::default(),
        }
    }

    /// Makes sure that there is a thread.
    ///
    /// # Errors
    /// The host has none left.
    pub(in crate::host::disk) fn start(&self) -> io::Result<()> {
        let mut threads = self.threads.lock();
        if threads.is_empty() {
            threads.push(self.spawn(0)?);
        }
        Ok(())
    }

    /// Hands jobs to the threads. There must be one ([`Pool::start`]).
    pub(super) fn submit(&self, jobs: impl Iterator<Item = Job>) {
        let mut wanted = 0;
        {
            let mut state = self.shared.state.lock();
            for job in jobs {
                state.jobs.push_back(job);
                if state.idle > 0 {
                    state.idle -= 1;
                    self.shared.work.notify_one();
                } else {
                    wanted += 1;
                }
            }
        }
        if wanted > 0 {
            self.grow(wanted);
        }
    }

    /// Starts up to `wanted` more threads. When the host has none left, those there are do it.
    fn grow(&self, wanted: usize) {
        let mut threads = self.threads.lock();
        let room = MAX_THREADS.saturating_sub(threads.len());
        for _ in 0..wanted.min(room) {
            match self.spawn(threads.len()) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    let pool = self.name.as_str();
                    log::warn!(pool, error:%; "no further disk thread");
                    break;
                }
            }
        }
    }

    fn spawn(&self, number: usize) -> io::Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        let builder = std::thread::Builder::new().name(format!("{}-io{number}", self.name));
        builder.spawn(move || shared.work())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.lock().stopping = true;
        self.shared.work.notify_all();
        for thread in self.threads.get_mut().drain(..) {
            // A thread that panicked has said so; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A thread's life.
    fn work(&self) {
        let mut scratch = Scratch::default();
        while let Some(job) = self.next() {
            let Job { request, channel } = job;
            let result = self.execute(&channel, &request, &mut scratch);
            channel.finish(request.token, result);
        }
    }

    /// A panic is a defect, in an image library perhaps; it fails the request, and nothing waits
    /// for ever.
    fn execute(
        &self,
        channel: &Channel,
        request: &BlockRequest,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        let execute = || self.image.execute(channel.memory(), request, scratch);
        catch_unwind(AssertUnwindSafe(execute))
            .unwrap_or_else(|_| Err(io::Error::other("the disk thread panicked")))
    }

    /// Waits for a job. None when the pool stops and no job is left.
    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.stopping {
                return None;
            }
            state.idle += 1;
            self.work.wait(&mut state);
        }
    }
}
