//! TLS handshakes of those who have connected, side by side: one who is silent holds nobody up.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use migration::ports::Channel;
use parking_lot::Mutex;
use socket2::Socket;

use super::error::LinkError;
use super::listen::PeerInfo;
use super::tls::{HANDSHAKE_MAX, Server};

/// Handshakes under way at most; who connects meanwhile is turned away.
const MAX_UNDER_WAY: usize = 16;

type Secured = Result<(Box<dyn Channel>, PeerInfo), LinkError>;

/// What becomes of connections to one listener.
pub(super) struct Handshakes {
    sender: Sender<Secured>,
    done: Mutex<Receiver<Secured>>,
    under_way: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Handshakes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = f.debug_struct("Handshakes");
        text.field("under_way", &self.under_way)
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

/// One that is under way.
struct UnderWay(Arc<AtomicUsize>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Handshakes {
    /// Begins one on a thread of its own, which ends with it.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(super) fn begin(&self, tls: &Server, socket: Socket, peer: PeerInfo) -> io::Result<()> {
        if self.under_way.fetch_add(1, Ordering::AcqRel) >= MAX_UNDER_WAY {
            self.under_way.fetch_sub(1, Ordering::AcqRel);
            log::debug!(peer:%; "too many others have not said who they are");
            return Ok(());
        }
        let under_way = UnderWay(Arc::clone(&self.under_way));
        let (tls, sender) = (tls.clone(), self.sender.clone());
        let thread = std::thread::Builder::new().name("mig-tls".to_owned());
        let handshake = move || {
            let secured = match tls.accept(socket, Instant::now() + HANDSHAKE_MAX) {
                Ok(channel) => Ok((Box::new(channel) as Box<dyn Channel>, peer)),
                Err(error) => Err(LinkError::handshake(&peer, error)),
            };
            // The listener may be gone, and the connection with it.
            let _ = sender.send(secured);
            drop(under_way);
        };
        thread.spawn(handshake).map(drop)
    }

    /// One that has ended.
    pub(super) fn next(&self) -> Option<Secured> {
        self.done.lock().try_recv().ok()
    }

    pub(super) fn are_under_way(&self) -> bool {
        self.under_way.load(Ordering::Acquire) > 0
    }
}
