//! One connection: its states, its credit and what waits for the host.
//!
//! Pure with respect to the queues: packets from the guest go in, packets for the guest come out,
//! and a [`HostStream`] lies on the other side.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::time::Duration;

use super::host::HostStream;
use super::packet::{Header, Key, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Room for data that the host has not taken yet; what the guest is told in `buf_alloc`.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;

/// How long a guest may take to answer a request, and either side to end a connection. Linux
/// gives a request 2 s and a close 8 s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Fate {
    /// It goes on.
    Lives,
    /// It is over, and the guest knows.
    Ends,
    /// It is over, and the guest must be told by a reset.
    EndsWithReset,
}

/// What a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    /// A packet; [`Header::len`] bytes of data are in the buffer.
    Packet(Header),
    /// Nothing at present.
    Nothing,
    /// The host's end has failed.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has not answered the host's request.
    Requested,
    /// Data may flow.
    Established,
    /// The guest has ended both directions; data still goes to the host.
    Closing {
        /// The guest waits for a reset at the end.
        reset: bool,
    },
}

/// Room at the guest for data from the host (section 5.10.6.3). All counters wrap.
#[derive(Clone, Copy, Debug, Default)]
struct GuestCredit {
    buf_alloc: u32,
    fwd_cnt: u32,
    /// Bytes sent.
    tx_cnt: u32,
}

impl GuestCredit {
    /// A guest that acknowledges more than it was sent, or takes back room, has none.
    fn free(&self) -> u32 {
        let in_flight = self.tx_cnt.wrapping_sub(self.fwd_cnt);
        self.buf_alloc.saturating_sub(in_flight)
    }
}

/// Packets without data that the guest is to be sent.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    /// The answer to a request for credit.
    credit_answer: bool,
    /// News of credit, which any packet carries.
    credit_update: bool,
}

/// A stream between a port of the guest and one of the host.
pub(super) struct Connection {
    stream: Box<dyn HostStream>,
    phase: Phase,
    /// Data for the host, at most [`BUFFER_BYTES`].
    backlog: VecDeque<u8>,
    /// Bytes that the host has taken, and that count as the guest was told it.
    fwd_cnt: u32,
    announced_fwd_cnt: u32,
    credit: GuestCredit,
    /// The guest was asked for credit and has given none since.
    asked_for_credit: bool,
    /// What the stream was when last heard of.
    readable: bool,
    writable: bool,
    /// Directions that each side has ended, in terms of that side: `SHUTDOWN_*`.
    guest_ended: u32,
    host_ended: u32,
    /// What the guest was told of `host_ended`, and whether the host knows of `guest_ended`.
    told_guest: u32,
    told_host: bool,
    owed: Owed,
}

impl Connection {
    fn new(stream: Box<dyn HostStream>, phase: Phase) -> Self {
        Self {
            stream,
            phase,
            backlog: VecDeque::new(),
            fwd_cnt: 0,
            announced_fwd_cnt: 0,
            credit: GuestCredit::default(),
            asked_for_credit: false,
            // Found out by trying.
            readable: true,
            writable: true,
            guest_ended: 0,
            host_ended: 0,
            told_guest: 0,
            told_host: false,
            owed: Owed::default(),
        }
    }

    /// A client of the host wants to reach the guest.
    pub(super) fn requested_by_host(stream: Box<dyn HostStream>) -> Self {
        let mut connection = Self::new(stream, Phase::Requested);
        connection.owed.request = true;
        connection
    }

    /// The guest's `request` was accepted by the host.
    pub(super) fn requested_by_guest(stream: Box<dyn HostStream>, request: &Header) -> Self {
        let mut connection = Self::new(stream, Phase::Established);
        connection.take_credit(request);
        connection.owed.response = true;
        connection
    }

    /// Handles a packet from the guest. `key` names the connection to a client of the host.
    pub(super) fn receive(&mut self, key: Key, packet: &Header, op: Op, data: &[u8]) -> Fate {
        self.take_credit(packet);
        match (self.phase, op) {
            (_, Op::Reset) => self.guest_reset(),
            (Phase::Requested, Op::Response) => {
                self.phase = Phase::Established;
                self.greet_client(key)
            }
            (Phase::Established, Op::Data) => self.take_data(data),
            (Phase::Established, Op::Shutdown) => self.guest_shutdown(packet.flags.get()),
            (Phase::Established, Op::CreditRequest) => {
                self.owed.credit_answer = true;
                Fate::Lives
            }
            (Phase::Established | Phase::Closing { .. }, Op::CreditUpdate)
            | (Phase::Closing { .. }, Op::CreditRequest | Op::Shutdown) => Fate::Lives,
            (Phase::Requested, Op::Shutdown | Op::Data | Op::CreditUpdate | Op::CreditRequest)
            | (Phase::Established | Phase::Closing { .. }, Op::Response)
            | (Phase::Closing { .. }, Op::Data)
            | (_, Op::Request) => Fate::EndsWithReset,
        }
    }

    /// Handles what epoll says about the stream.
    pub(super) fn stream_ready(&mut self, readable: bool, writable: bool, hangup: bool) -> Fate {
        self.readable |= readable || hangup;
        self.writable |= writable || hangup;
        if hangup {
            if self.phase == Phase::Requested {
                // The client is gone before the guest has answered.
                return self.give_up();
            }
            self.host_ended |= SHUTDOWN_RECEIVE;
            if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
                // Nobody will read up to the end.
                self.host_ended |= SHUTDOWN_SEND;
            }
        }
        self.flush()
    }

    /// Ends a connection that the other side did not answer for or end in time.
    pub(super) fn give_up(&self) -> Fate {
        match self.phase {
            Phase::Closing { reset: false } => Fate::Ends,
            // The guest has not heard of it.
            Phase::Requested if self.owed.request => Fate::Ends,
            Phase::Requested | Phase::Established | Phase::Closing { reset: true } => {
                Fate::EndsWithReset
            }
        }
    }

    /// How long the present state may last.
    pub(super) fn time_limit(&self) -> Option<Duration> {
        match self.phase {
            Phase::Requested => Some(REQUEST_TIMEOUT),
            Phase::Closing { .. } => Some(CLOSE_TIMEOUT),
            Phase::Established => (self.told_guest == SHUTDOWN_BOTH).then_some(CLOSE_TIMEOUT),
        }
    }

    /// Whether the guest no longer knows this connection, so that it may use its ports again.
    pub(super) fn is_forgotten_by_guest(&self) -> bool {
        self.phase == Phase::Closing { reset: false }
    }

    /// Whether data waits for the host.
    #[cfg(test)]
    pub(super) fn is_stalled(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether [`Connection::next_packet`] has anything to do.
    pub(super) fn has_packet(&self) -> bool {
        let Owed {
            request,
            response,
            credit_answer,
            credit_update,
        } = self.owed;
        let owed = request || response || credit_answer || credit_update;
        owed || self.may_read() || self.owes_shutdown()
    }

    /// The next packet for the guest. Data of up to `buf.len()` bytes goes into `buf`.
    pub(super) fn next_packet(&mut self, key: Key, guest_cid: u64, buf: &mut [u8]) -> Outgoing {
        if std::mem::take(&mut self.owed.request) {
            return self.packet(key.header(guest_cid, Op::Request));
        }
        if std::mem::take(&mut self.owed.response) {
            return self.packet(key.header(guest_cid, Op::Response));
        }
        if std::mem::take(&mut self.owed.credit_answer) {
            return self.packet(key.header(guest_cid, Op::CreditUpdate));
        }
        if self.may_read() {
            let free = self.credit.free();
            if free == 0 {
                self.asked_for_credit = true;
                return self.packet(key.header(guest_cid, Op::CreditRequest));
            }
            match self.read(free, buf) {
                Ok(0) => {}
                Ok(len) => {
                    self.credit.tx_cnt = self.credit.tx_cnt.wrapping_add(len);
                    let mut header = key.header(guest_cid, Op::Data);
                    header.len = len.into();
                    return self.packet(header);
                }
                Err(_) => return Outgoing::Failed,
            }
        }
        if self.owes_shutdown() {
            self.told_guest = self.host_ended;
            let mut header = key.header(guest_cid, Op::Shutdown);
            header.flags = self.told_guest.into();
            return self.packet(header);
        }
        if self.owed.credit_update {
            return self.packet(key.header(guest_cid, Op::CreditUpdate));
        }
        Outgoing::Nothing
    }

    /// The packet that tells the guest of the end, for [`Fate::EndsWithReset`].
    pub(super) fn reset(&self, key: Key, guest_cid: u64) -> Header {
        self.with_credit(key.header(guest_cid, Op::Reset))
    }

    fn packet(&mut self, header: Header) -> Outgoing {
        self.announced_fwd_cnt = self.fwd_cnt;
        self.owed.credit_update = false;
        Outgoing::Packet(self.with_credit(header))
    }

    /// Every packet says how much room there is.
    fn with_credit(&self, header: Header) -> Header {
        Header {
            buf_alloc: BUFFER_BYTES.into(),
            fwd_cnt: self.fwd_cnt.into(),
            ..header
        }
    }

    fn take_credit(&mut self, packet: &Header) {
        let before = self.credit.free();
        self.credit.buf_alloc = packet.buf_alloc.get();
        self.credit.fwd_cnt = packet.fwd_cnt.get();
        if self.credit.free() > before {
            self.asked_for_credit = false;
        }
    }

    /// Whether the host may have data, or its end, that the guest wants. Without credit the
    /// guest is asked for some, once.
    fn may_read(&self) -> bool {
        let open = self.host_ended & SHUTDOWN_SEND == 0 && self.guest_ended & SHUTDOWN_RECEIVE == 0;
        let credit = self.credit.free() > 0 || !self.asked_for_credit;
        self.phase == Phase::Established && self.readable && open && credit
    }

    fn owes_shutdown(&self) -> bool {
        self.phase == Phase::Established && self.host_ended & !self.told_guest != 0
    }

    /// Reads data for the guest; 0 when there is none now or will be none any more.
    fn read(&mut self, free: u32, buf: &mut [u8]) -> io::Result<u32> {
        let room = usize::try_from(free).unwrap_or(usize::MAX).min(buf.len());
        let buf = buf.get_mut(..room).unwrap_or_default();
        loop {
            match self.stream.read(buf) {
                Ok(0) => self.host_ended |= SHUTDOWN_SEND,
                Ok(len) => return u32::try_from(len).map_err(io::Error::other),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) => return Err(error),
            }
            return Ok(0);
        }
    }

    /// The guest has accepted: tells the client, whose first line this is.
    fn greet_client(&mut self, key: Key) -> Fate {
        let line = format!("OK {}\n", key.host_port);
        // A fresh socket has room for a line; one that has not is of no use.
        match self.stream.write(line.as_bytes()) {
            Ok(len) if len == line.len() => Fate::Lives,
            _ => Fate::EndsWithReset,
        }
    }

    /// Data from the guest: to the host at once, as far as it takes it.
    fn take_data(&mut self, data: &[u8]) -> Fate {
        let room = (BUFFER_BYTES as usize).saturating_sub(self.backlog.len());
        if self.guest_ended & SHUTDOWN_SEND != 0 || data.len() > room {
            // It said that it was done, or it had no credit.
            return Fate::EndsWithReset;
        }
        let mut rest = data;
        if self.backlog.is_empty() {
            let written = self.write(rest);
            self.count_forwarded(written);
            rest = rest.get(written..).unwrap_or_default();
        }
        self.backlog.extend(rest);
        self.flush()
    }

    /// Writes to the host; returns how much is done with. What can never be delivered counts.
    fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        while self.host_ended & SHUTDOWN_RECEIVE == 0 && self.writable && done < data.len() {
            match self.stream.write(data.get(done..).unwrap_or_default()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Ok(0) | Err(_) => self.host_ended |= SHUTDOWN_RECEIVE,
                Ok(len) => done += len,
            }
        }
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            data.len()
        } else {
            done
        }
    }

    /// Moves the backlog on, and ends what can be ended when it is empty.
    fn flush(&mut self) -> Fate {
        while !self.backlog.is_empty() {
            let backlog = std::mem::take(&mut self.backlog);
            let (first, _) = backlog.as_slices();
            let len = first.len();
            let written = self.write(first);
            self.backlog = backlog;
            self.backlog.drain(..written);
            self.count_forwarded(written);
            if written < len {
                return Fate::Lives;
            }
        }
        // Idle connections hold no memory.
        self.backlog = VecDeque::new();
        match self.phase {
            Phase::Closing { reset: true } => return Fate::EndsWithReset,
            Phase::Closing { reset: false } => return Fate::Ends,
            Phase::Requested | Phase::Established => {}
        }
        if self.guest_ended & SHUTDOWN_SEND != 0 && !std::mem::replace(&mut self.told_host, true) {
            // A host that is gone need not be told.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Fate::Lives
    }

    fn count_forwarded(&mut self, bytes: usize) {
        // At most a buffer's worth, which fits.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.fwd_cnt = self.fwd_cnt.wrapping_add(bytes);
        let unannounced = self.fwd_cnt.wrapping_sub(self.announced_fwd_cnt);
        self.owed.credit_update |= unannounced >= BUFFER_BYTES / 2;
    }

    fn guest_shutdown(&mut self, flags: u32) -> Fate {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        if self.guest_ended == SHUTDOWN_BOTH {
            self.phase = Phase::Closing { reset: true };
        } else if flags & SHUTDOWN_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush()
    }

    fn guest_reset(&mut self) -> Fate {
        match self.phase {
            // It has closed in good order and is tired of waiting; its data still counts.
            Phase::Closing { .. } => {
                self.phase = Phase::Closing { reset: false };
                self.flush()
            }
            Phase::Requested | Phase::Established => Fate::Ends,
        }
    }
}

#[cfg(test)]
mod tests;
