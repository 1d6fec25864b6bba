//! Connecting to a peer that may be reached in several ways.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration::ports::Channel;
use socket2::{Domain, Protocol, Socket, Type};

use super::cancel::Cancel;
use super::error::LinkError;
use super::poll::{self, remaining};
use super::race::{Attempt, Race, race};
use super::security::Security;
use super::socket::SocketChannel;
use super::tls::Client;
use super::url::{HostPort, LinkUrl, is_loopback};
use crate::host::socket_file;

/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 16;
/// Pause between tries of a unix socket whose listener is busy: it cannot be waited for.
const BUSY_INTERVAL: Duration = Duration::from_millis(10);

/// A connection to the peer.
pub struct Connected {
    /// The connection. It has a time-out of 30 s until another is set.
    pub channel: Box<dyn Channel>,
    /// The candidate that was taken.
    pub url: LinkUrl,
    /// Every candidate, in the order given, and how long it took or why it was not taken.
    pub attempts: Vec<(LinkUrl, Result<Duration, LinkError>)>,
}

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = f.debug_struct("Connected");
        text.field("url", &self.url)
            .field("attempts", &self.attempts);
        text.finish_non_exhaustive()
    }
}

/// Connects to one of `urls`, which are tried side by side, and names with several addresses by
/// all of them. The first to answer is taken; an earlier one has a head start of 30 ms before the
/// next. The others are given up at once. Where a candidate answers and then proves unfit (a
/// certificate that is not trusted), it counts as one that failed.
///
/// It is given up soon after `cancelled` says so.
///
/// # Errors
/// [`LinkError`]; with several candidates [`LinkError::Unreachable`] has each one's reason. Those that
/// were given up have not answered.
pub fn connect(
    urls: &[LinkUrl],
    security: &Security,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> Result<Connected, LinkError> {
    let first = urls.first().ok_or(LinkError::NoCandidates)?;
    let dialer = Arc::new(Dialer::new(urls, security)?);
    let attempts = urls.iter().map(|url| {
        let (dialer, url) = (Arc::clone(&dialer), url.clone());
        let attempt = move |cancel: &Cancel| dialer.open(&url, cancel, deadline);
        Box::new(attempt) as Attempt<Box<dyn Channel>, LinkError>
    });
    let ended = race(attempts.collect(), &Cancel::default(), cancelled, deadline);
    let ended = ended.map_err(LinkError::host(first, "no thread to connect with"))?;
    let (winner, outcomes) = settle(urls, ended);
    match winner {
        Some((number, channel)) => Ok(Connected {
            channel,
            url: urls[number].clone(),
            attempts: outcomes,
        }),
        None => Err(failure(outcomes)),
    }
}

/// Connects to `url`, unless it is given up.
///
/// # Errors
/// [`LinkError`].
pub fn connect_one(
    url: &LinkUrl,
    security: &Security,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> Result<Box<dyn Channel>, LinkError> {
    let urls = std::slice::from_ref(url);
    connect(urls, security, deadline, cancelled).map(|connected| connected.channel)
}

/// What became of each candidate.
type Outcomes = Vec<(LinkUrl, Result<Duration, LinkError>)>;

/// Gives those that were still under way a reason, too.
fn settle<T>(urls: &[LinkUrl], ended: Race<T, LinkError>) -> (Option<(usize, T)>, Outcomes) {
    let won = ended.winner.is_some();
    let waited = ended.took;
    let outcomes = urls.iter().zip(ended.outcomes).map(|(url, outcome)| {
        let url = url.clone();
        let outcome = outcome.unwrap_or_else(|| {
            let url = url.clone();
            Err(if won {
                LinkError::Outrun { url, waited }
            } else {
                LinkError::NoAnswer { url, waited }
            })
        });
        (url, outcome)
    });
    let outcomes = outcomes.collect();
    (ended.winner, outcomes)
}

/// The one reason, or all of them.
fn failure(outcomes: Outcomes) -> LinkError {
    let failed = outcomes.into_iter();
    let failed = failed.filter_map(|(url, outcome)| outcome.err().map(|error| (url, error)));
    let mut failed: Vec<_> = failed.collect();
    match failed.len() {
        1 => failed.remove(0).1,
        _ => LinkError::Unreachable(failed),
    }
}

/// Makes one connection.
struct Dialer {
    security: Security,
    /// When some address needs it.
    tls: Option<Client>,
}

impl Dialer {
    fn new(urls: &[LinkUrl], security: &Security) -> Result<Self, LinkError> {
        let tls = match (urls.iter().find(|url| url.is_encrypted()), &security.tls) {
            (Some(_), Some(files)) => Some(Client::new(files).map_err(LinkError::TlsFiles)?),
            (Some(url), None) => return Err(LinkError::NoTlsFiles { url: url.clone() }),
            (None, _) => None,
        };
        Ok(Self {
            security: security.clone(),
            tls,
        })
    }

    fn open(
        &self,
        url: &LinkUrl,
        cancel: &Cancel,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, LinkError> {
        let begin = Instant::now();
        let socket = match url {
            LinkUrl::Unix(path) => {
                let socket = connect_unix(path, cancel, deadline);
                socket.map_err(refusal(url, begin))?
            }
            LinkUrl::Tcp(host_port) => {
                let addresses = resolve(host_port)?;
                let stays = addresses.iter().all(|address| is_loopback(address.ip()));
                if !stays && !self.security.plaintext {
                    return Err(LinkError::Plaintext { url: url.clone() });
                }
                connect_any(url, &addresses, cancel, deadline)?
            }
            LinkUrl::Tls(host_port) => {
                let addresses = resolve(host_port)?;
                let socket = connect_any(url, &addresses, cancel, deadline)?;
                return self.secure(url, host_port.host(), socket, deadline);
            }
        };
        let channel = SocketChannel::new(socket);
        let channel = channel.map_err(LinkError::host(url, "socket could not be set up"))?;
        Ok(Box::new(channel))
    }
}

impl Dialer {
    fn secure(
        &self,
        url: &LinkUrl,
        host: &str,
        socket: Socket,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, LinkError> {
        let tls = self.tls.as_ref();
        let tls = tls.ok_or_else(|| LinkError::NoTlsFiles { url: url.clone() })?;
        let name = self.security.server_name.as_deref().unwrap_or(host);
        let connected = tls.connect(socket, name, deadline);
        let channel = connected.map_err(|error| LinkError::handshake(url, error))?;
        Ok(Box::new(channel))
    }
}

/// What an attempt on `url` that began then has met.
fn refusal(url: &LinkUrl, begin: Instant) -> impl FnOnce(io::Error) -> LinkError {
    let url = url.clone();
    move |source| match source.kind() {
        io::ErrorKind::TimedOut => LinkError::NoAnswer {
            url,
            waited: begin.elapsed(),
        },
        _ => LinkError::host(&url, "no connection")(source),
    }
}

/// The addresses of a host, at least one.
pub(super) fn resolve(host_port: &HostPort) -> Result<Vec<SocketAddr>, LinkError> {
    let host = host_port.host();
    let failed = |source| LinkError::Resolve {
        host: host.to_owned(),
        source,
    };
    let addresses = (host, host_port.port()).to_socket_addrs().map_err(failed)?;
    let addresses: Vec<_> = addresses.take(ADDRESSES_MAX).collect();
    if addresses.is_empty() {
        return Err(failed(io::ErrorKind::NotFound.into()));
    }
    Ok(addresses)
}

/// Connects to one of a host's addresses.
fn connect_any(
    url: &LinkUrl,
    addresses: &[SocketAddr],
    cancel: &Cancel,
    deadline: Instant,
) -> Result<Socket, LinkError> {
    let begin = Instant::now();
    if let [address] = addresses {
        return connect_tcp(*address, cancel, deadline).map_err(refusal(url, begin));
    }
    let of_address =
        |address: &SocketAddr| LinkUrl::of_ip(url.is_encrypted(), HostPort::from(*address));
    let urls: Vec<_> = addresses.iter().map(of_address).collect();
    let attempts = addresses.iter().zip(&urls).map(|(address, url)| {
        let (address, url) = (*address, url.clone());
        let attempt = move |cancel: &Cancel| {
            connect_tcp(address, cancel, deadline).map_err(refusal(&url, begin))
        };
        Box::new(attempt) as Attempt<Socket, LinkError>
    });
    let given_up = || cancel.is_cancelled();
    let ended = race(attempts.collect(), cancel, &given_up, deadline);
    let ended = ended.map_err(LinkError::host(url, "no thread to connect with"))?;
    let (winner, outcomes) = settle(&urls, ended);
    let winner = winner.map(|(_, socket)| socket);
    winner.ok_or_else(|| failure(outcomes))
}

fn connect_tcp(address: SocketAddr, cancel: &Cancel, deadline: Instant) -> io::Result<Socket> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        _ => {}
    }
    // Not before: a socket that is not connecting yet cannot be shut down.
    cancel.guard(&socket)?;
    poll::wait_writable(socket.as_fd(), deadline)?;
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    // It may have been shut down instead.
    socket.peer_addr()?;
    Ok(socket)
}

fn connect_unix(path: &Path, cancel: &Cancel, deadline: Instant) -> io::Result<Socket> {
    loop {
        match socket_file::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if cancel.is_cancelled() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                thread::sleep(BUSY_INTERVAL.min(remaining(deadline)?));
            }
            connected => return connected.map(Socket::from),
        }
    }
}
