//! TAP interfaces as the host end of network devices.
//!
//! A TAP moves one packet per system call, in front of it the virtio header as the guest wrote
//! or wants it, straight from and to guest memory. With several queue pairs it is opened once
//! per pair (`IFF_MULTI_QUEUE`); the kernel then spreads flows over the queues in use.
//!
//! Sending never waits here: a TAP hands packets to the host's network stack within the call. One
//! that comes with a limited send buffer (an inherited descriptor may) reports when it is full.
//!
//! After a migration the TAP tells the network behind it, too, where the guest now is (`announce`).
//!
//! See Documentation/networking/tuntap.rst in the kernel.

mod announce;
mod error;
mod interface;
mod open;
mod queue;
mod sys;

pub use error::TapError;
pub use open::{Tap, TapOptions};

#[cfg(test)]
mod tests;
