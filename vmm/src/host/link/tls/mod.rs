//! TLS 1.3 where both sides prove who they are.
//!
//! The server's certificate must be for the host that the client asked for; the client's must be
//! signed by the server's authority. A connection counts as made only when both are satisfied: a
//! TLS 1.3 client is done before the server has looked at its certificate, so it waits for the
//! session ticket that servers send afterwards. Nobody resumes with it.
//!
//! | module | what is in it |
//! |---|---|
//! | `files` | certificates and keys, read and checked |
//! | `endpoint` | the settings of both sides, and the handshake |
//! | `channel` | an established connection |
//! | `failure` | what rustls reports, in words |

mod channel;
mod endpoint;
mod failure;
mod files;

pub(super) use endpoint::{Client, HANDSHAKE_MAX, HandshakeError, Server};
pub use failure::TlsFailure;
pub use files::TlsFilesError;
