//! All connections: where packets and events belong, and who is served next.

mod clients;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::Epoll;

use super::connection::{Connection, Fate, Outgoing};
use super::device::{VsockCounters, VsockOptions};
use super::host::VsockHost;
use super::packet::{HOST_CID, Header, Key, Op, TYPE_STREAM};
use super::table::{Entry, Table};

/// Resets that wait for room in the receive queue before no more packets are taken from the
/// guest (section 5.10.6.1).
const MAX_RESETS: usize = 256;
/// How long a client of the host may take to say where it wants to go.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

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
        clients::watch_listener(&epoll, &*host)?;
        Ok(Self {
            guest_cid: options.guest_cid,
            host,
            epoll,
            table: Table::new(options.max_connections),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: clients::FIRST_PORT,
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
        let Some(Entry::Connection(key, connection)) = self.table.remove(slot) else {
            return;
        };
        self.counters.closed.add(1);
        if fate == Fate::EndsWithReset {
            self.counters.resets.add(1);
            self.resets.push_back(connection.reset(key, self.guest_cid));
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
