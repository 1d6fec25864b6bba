//! Functions that other processes serve over vfio-user.
//!
//! A server listens on a unix socket and speaks the protocol of QEMU's
//! docs/interop/vfio-user.rst, version 0.1. It may run in any language and with any rights; it is
//! trusted with the guest memory that is mapped for it, and with nothing else: what it says of
//! itself is checked when it is connected, each of its answers has a time limit and a length that
//! is expected, and a server that breaks a rule is dropped for good.
//!
//! | module | what is in it |
//! |---|---|
//! | [`protocol`] | messages, both directions; no sockets |
//! | `wire` | messages over a socket, with descriptors |
//! | `connection` | requests of many threads, replies and the server's own requests |
//! | `offer` | what a server says of its device, checked |
//! | `dma` | what is mapped for a server |
//! | `memory` | what a server reads and writes of guest memory by message |
//! | `migration` | a device's state, taken and given |
//! | `dma_log` | a device's log of its writes to memory |
//! | `function` | [`UserFunction`], the backend |

mod connection;
mod dma;
mod dma_log;
mod function;
mod memory;
mod migration;
mod offer;
pub mod protocol;
mod wire;

#[cfg(test)]
mod tests;

pub use connection::{DmaWriteHook, Limits, LossHook};
pub use function::{ConnectError, UserFunction};
