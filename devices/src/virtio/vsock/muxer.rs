//! All connections: where packets and events belong, and who is served next.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Fate, Outgoing};
use super::device::{VsockCounters, VsockOptions};
use super::handshake::{Handshake, Progress};
use super::host::VsockHost;
use super::packet::{HOST_CID, Header, Key, Op, TYPE_STREAM};
use super::table::{Entry, Table};
use crate::warn_limited;

/// Resets that wait for room in the receive queue before no more packets are taken from the
/// guest (section 5.10.6.1).
const MAX_RESETS: usize = 256;
/// Clients accepted, and events handled, before others get their turn.
const BATCH: usize = 64;
/// Where the search for a free port of the host begins; those below are services.
const FIRST_CLIENT_PORT: u32 = 1 << 30;
/// How long a client of the host may take to say where it wants to go.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// Token of the listener; other tokens are slots.
const LISTENER: u64 = u64::MAX;

/// Connections between one guest and its host.
pub(super) struct Muxer {
    guest_cid: u64,
    host: Box<dyn VsockHost>,
    epoll: Epoll,
    table: Table,
    /// Slots that have something for the guest, served in turn.
    ready: VecDeque<usize>,
    /// Resets for packets without a connection, or whose connection is over.
    resets: VecDeque<Header>,
    next_port: u32,
    counters: Arc<VsockCounters>,
    /// Something waits for its time to be up.
    needs_tick: bool,
    /// The listener is off until the next tick, because the host is out of descriptors.
    deaf: bool,
}

impl Muxer {
    pub(super) fn new(
        options: &VsockOptions,
        host: Box<dyn VsockHost>,
        counters: Arc<VsockCounters>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, LISTENER);
        epoll.ctl(ControlOperation::Add, host.as_raw_fd(), event)?;
        Ok(Self {
            guest_cid: options.guest_cid,
            host,
            epoll,
            table: Table::new(options.max_connections),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_CLIENT_PORT,
            counters,
            needs_tick: false,
            deaf: false,
        })
    }

    /// Whether packets from the guest may be taken: their answers would have a place to wait.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Whether the guest has packets to expect.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Whether [`Muxer::tick`] shall be called.
    pub(super) fn needs_tick(&self) -> bool {
        self.needs_tick
    }

    /// Handles a packet from the guest.
    pub(super) fn take_packet(&mut self, packet: &Header, data: &[u8]) {
        let Some((key, op)) = self.classify(packet) else {
            return;
        };
        let Some(slot) = self.table.find(key) else {
            match op {
                Op::Request => self.connect(key, packet),
                Op::Reset => {}
                _ => self.reset(packet),
            }
            return;
        };
        let Some(Entry::Connection(_, connection)) = self.entry(slot) else {
            return;
        };
        if op == Op::Request && connection.is_forgotten_by_guest() {
            self.settle(slot, Fate::Ends);
            return self.connect(key, packet);
        }
        let fate = connection.receive(key, packet, op, data);
        self.settle(slot, fate);
    }

    /// Refuses a packet whose length cannot be: its connection is over.
    pub(super) fn refuse_packet(&mut self, packet: &Header) {
        let Some((key, _)) = self.classify(packet) else {
            return;
        };
        self.counters.refused_packets.add(1);
        match self.table.find(key) {
            Some(slot) => self.settle(slot, Fate::EndsWithReset),
            None => self.reset(packet),
        }
    }

    /// Finds out what a packet is about. One that is about nothing is dropped or answered here.
    fn classify(&mut self, packet: &Header) -> Option<(Key, Op)> {
        if packet.src_cid.get() != self.guest_cid {
            // Whoever it claims to be would get the answer.
            self.counters.refused_packets.add(1);
            return None;
        }
        let op = Op::from_wire(packet.op.get());
        let for_host = packet.dst_cid.get() == HOST_CID;
        if !for_host || packet.kind.get() != TYPE_STREAM {
            self.counters.refused_packets.add(1);
            if op != Some(Op::Reset) {
                self.reset(packet);
            }
            return None;
        }
        let key = Key::of(packet);
        let Some(op) = op else {
            self.counters.refused_packets.add(1);
            match self.table.find(key) {
                Some(slot) => self.settle(slot, Fate::EndsWithReset),
                None => self.reset(packet),
            }
            return None;
        };
        Some((key, op))
    }

    fn reset(&mut self, packet: &Header) {
        self.counters.resets.add(1);
        self.resets.push_back(Header::reset_for(packet));
    }

    /// The next packet for the guest; [`Header::len`] bytes of data are in `buf`.
    pub(super) fn next_packet(&mut self, buf: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(slot) = self.ready.pop_front() {
            let guest_cid = self.guest_cid;
            let Some(place) = self.table.get_mut(slot) else {
                continue;
            };
            // The slot may have been given to somebody else meanwhile.
            if !std::mem::take(&mut place.queued) {
                continue;
            }
            let Entry::Connection(key, connection) = &mut place.entry else {
                continue;
            };
            match connection.next_packet(*key, guest_cid, buf) {
                Outgoing::Packet(header) => {
                    self.settle(slot, Fate::Lives);
                    return Some(header);
                }
                Outgoing::Nothing => {}
                Outgoing::Failed => {
                    self.settle(slot, Fate::EndsWithReset);
                    if let Some(reset) = self.resets.pop_front() {
                        return Some(reset);
                    }
                }
            }
        }
        None
    }

    fn entry(&mut self, slot: usize) -> Option<&mut Entry> {
        self.table.get_mut(slot).map(|slot| &mut slot.entry)
    }

    /// Draws the consequences of what has happened to a connection.
    fn settle(&mut self, slot: usize, fate: Fate) {
        if fate == Fate::Lives {
            let Some(place) = self.table.get_mut(slot) else {
                return;
            };
            let Entry::Connection(_, connection) = &place.entry else {
                return;
            };
            self.needs_tick |= connection.time_limit().is_some();
            if connection.has_packet() && !place.queued {
                place.queued = true;
                self.ready.push_back(slot);
            }
            return;
        }
        let Some(Entry::Connection(key, _)) = self.table.remove(slot) else {
            return;
        };
        self.counters.closed.add(1);
        if fate == Fate::EndsWithReset {
            self.counters.resets.add(1);
            self.resets.push_back(key.header(self.guest_cid, Op::Reset));
        }
    }

    /// A guest wants to reach a port of the host.
    fn connect(&mut self, key: Key, request: &Header) {
        let stream = match self.table.has_room() {
            true => self.host.connect(key.host_port),
            false => Err(io::ErrorKind::QuotaExceeded.into()),
        };
        let stream = stream.and_then(|stream| {
            self.watch(stream.as_raw_fd())?;
            Ok(stream)
        });
        match stream {
            Ok(stream) => {
                self.counters.opened.add(1);
                let connection = Connection::requested_by_guest(stream, request);
                let slot = self.table.insert(Entry::Connection(key, connection));
                self.settle(slot, Fate::Lives);
            }
            Err(error) => {
                self.counters.refused_connections.add(1);
                log::debug!(port = key.host_port, error:%; "vsock connection to the host refused");
                self.reset(request);
            }
        }
    }

    /// Watches a stream that the next slot gets. Edge-triggered: entries remember what their
    /// stream is ready for until it says otherwise.
    fn watch(&self, stream: RawFd) -> io::Result<()> {
        let interest =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(interest, self.table.next_slot() as u64);
        self.epoll.ctl(ControlOperation::Add, stream, event)
    }

    /// Handles a batch of what has happened on the host.
    pub(super) fn poll_host(&mut self) {
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
    fn listen(&mut self, on: bool) {
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
            self.next_port = host_port.checked_add(1).unwrap_or(FIRST_CLIENT_PORT);
            let key = Key {
                guest_port,
                host_port,
            };
            if self.table.find(key).is_none() {
                return host_port;
            }
        }
    }

    /// Ends what has waited for too long.
    pub(super) fn tick(&mut self, now: Instant) {
        self.needs_tick = false;
        if self.deaf {
            self.listen(true);
        }
        let mut expired = Vec::new();
        for (slot, place) in self.table.iter_mut() {
            let limit = match &place.entry {
                Entry::Handshake(_) => Some(HANDSHAKE_TIMEOUT),
                Entry::Connection(_, connection) => connection.time_limit(),
            };
            let Some(limit) = limit else {
                place.waits_since = None;
                continue;
            };
            self.needs_tick = true;
            let since = *place.waits_since.get_or_insert(now);
            if now.duration_since(since) >= limit {
                expired.push(slot);
            }
        }
        for slot in expired {
            match self.entry(slot) {
                Some(Entry::Connection(_, connection)) => {
                    let fate = connection.give_up();
                    self.settle(slot, fate);
                }
                Some(Entry::Handshake(_)) => {
                    self.counters.refused_connections.add(1);
                    self.table.remove(slot);
                }
                None => {}
            }
        }
    }

    /// The machine pauses: nobody's time runs.
    pub(super) fn pause(&mut self) {
        for (_, place) in self.table.iter_mut() {
            place.waits_since = None;
        }
    }

    /// The driver is gone, and with it the guest's ends of all connections. Clients that have not
    /// said yet where they want to go may meet the next driver.
    pub(super) fn clear(&mut self) {
        let connections = self.table.iter_mut();
        let connections = connections
            .filter(|(_, place)| matches!(place.entry, Entry::Connection(..)))
            .map(|(slot, _)| slot);
        for slot in connections.collect::<Vec<_>>() {
            self.settle(slot, Fate::Ends);
        }
        self.ready.clear();
        self.resets.clear();
    }
}

impl AsRawFd for Muxer {
    /// Readable when [`Muxer::poll_host`] has something to do.
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
