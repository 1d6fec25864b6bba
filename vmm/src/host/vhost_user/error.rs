//! What can go wrong with a vhost-user server.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use devices::virtio::vhost_user::UnfitPeer;

/// A vhost-user server cannot be used, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nothing is there.
    #[error("{}: there is no such socket, the vhost-user server must be running before", .0.display())]
    NoSocket(PathBuf),
    /// A socket is there that nobody listens on.
    #[error("{}: no vhost-user server listens there", .0.display())]
    NobodyListens(PathBuf),
    /// The server takes no connection, usually because it has one.
    #[error("{}: the vhost-user server takes no connection within {limit:?}", path.display())]
    Busy {
        /// The socket.
        path: PathBuf,
        /// How long it had.
        limit: Duration,
    },
    /// It cannot be connected to for another reason.
    #[error("{}: the vhost-user server cannot be connected", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The connection was given up before.
    #[error("{}: the vhost-user server is not connected", .0.display())]
    NotConnected(PathBuf),
    /// An exchange failed.
    #[error("{}: vhost-user request {request}", path.display())]
    Request {
        /// The socket.
        path: PathBuf,
        /// The request by its name in the specification, without `VHOST_USER_`.
        request: &'static str,
        /// What happened.
        #[source]
        source: RequestFailure,
    },
    /// The host refused a thread or descriptor.
    #[error("{}: {what}", path.display())]
    Host {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The server works, but not for this device.
    #[error("{}", path.display())]
    Unfit {
        /// The socket.
        path: PathBuf,
        /// What it lacks.
        #[source]
        source: UnfitPeer,
    },
}

/// How a single exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestFailure {
    /// The time was up.
    #[error("the server does not answer within {0:?}")]
    Timeout(Duration),
    /// The connection ended.
    #[error("the server has closed the connection")]
    Closed,
    /// The server has answered that it cannot do it.
    #[error("the server refuses")]
    Refused,
    /// What came back is not the answer to the request.
    #[error("the server's answer does not follow the vhost-user protocol")]
    Malformed,
    /// A queue's position is outside of a ring.
    #[error("the server reports position {0:#x} of a queue with 16-bit positions")]
    Position(u32),
    /// Guest memory cannot be shared.
    #[error("guest memory has no file behind it that the server could map")]
    NotShared,
    /// The server can be given no log of its writes.
    #[error(
        "the server offers no log of what it writes (VHOST_USER_PROTOCOL_F_LOG_SHMFD, VHOST_F_LOG_ALL)"
    )]
    NoLog,
    /// The connection failed.
    #[error("the connection failed")]
    Socket(#[source] io::Error),
    /// Anything else.
    #[error("the request could not be made")]
    Other(#[source] vhost::Error),
}

impl From<vhost::Error> for RequestFailure {
    fn from(error: vhost::Error) -> Self {
        use vhost::vhost_user::Error as Protocol;
        let vhost::Error::VhostUserProtocol(protocol) = error else {
            return Self::Other(error);
        };
        match protocol {
            // A message is only ever cut short by the end of the stream.
            Protocol::PartialMessage | Protocol::Disconnected | Protocol::SocketBroken(_) => {
                Self::Closed
            }
            Protocol::BackendInternalError => Self::Refused,
            Protocol::InvalidMessage | Protocol::OversizedMsg | Protocol::IncorrectFds => {
                Self::Malformed
            }
            other => Self::Other(vhost::Error::VhostUserProtocol(other)),
        }
    }
}
