//! A server behind a socket, connected and connected again.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use devices::GuestRam;
use devices::virtio::DeviceType;
use devices::virtio::vhost_user::{PeerError, PeerLog, PeerOffer, PeerQueue, VhostUserPeer};
use socket2::{Domain, SockAddr, Socket, Type};
use vhost::vhost_user::Frontend;

use super::deadline::within;
use super::error::{RequestFailure, VhostUserError};
use super::session::{Failure, MAX_QUEUES, Session};

/// How long a server may take. A driver that initializes its device waits for the first two,
/// on its vCPU's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Taking the connection; then, anew, negotiation; a change of configuration.
    pub handshake: Duration,
    /// Mapping guest memory and setting up all queues.
    pub start: Duration,
    /// Stopping all queues, for which some servers wait for their disk.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(5),
            start: Duration::from_secs(10),
            stop: Duration::from_secs(30),
        }
    }
}

/// A connection.
struct Link {
    socket: Arc<UnixStream>,
    session: Session,
}

impl Drop for Link {
    fn drop(&mut self) {
        // Not left to closing: a thread that watches the connection has a descriptor of its own.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// A vhost-user server.
pub struct Peer {
    path: PathBuf,
    device_type: DeviceType,
    limits: Limits,
    /// What the server has offered last.
    offer: PeerOffer,
    /// In which the server marks its writes, as long as somebody wants to know of them.
    log: Option<PeerLog>,
    link: Option<Link>,
}

/// Connects to the server of a device of type `device_type` at `path`.
///
/// # Errors
/// [`VhostUserError`] names the path and what the server did.
pub fn connect(
    path: &Path,
    device_type: DeviceType,
    limits: Limits,
) -> Result<Box<dyn VhostUserPeer>, VhostUserError> {
    let stream = dial(path, limits.handshake)?;
    Ok(Box::new(Peer::new(path, device_type, limits, stream)?))
}

impl Peer {
    /// A server that is connected by `stream`; to connect again, `path` is dialled.
    ///
    /// # Errors
    /// [`VhostUserError`] names the path and what the server did.
    pub fn new(
        path: &Path,
        device_type: DeviceType,
        limits: Limits,
        stream: UnixStream,
    ) -> Result<Self, VhostUserError> {
        let link = Link::new(path, device_type, limits.handshake, stream)?;
        Ok(Self {
            path: path.to_owned(),
            device_type,
            limits,
            offer: link.session.offer,
            log: None,
            link: Some(link),
        })
    }

    /// Runs an exchange. A connection on which one has failed is given up: nobody knows what
    /// arrives there next. A refusal alone is an answer.
    fn exchange<T>(
        &mut self,
        limit: Duration,
        exchange: impl FnOnce(&mut Session) -> Result<T, Failure>,
    ) -> Result<T, VhostUserError> {
        let Some(link) = &mut self.link else {
            return Err(VhostUserError::NotConnected(self.path.clone()));
        };
        let socket = Arc::clone(&link.socket);
        let session = &mut link.session;
        let result = bounded(&self.path, limit, &socket, || exchange(session));
        if let Err(error) = &result
            && !is_refusal(error)
        {
            self.link = None;
        }
        result
    }
}

fn is_refusal(error: &VhostUserError) -> bool {
    let VhostUserError::Request { source, .. } = error else {
        return false;
    };
    matches!(source, RequestFailure::Refused | RequestFailure::NoLog)
}

/// Runs an exchange within `limit` and puts the path to its error.
fn bounded<T>(
    path: &Path,
    limit: Duration,
    socket: &UnixStream,
    exchange: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, VhostUserError> {
    let guarded = within(limit, socket, exchange);
    let (result, expired) = guarded.map_err(|source| VhostUserError::Host {
        path: path.to_owned(),
        what: "thread that watches the time",
        source,
    })?;
    result.map_err(|(request, failure)| {
        let source = if expired {
            RequestFailure::Timeout(limit)
        } else {
            failure
        };
        VhostUserError::Request {
            path: path.to_owned(),
            request,
            source,
        }
    })
}

/// Connects to `path`. Where its backlog is full, connect(2) waits as long as a send may.
fn dial(path: &Path, limit: Duration) -> Result<UnixStream, VhostUserError> {
    let attempt = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_write_timeout(Some(limit))?;
        socket.connect(&SockAddr::unix(path)?)?;
        // The `vhost` crate would try again for ever at each expiry.
        socket.set_write_timeout(None)?;
        Ok(socket)
    };
    let path = || path.to_owned();
    match attempt() {
        Ok(socket) => Ok(UnixStream::from(OwnedFd::from(socket))),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::NotFound => VhostUserError::NoSocket(path()),
            io::ErrorKind::ConnectionRefused => VhostUserError::NobodyListens(path()),
            io::ErrorKind::WouldBlock => VhostUserError::Busy {
                path: path(),
                limit,
            },
            _ => VhostUserError::Connect {
                path: path(),
                source: error,
            },
        }),
    }
}

impl Link {
    fn new(
        path: &Path,
        device_type: DeviceType,
        limit: Duration,
        stream: UnixStream,
    ) -> Result<Self, VhostUserError> {
        let socket = stream.try_clone().map_err(|source| VhostUserError::Host {
            path: path.to_owned(),
            what: "descriptor of the connection",
            source,
        })?;
        let frontend = Frontend::from_stream(stream, u64::from(MAX_QUEUES));
        let socket = Arc::new(socket);
        let negotiate = || Session::negotiate(frontend, &socket, device_type);
        let session = bounded(path, limit, &socket, negotiate)?;
        Ok(Self { session, socket })
    }
}

impl VhostUserPeer for Peer {
    fn offer(&self) -> PeerOffer {
        self.offer
    }

    fn reconnect(&mut self) -> Result<(), PeerError> {
        self.link = None;
        let limit = self.limits.handshake;
        let stream = dial(&self.path, limit)?;
        let link = Link::new(&self.path, self.device_type, limit, stream)?;
        self.offer = link.session.offer;
        self.link = Some(link);
        Ok(())
    }

    fn disconnect(&mut self) {
        self.link = None;
    }

    fn read_config(&mut self, data: &mut [u8]) -> Result<(), PeerError> {
        let limit = self.limits.handshake;
        Ok(self.exchange(limit, |session| session.read_config(data))?)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), PeerError> {
        let limit = self.limits.handshake;
        Ok(self.exchange(limit, |session| session.write_config(offset, data))?)
    }

    fn start(
        &mut self,
        memory: &GuestRam,
        features: u64,
        queues: &[PeerQueue<'_>],
    ) -> Result<(), PeerError> {
        let limit = self.limits.start;
        let log = self.log.clone();
        Ok(self.exchange(limit, |session| {
            session.start(memory, features, queues, log.as_ref())
        })?)
    }

    fn stop(&mut self, queues: &[u16]) -> Result<Vec<u16>, PeerError> {
        let limit = self.limits.stop;
        Ok(self.exchange(limit, |session| session.stop(queues))?)
    }

    fn set_log(&mut self, log: Option<&PeerLog>) -> Result<(), PeerError> {
        self.log = log.cloned();
        if self.link.is_none() {
            // The next one hears of it when it is started.
            return Ok(());
        }
        let limit = self.limits.start;
        Ok(self.exchange(limit, |session| session.set_log(log))?)
    }

    fn connection(&self) -> io::Result<OwnedFd> {
        let link = self.link.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        Ok(link.socket.try_clone()?.into())
    }
}
