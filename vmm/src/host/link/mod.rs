//! Connections between the two hosts of a migration: TCP, TLS and unix sockets.
//!
//! [`connect()`] and [`Listener`] make what the engine knows as a
//! [`Channel`](migration::ports::Channel). Everything blocks, with time-outs.
//!
//! | module | what is in it |
//! |---|---|
//! | `url` | addresses as they are written |
//! | `security` | certificates, and whether plaintext may leave this host |
//! | `connect`, `race`, `cancel` | candidates tried side by side |
//! | `listen`, `inherited` | accepting, also from what the service manager hands over |
//! | `handshakes` | those who have connected, saying who they are side by side |
//! | `owner` | whose the other end is, on this host |
//! | `socket` | a connection over a TCP or unix socket |
//! | `tls` | a connection that is encrypted and whose sides have proven who they are |
//! | `poll` | waiting for one socket |

#![expect(unsafe_code)]

mod cancel;
mod connect;
mod error;
mod handshakes;
mod inherited;
mod listen;
mod owner;
mod poll;
mod race;
mod security;
mod socket;
#[cfg(test)]
mod tests;
mod tls;
mod url;

pub use connect::{Connected, connect, connect_one};
pub use error::LinkError;
pub use listen::{Listener, PeerInfo};
pub use security::{Security, TlsFiles};
pub use tls::{TlsFailure, TlsFilesError};
pub use url::{HostPort, InvalidUrl, LinkUrl};
