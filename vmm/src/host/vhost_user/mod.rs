//! Devices in other processes: the front-end of the vhost-user protocol over a unix socket.
//!
//! [`Peer`] implements the port of [`devices::virtio::vhost_user`]. The server is configured by
//! the operator, yet not trusted to answer: every exchange has a time limit, after which the
//! connection is shut down.

mod deadline;
mod error;
mod log;
mod open;
mod peer;
mod session;

pub use error::{RequestFailure, VhostUserError};
pub use log::ServerLog;
pub use open::{open_block, open_fs, open_net};
pub use peer::{Limits, Peer, connect};

#[cfg(test)]
mod tests;
