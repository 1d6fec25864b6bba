//! A queue together with what has to last as long as it does.

use std::os::fd::RawFd;

use devices::virtio::block::{BlockIo, BlockRequest, Completion};

/// A queue and a guard. The queue is dropped first, and so waits for its requests while the
/// guard still stands.
pub(super) struct Guarded<Q, G> {
    queue: Q,
    _guard: G,
}

impl<Q, G> Guarded<Q, G> {
    pub(super) fn new(queue: Q, guard: G) -> Self {
        Self {
            queue,
            _guard: guard,
        }
    }
}

impl<Q: BlockIo, G: Send> BlockIo for Guarded<Q, G> {
    fn submit(&mut self, request: BlockRequest) {
        self.queue.submit(request);
    }

    fn flush_submissions(&mut self) {
        self.queue.flush_submissions();
    }

    fn events(&self) -> Vec<RawFd> {
        self.queue.events()
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        self.queue.completions(done);
    }

    fn wait(&mut self) {
        self.queue.wait();
    }
}
