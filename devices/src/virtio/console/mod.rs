//! Console (virtio 1.2 section 5.3), with one port.
//!
//! The driver's side is two queues, the host's side a [`ConsolePort`], which is a
//! [`crate::chardev::CharDevice`]: a host thread moves bytes between it and a terminal, file or
//! socket. Between them lie two bounded buffers. When the host is slow the device stops taking
//! output from its queue, so that nothing is lost and no vCPU waits.

mod config;
mod device;
mod port;
mod state;
mod worker;

pub(crate) use device::FORMAT;
pub use device::{Console, ConsoleCounters};
pub use port::{ConsolePort, ConsoleSize};
pub use state::ConsoleStateV1;

#[cfg(test)]
mod tests;
