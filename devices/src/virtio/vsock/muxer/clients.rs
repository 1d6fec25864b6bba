//! The host's side of the muxer: what its sockets have to say, and clients that want to reach the
//! guest.

use std::io;
use std::os::fd::RawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Muxer;
use crate::virtio::vsock::connection::{Connection, Fate};
use crate::virtio::vsock::handshake::{Handshake, Progress};
use crate::virtio::vsock::host::VsockHost;
use crate::virtio::vsock::packet::Key;
use crate::virtio::vsock::table::Entry;
use crate::warn_limited;

/// Clients accepted, and events handled, before others get their turn.
const BATCH: usize = 64;
/// Where the search for a free port of the host begins; those below are services.
pub(super) const FIRST_PORT: u32 = 1 << 30;
/// Token of the listener; other tokens are slots.
const LISTENER: u64 = u64::MAX;

/// Watches for clients.
pub(super) fn watch_listener(epoll: &Epoll, host: &dyn VsockHost) -> io::Result<()> {
    let event = EpollEvent::new(EventSet::IN, LISTENER);
    epoll.ctl(ControlOperation::Add, host.as_raw_fd(), event)
}

impl Muxer {
    /// Watches a stream that the next slot gets. Edge-triggered: entries remember what their
    /// stream is ready for until it says otherwise.
    pub(super) fn watch(&self, stream: RawFd) -> io::Result<()> {
        let interest =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(interest, self.table.next_slot() as u64);
        self.epoll.ctl(ControlOperation::Add, stream, event)
    }

    /// Handles a batch of what has happened on the host.
    pub(in crate::virtio::vsock) fn poll_host(&mut self) {
        let mut events = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) => {
                if error.kind() != io::ErrorKind::Interrupted {
                    warn_limited!(error:% = error; "vsock sockets could not be polled");
                }
                return;
            }
        };
        for event in events.get(..count).unwrap_or_default() {
            match event.data() {
                LISTENER => self.accept(),
                // A slot that was given to somebody else in this batch only looks once too often.
                slot => self.stream_ready(slot, event.event_set()),
            }
        }
    }

    fn stream_ready(&mut self, slot: u64, events: EventSet) {
        let slot = usize::try_from(slot).unwrap_or(usize::MAX);
        let error = events.contains(EventSet::ERROR);
        let readable = error || events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        let writable = error || events.contains(EventSet::OUT);
        let hangup = events.contains(EventSet::HANG_UP);
        match self.entry(slot) {
            Some(Entry::Connection(_, connection)) => {
                let fate = connection.stream_ready(readable, writable, hangup);
                self.settle(slot, fate);
            }
            Some(Entry::Handshake(_)) => self.shake_hands(slot),
            None => {}
        }
    }

    fn accept(&mut self) {
        for _ in 0..BATCH {
            let accepted = self.host.accept().and_then(|stream| {
                if !self.table.has_room() {
                    self.counters.refused_connections.add(1);
                    return Ok(());
                }
                self.watch(stream.as_raw_fd())?;
                let handshake = Entry::Handshake(Handshake::new(stream));
                self.table.insert(handshake);
                self.needs_tick = true;
                Ok(())
            });
            match accepted {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    warn_limited!(error:% = error; "vsock client could not be accepted");
                    self.listen(false);
                    return;
                }
            }
        }
    }

    /// Turns the listener off when the host cannot accept, so that the thread does not spin.
    pub(super) fn listen(&mut self, on: bool) {
        let interest = if on { EventSet::IN } else { EventSet::empty() };
        let event = EpollEvent::new(interest, LISTENER);
        let result = self
            .epoll
            .ctl(ControlOperation::Modify, self.host.as_raw_fd(), event);
        if let Err(error) = result {
            warn_limited!(error:% = error; "vsock listener could not be changed");
        }
        self.deaf = !on;
        self.needs_tick |= self.deaf;
    }

    fn shake_hands(&mut self, slot: usize) {
        let Some(Entry::Handshake(handshake)) = self.entry(slot) else {
            return;
        };
        let guest_port = match handshake.advance() {
            Progress::Waits => return,
            Progress::Wants(port) => port,
            Progress::Failed => {
                self.counters.refused_connections.add(1);
                self.table.remove(slot);
                return;
            }
        };
        let Some(Entry::Handshake(handshake)) = self.table.remove(slot) else {
            return;
        };
        let host_port = self.free_port(guest_port);
        let key = Key {
            guest_port,
            host_port,
        };
        let connection = Connection::requested_by_host(handshake.into_stream());
        self.counters.opened.add(1);
        // The slot just given up is the next: the stream stays watched under its number.
        let slot = self.table.insert(Entry::Connection(key, connection));
        self.settle(slot, Fate::Lives);
    }

    /// A port of the host that no connection with `guest_port` has. There are more of them than
    /// connections.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_port;
            self.next_port = host_port.checked_add(1).unwrap_or(FIRST_PORT);
            let key = Key {
                guest_port,
                host_port,
            };
            if self.table.find(key).is_none() {
                return host_port;
            }
        }
    }
}
