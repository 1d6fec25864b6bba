//! Waiting for a peer to connect.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use migration::ports::Channel;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::connect::resolve;
use super::error::LinkError;
use super::handshakes::{Handshakes, secure};
use super::inherited::{self, Inherited};
use super::owner::owner;
use super::poll;
use super::security::Security;
use super::tls::{HANDSHAKE_MAX, Server};
use super::url::{HostPort, LinkUrl, is_loopback};
use crate::host::socket_file::{ListenError, SocketFile, effective_uid};

/// How often a wait for somebody new looks at those who are saying who they are.
const GLANCE: Duration = Duration::from_millis(2);

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Accepts connections at one address.
#[derive(Debug)]
pub struct Listener {
    source: Source,
    url: LinkUrl,
    /// When it speaks TLS.
    tls: Option<Server>,
    handshakes: Handshakes,
}

/// Where connections come from.
#[derive(Debug)]
enum Source {
    /// A socket that listens, ours or the service manager's.
    Socket(Socket),
    /// A socket in the file system, which is removed at the end.
    File(SocketFile),
    /// A single connection, made before this process began.
    Connection(Mutex<Option<Socket>>),
}

/// Who connected, and to where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    local: End,
    remote: End,
    encrypted: bool,
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Ip(SocketAddr),
    Unix(Option<PathBuf>),
}

impl Listener {
    /// Listens at `url`; a port of 0 lets the host choose one. A unix socket is for the owner
    /// only, replaces one that a dead process has left, and is removed at the end.
    ///
    /// # Errors
    /// [`LinkError`] when the host refuses, and for `tcp://` on anything but loopback unless
    /// `security` allows plaintext.
    pub fn bind(url: &LinkUrl, security: &Security) -> Result<Self, LinkError> {
        let host_port = match url {
            LinkUrl::Unix(path) => return Self::bind_unix(url, path),
            LinkUrl::Tcp(host_port) | LinkUrl::Tls(host_port) => host_port,
        };
        let addresses = resolve(host_port)?;
        let mut refusal = None;
        for address in addresses {
            check_plaintext(url, address.ip(), security)?;
            match listen_tcp(address) {
                Ok(socket) => {
                    let port = local_ip(&socket).map(|bound| bound.port());
                    let port = port.map_err(LinkError::host(url, "address unknown"))?;
                    let url = LinkUrl::of_ip(url.is_encrypted(), host_port.with_port(port));
                    return Self::new(Source::Socket(socket), url, security);
                }
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        let source = refusal.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into());
        Err(match source.kind() {
            io::ErrorKind::AddrInUse => LinkError::InUse { url: url.clone() },
            _ => LinkError::host(url, "cannot listen there")(source),
        })
    }

    /// What the service manager handed over (`sd_listen_fds(3)`): a socket that listens, or, of a
    /// service with `Accept=yes`, one that is connected already; then there is this one connection
    /// and no other. `None` when it handed over nothing. With certificates in `security` a TCP
    /// socket speaks TLS.
    ///
    /// # Errors
    /// [`LinkError::Activation`] when it is anything else, or was taken before.
    pub fn from_environment(security: &Security) -> Result<Option<Self>, LinkError> {
        let Some(inherited) = inherited::take()? else {
            return Ok(None);
        };
        let (source, end) = match inherited {
            Inherited::Listening(socket) => {
                let end = End::local(&socket).map_err(LinkError::Inherited)?;
                (Source::Socket(socket), end)
            }
            Inherited::Connected(socket) => {
                let end = End::local(&socket).map_err(LinkError::Inherited)?;
                (Source::Connection(Mutex::new(Some(socket))), end)
            }
        };
        let url = end.url(security.tls.is_some());
        if let End::Ip(address) = end {
            check_plaintext(&url, address.ip(), security)?;
        }
        Self::new(source, url, security).map(Some)
    }

    /// Listens where a peer that connected once can reach this process again: at the same address
    /// and another port, or at a new socket in `runtime_dir`.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn beside(
        peer: &PeerInfo,
        security: &Security,
        runtime_dir: &Path,
    ) -> Result<Self, LinkError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let url = match &peer.local {
            End::Ip(address) => {
                let mut address = *address;
                address.set_port(0);
                LinkUrl::of_ip(peer.encrypted, HostPort::from(address))
            }
            End::Unix(_) => {
                let count = COUNT.fetch_add(1, Ordering::Relaxed);
                let name = format!("migration-{}-{count}.link", std::process::id());
                LinkUrl::Unix(runtime_dir.join(name))
            }
        };
        Self::bind(&url, security)
    }

    fn bind_unix(url: &LinkUrl, path: &Path) -> Result<Self, LinkError> {
        let socket = SocketFile::open(path).map_err(|error| match error {
            ListenError::InUse => LinkError::InUse { url: url.clone() },
            ListenError::Host(source) => LinkError::host(url, "cannot listen there")(source),
        })?;
        Ok(Self {
            source: Source::File(socket),
            url: url.clone(),
            tls: None,
            handshakes: Handshakes::default(),
        })
    }

    fn new(source: Source, url: LinkUrl, security: &Security) -> Result<Self, LinkError> {
        let tls = match &security.tls {
            _ if !url.is_encrypted() => None,
            Some(files) => Some(Server::new(files).map_err(LinkError::TlsFiles)?),
            None => return Err(LinkError::NoTlsFiles { url }),
        };
        Ok(Self {
            source,
            url,
            tls,
            handshakes: Handshakes::default(),
        })
    }

    /// Whether there is one connection and no other.
    #[must_use]
    pub fn is_single(&self) -> bool {
        matches!(self.source, Source::Connection(_))
    }

    /// Where it listens, with the port that the host chose. The host is as it was given; for one
    /// that a peer can use see [`url_for`](Self::url_for).
    #[must_use]
    pub fn local_url(&self) -> &LinkUrl {
        &self.url
    }

    /// Where `peer`, who has reached this host before, can reach this listener: one that listens
    /// on every address goes by the one that the peer used.
    #[must_use]
    pub fn url_for(&self, peer: &PeerInfo) -> LinkUrl {
        let everywhere = |host_port: &HostPort| {
            let address = host_port.host().parse::<IpAddr>();
            address.is_ok_and(|address| address.is_unspecified())
        };
        match (self.url.host_port(), &peer.local) {
            (Some(host_port), End::Ip(local)) if everywhere(host_port) => {
                let host_port = HostPort::from(*local).with_port(host_port.port());
                LinkUrl::of_ip(self.url.is_encrypted(), host_port)
            }
            _ => self.url.clone(),
        }
    }

    /// Waits for a connection. It has a time-out of 30 s until another is set.
    ///
    /// A peer that tries several addresses of this host side by side connects more often than it
    /// means to, and closes what it does not need without a word.
    ///
    /// # Errors
    /// [`LinkError::NobodyCame`] when the deadline passes, [`LinkError::NoFurther`] after the
    /// only connection there is. Where [`LinkError::is_peer_fault`], somebody connected who is not
    /// trusted or took too long to say who he is (10 s), and the next one may be the right one.
    pub fn accept(&self, deadline: Instant) -> Result<(Box<dyn Channel>, PeerInfo), LinkError> {
        self.secure(self.next_socket(deadline)?, deadline)
    }

    /// The same, but the deadline is for somebody to come: who has come has all the time that a
    /// peer ever has (10 s) to say who he is, or without TLS to say anything, also over several
    /// calls, and holds up nobody else. For those who look at something else now and then.
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    pub fn accept_patiently(
        &self,
        deadline: Instant,
    ) -> Result<(Box<dyn Channel>, PeerInfo), LinkError> {
        if self.is_single() {
            let socket = self.next_socket(deadline)?;
            return self.secure(socket, Instant::now() + HANDSHAKE_MAX);
        }
        loop {
            // First: one that ends in between has sent what came of it.
            let are_under_way = self.handshakes.are_under_way();
            if let Some(secured) = self.handshakes.next() {
                return secured;
            }
            let until = match are_under_way {
                true => deadline.min(Instant::now() + GLANCE),
                false => deadline,
            };
            match self.next_socket(until) {
                Ok(socket) => {
                    let peer = self.peer(&socket)?;
                    let begun = self.handshakes.begin(self.tls.as_ref(), socket, peer);
                    begun.map_err(LinkError::host(&self.url, "no thread for a new connection"))?;
                }
                Err(error) if error.is_timeout() && Instant::now() < deadline => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn peer(&self, socket: &Socket) -> Result<PeerInfo, LinkError> {
        let peer = PeerInfo::of(socket, self.url.is_encrypted());
        // One that was reset before it was accepted has no name any more.
        peer.map_err(|source| LinkError::Handshake {
            peer: "somebody".to_owned(),
            source,
        })
    }

    fn next_socket(&self, deadline: Instant) -> Result<Socket, LinkError> {
        let begin = Instant::now();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::TimedOut => self.nobody(begin.elapsed()),
            _ => LinkError::host(&self.url, "no connection could be accepted")(source),
        };
        let socket = match &self.source {
            Source::Socket(listener) => accept(listener.as_fd(), deadline, || {
                listener.accept().map(|(socket, _)| socket)
            }),
            Source::File(file) => accept(file.listener().as_fd(), deadline, || {
                file.listener().accept().map(|(socket, _)| socket.into())
            }),
            Source::Connection(socket) => {
                let socket = socket.lock().take();
                let url = self.url.clone();
                Ok(socket.ok_or(LinkError::NoFurther { url })?)
            }
        };
        socket.map_err(failed)
    }

    fn secure(
        &self,
        socket: Socket,
        deadline: Instant,
    ) -> Result<(Box<dyn Channel>, PeerInfo), LinkError> {
        let peer = self.peer(&socket)?;
        let channel = secure(self.tls.as_ref(), socket, &peer, deadline)?;
        Ok((channel, peer))
    }

    fn nobody(&self, waited: Duration) -> LinkError {
        LinkError::NobodyCame {
            url: self.url.clone(),
            waited,
        }
    }
}

impl PeerInfo {
    fn of(socket: &Socket, encrypted: bool) -> io::Result<Self> {
        Ok(Self {
            local: End::local(socket)?,
            remote: End::of(&socket.peer_addr()?)?,
            encrypted,
        })
    }

    /// Whether the peer is one who may do here what this process may: it has shown a certificate,
    /// was let at a unix socket, or is, while it is connected over loopback, a process of this
    /// user or of root.
    #[must_use]
    pub fn is_known(&self) -> bool {
        match (&self.local, &self.remote) {
            _ if self.encrypted => true,
            (End::Ip(local), End::Ip(remote)) if is_loopback(remote.ip()) => {
                let owner = owner(*remote, *local);
                owner.is_some_and(|uid| uid == 0 || uid == effective_uid())
            }
            (End::Ip(_), _) | (_, End::Ip(_)) => false,
            (End::Unix(_), End::Unix(_)) => true,
        }
    }
}

impl fmt::Display for PeerInfo {
    /// The peer's end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.remote, &self.local) {
            (End::Ip(address), _) => HostPort::from(*address).fmt(f),
            (End::Unix(Some(path)), _) | (_, End::Unix(Some(path))) => {
                write!(f, "a process at {}", path.display())
            }
            (End::Unix(None), _) => f.write_str("a process of this host"),
        }
    }
}

impl End {
    fn local(socket: &Socket) -> io::Result<Self> {
        Self::of(&socket.local_addr()?)
    }

    fn of(address: &SockAddr) -> io::Result<Self> {
        match address.as_socket() {
            Some(address) => Ok(Self::Ip(address)),
            None if address.domain() == Domain::UNIX => {
                Ok(Self::Unix(address.as_pathname().map(Path::to_owned)))
            }
            None => Err(io::Error::other("neither an internet nor a unix socket")),
        }
    }

    fn url(&self, encrypted: bool) -> LinkUrl {
        match self {
            Self::Ip(address) => LinkUrl::of_ip(encrypted, HostPort::from(*address)),
            // Without a path only those who hold a descriptor reach it.
            Self::Unix(path) => LinkUrl::Unix(path.clone().unwrap_or_default()),
        }
    }
}

fn check_plaintext(url: &LinkUrl, address: IpAddr, security: &Security) -> Result<(), LinkError> {
    if url.is_encrypted() || security.plaintext || is_loopback(address) {
        return Ok(());
    }
    Err(LinkError::Plaintext { url: url.clone() })
}

fn listen_tcp(address: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    // Else connections of a process that ended block the port for a minute.
    socket.set_reuse_address(true)?;
    // A peer may be gone again before it is accepted, and accept(2) would wait for the next.
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn local_ip(socket: &Socket) -> io::Result<SocketAddr> {
    let address = socket.local_addr()?.as_socket();
    address.ok_or_else(|| io::Error::other("not an internet address"))
}

/// Accepts the next connection of a listener that does not block.
fn accept(
    listener: BorrowedFd<'_>,
    deadline: Instant,
    next: impl Fn() -> io::Result<Socket>,
) -> io::Result<Socket> {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    loop {
        poll::wait_readable(listener, deadline)?;
        match next() {
            Err(error) if matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock) => {}
            result => return result,
        }
    }
}
