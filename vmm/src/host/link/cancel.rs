//! Giving up connections that are being made.

use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use socket2::Socket;

/// Ends what its holder does, from outside.
#[derive(Debug, Default)]
pub(super) struct Cancel {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    cancelled: bool,
    sockets: Vec<Socket>,
    children: Vec<Weak<Cancel>>,
}

impl Cancel {
    /// Something that ends with this, and can be ended alone.
    pub(super) fn child(&self) -> Arc<Self> {
        let child = Arc::new(Self::default());
        let mut state = self.state.lock();
        child.state.lock().cancelled = state.cancelled;
        state.children.push(Arc::downgrade(&child));
        child
    }

    /// Shuts `socket` down when cancelled, which wakes who waits for it.
    pub(super) fn guard(&self, socket: &Socket) -> io::Result<()> {
        let socket = socket.try_clone()?;
        let mut state = self.state.lock();
        if state.cancelled {
            return Err(io::ErrorKind::Interrupted.into());
        }
        state.sockets.push(socket);
        Ok(())
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.state.lock().cancelled
    }

    pub(super) fn cancel(&self) {
        let children = {
            let mut state = self.state.lock();
            state.cancelled = true;
            for socket in state.sockets.drain(..) {
                // Fails where it is not connected, and then nobody waits.
                let _ = socket.shutdown(Shutdown::Both);
            }
            std::mem::take(&mut state.children)
        };
        for child in children.iter().filter_map(Weak::upgrade) {
            child.cancel();
        }
    }
}
