//! Disk I/O on a few threads, for images and operations that `io_uring` cannot serve.

mod queue;
mod threads;

pub(super) use queue::PoolQueue;
pub(super) use threads::Pool;
