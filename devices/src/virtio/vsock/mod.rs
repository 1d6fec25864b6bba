//! Socket device (virtio 1.2 section 5.10): stream sockets between guest and host.
//!
//! The host's end of each connection is a stream that [`VsockHost`] accepts or opens, in practice a
//! unix socket:
//! - a program on the host connects to the VM's socket and writes `CONNECT <port>\n`; when the guest
//!   accepts, it reads `OK <port>\n` and the connection is open;
//! - a guest that connects to port P of the host (context id 2) reaches whoever listens on the
//!   socket of that port.
//!
//! | file | what is in it |
//! |---|---|
//! | `packet` | the header that precedes all data |
//! | `connection` | one connection: its states, credit and buffer |
//! | `handshake` | a client of the host that has not said yet where it wants to go |
//! | `table`, `muxer` | all connections, and who is served next |
//! | `worker`, `device` | the queues, the thread, the lifecycle |
//!
//! Connections do not survive a move to another process; the driver is told to drop them.

mod connection;
mod device;
mod handshake;
mod host;
mod muxer;
mod packet;
mod state;
mod table;
mod worker;

pub(crate) use device::FORMAT;
pub use device::{Vsock, VsockCounters, VsockError, VsockOptions};
pub use host::{HostStream, VsockHost};
pub use state::VsockStateV1;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

#[cfg(test)]
mod tests;
