//! Disk I/O through `io_uring`: one ring per queue, one system call per batch.
//!
//! Requests take one of three ways:
//! - most go to the ring;
//! - those that only copy to or from the page cache run at once on the queue's own thread, where
//!   that is faster than the ring's hand-over to a kernel thread ([`pace`]);
//! - those that the ring cannot do (block discards, buffers that direct I/O refuses) go to the
//!   image's thread pool.

mod pace;
mod queue;
mod setup;
mod slots;

pub(super) use queue::RingQueue;
pub(super) use setup::probe;
