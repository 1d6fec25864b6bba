//! Those who have connected, until they have said who they are or, without TLS, anything: side by side,
//! for one who is silent holds nobody up.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use migration::ports::Channel;
use parking_lot::Mutex;
use socket2::Socket;

use super::error::LinkError;
use super::listen::PeerInfo;
use super::poll;
use super::socket::SocketChannel;
use super::tls::{HANDSHAKE_MAX, HandshakeError, Server};

/// Those under way at most; for one more the oldest goes.
const MAX_UNDER_WAY: usize = 16;

type Secured = Result<(Box<dyn Channel>, PeerInfo), LinkError>;

/// What becomes of connections to one listener.
pub(super) struct Handshakes {
    sender: Sender<Secured>,
    done: Mutex<Receiver<Secured>>,
    under_way: Arc<Mutex<UnderWay>>,
}

/// Connections that have not said enough yet, the oldest first.
#[derive(Debug, Default)]
struct UnderWay {
    sockets: VecDeque<(u64, Socket)>,
    begun: u64,
}

impl UnderWay {
    /// Forgets one; whether it was still there.
    fn leave(&mut self, number: u64) -> bool {
        let place = self.sockets.iter().position(|(own, _)| *own == number);
        place.is_some_and(|place| self.sockets.remove(place).is_some())
    }
}

impl std::fmt::Debug for Handshakes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = f.debug_struct("Handshakes");
        text.field("under_way", &self.under_way.lock().sockets.len())
            .finish_non_exhaustive()
    }
}

impl Default for Handshakes {
    fn default() -> Self {
        let (sender, done) = channel();
        Self {
            sender,
            done: Mutex::new(done),
            under_way: Arc::default(),
        }
    }
}

impl Handshakes {
    /// Begins with one on a thread of its own, which ends with it.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(super) fn begin(
        &self,
        tls: Option<&Server>,
        socket: Socket,
        peer: PeerInfo,
    ) -> io::Result<()> {
        let number = self.enter(&socket)?;
        let under_way = Arc::clone(&self.under_way);
        let (tls, sender) = (tls.cloned(), self.sender.clone());
        let thread = std::thread::Builder::new().name("mig-hello".to_owned());
        let handshake = move || {
            let secured = hear(tls.as_ref(), socket, &peer).map(|channel| (channel, peer));
            let mut under_way = under_way.lock();
            // Else it had to make room.
            if under_way.leave(number) {
                // The listener may be gone, and the connection with it.
                let _ = sender.send(secured);
            }
        };
        let spawned = thread.spawn(handshake).map(drop);
        spawned.inspect_err(|_| {
            self.under_way.lock().leave(number);
        })
    }

    /// One that has ended.
    pub(super) fn next(&self) -> Option<Secured> {
        self.done.lock().try_recv().ok()
    }

    pub(super) fn are_under_way(&self) -> bool {
        !self.under_way.lock().sockets.is_empty()
    }

    /// Notes one more, and makes room for it; its number.
    fn enter(&self, socket: &Socket) -> io::Result<u64> {
        let socket = socket.try_clone()?;
        let mut under_way = self.under_way.lock();
        if under_way.sockets.len() >= MAX_UNDER_WAY
            && let Some((_, oldest)) = under_way.sockets.pop_front()
        {
            log::debug!("a connection made room that has not said who it is");
            // Its thread ends, too.
            let _ = oldest.shutdown(Shutdown::Both);
        }
        under_way.begun += 1;
        let number = under_way.begun;
        under_way.sockets.push_back((number, socket));
        Ok(number)
    }
}

/// Waits for the first words. It is those who connect that speak first.
fn hear(
    tls: Option<&Server>,
    socket: Socket,
    peer: &PeerInfo,
) -> Result<Box<dyn Channel>, LinkError> {
    let deadline = Instant::now() + HANDSHAKE_MAX;
    if tls.is_none() {
        let heard = poll::wait_readable(socket.as_fd(), deadline);
        heard.map_err(|source| match source.kind() {
            io::ErrorKind::TimedOut => LinkError::Silent {
                peer: peer.to_string(),
                waited: HANDSHAKE_MAX,
            },
            _ => LinkError::handshake(peer, HandshakeError::Io(source)),
        })?;
    }
    secure(tls, socket, peer, deadline)
}

/// A connection whose other end is `peer`; with TLS once it has said who it is.
pub(super) fn secure(
    tls: Option<&Server>,
    socket: Socket,
    peer: &PeerInfo,
    deadline: Instant,
) -> Result<Box<dyn Channel>, LinkError> {
    let failed = |error| LinkError::handshake(peer, error);
    Ok(match tls {
        Some(tls) => Box::new(tls.accept(socket, deadline).map_err(failed)?),
        None => {
            let channel = SocketChannel::new(socket).map_err(HandshakeError::Io);
            Box::new(channel.map_err(failed)?)
        }
    })
}
