#![allow(clippy::cast_possible_truncation)]

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;

const GUEST_CID: u64 = 9;
const KEY: Key = Key {
    guest_port: 1,
    host_port: 2,
};

/// The host's end as the test sees it.
#[derive(Default)]
struct HostEnd {
    /// Bytes that the host has sent and that were not read.
    to_guest: VecDeque<u8>,
    sends_no_more: bool,
    /// Bytes that the host has taken.
    taken: Vec<u8>,
    /// How many more it takes before it blocks.
    takes: usize,
    takes_no_more: bool,
    /// Directions that the connection has ended.
    ended: Vec<Shutdown>,
}

#[derive(Clone, Default)]
struct FakeStream(Arc<Mutex<HostEnd>>);

impl AsRawFd for FakeStream {
    fn as_raw_fd(&self) -> RawFd {
        -1
    }
}

impl Read for FakeStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut host = self.0.lock();
        if host.to_guest.is_empty() && !host.sends_no_more {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        host.to_guest.read(buf)
    }
}

impl Write for FakeStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut host = self.0.lock();
        if host.takes_no_more {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let len = buf.len().min(host.takes);
        if len == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        host.takes -= len;
        host.taken.extend(&buf[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl HostStream for FakeStream {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.0.lock().ended.push(how);
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Step {
    GuestSends(usize),
    GuestTakes(u32),
    GuestEnds(u32),
    GuestAsks,
    HostSends(usize),
    HostTakes(usize),
    HostEnds,
    Poll(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..40_000_usize).prop_map(Step::GuestSends),
        3 => (0..60_000_u32).prop_map(Step::GuestTakes),
        1 => (0..3_u32).prop_map(Step::GuestEnds),
        1 => Just(Step::GuestAsks),
        4 => (0..40_000_usize).prop_map(Step::HostSends),
        3 => (1..40_000_usize).prop_map(Step::HostTakes),
        1 => Just(Step::HostEnds),
        6 => (1..70_000_usize).prop_map(Step::Poll),
    ]
}

/// A guest that keeps the rules, and what it knows.
struct Guest {
    buf_alloc: u32,
    /// Bytes sent, taken from what was received, and received.
    sent: u32,
    taken: u32,
    received: Vec<u8>,
    peer_fwd_cnt: u32,
    /// What each side has ended, as this guest knows it.
    ended: u32,
    peer_ended: u32,
    asked: bool,
}

struct Model {
    connection: Connection,
    stream: FakeStream,
    guest: Guest,
    host_sent: usize,
}

fn pattern(start: usize, len: usize) -> impl Iterator<Item = u8> {
    (start..start + len).map(|i| (i % 251) as u8)
}

impl Model {
    fn new(buf_alloc: u32) -> Self {
        let stream = FakeStream::default();
        let request = Header {
            buf_alloc: buf_alloc.into(),
            ..Header::default()
        };
        let boxed = Box::new(stream.clone());
        Self {
            connection: Connection::requested_by_guest(boxed, &request),
            stream,
            guest: Guest {
                buf_alloc,
                sent: 0,
                taken: 0,
                received: Vec::new(),
                peer_fwd_cnt: 0,
                ended: 0,
                peer_ended: 0,
                asked: false,
            },
            host_sent: 0,
        }
    }

    fn give(&mut self, op: Op, flags: u32, data: &[u8]) -> Fate {
        let header = Header {
            len: (data.len() as u32).into(),
            flags: flags.into(),
            buf_alloc: self.guest.buf_alloc.into(),
            fwd_cnt: self.guest.taken.into(),
            ..KEY.header(GUEST_CID, op)
        };
        self.connection.receive(KEY, &header, op, data)
    }

    fn apply(&mut self, step: &Step) -> Fate {
        match *step {
            Step::GuestSends(len) => {
                let guest = &self.guest;
                if (guest.ended & SHUTDOWN_SEND) | (guest.peer_ended & SHUTDOWN_RECEIVE) != 0 {
                    return Fate::Lives;
                }
                let room = BUFFER_BYTES - (guest.sent - guest.peer_fwd_cnt);
                let len = len.min(room as usize);
                let data: Vec<u8> = pattern(guest.sent as usize, len).collect();
                self.guest.sent += len as u32;
                self.give(Op::Data, 0, &data)
            }
            Step::GuestTakes(len) => {
                let received = self.guest.received.len() as u32;
                self.guest.taken = (self.guest.taken + len).min(received);
                self.give(Op::CreditUpdate, 0, &[])
            }
            // Never both: that is the end, which the last part of the test is about.
            Step::GuestEnds(flags) if self.guest.ended | flags != SHUTDOWN_BOTH => {
                self.guest.ended |= flags;
                self.give(Op::Shutdown, flags, &[])
            }
            Step::GuestEnds(_) => Fate::Lives,
            Step::GuestAsks => {
                self.guest.asked = true;
                self.give(Op::CreditRequest, 0, &[])
            }
            Step::HostSends(len) => {
                let mut host = self.stream.0.lock();
                if host.sends_no_more || self.guest.ended & SHUTDOWN_RECEIVE != 0 {
                    return Fate::Lives;
                }
                host.to_guest.extend(pattern(self.host_sent, len));
                drop(host);
                self.host_sent += len;
                self.connection.stream_ready(true, false, false)
            }
            Step::HostTakes(len) => {
                self.stream.0.lock().takes += len;
                self.connection.stream_ready(false, true, false)
            }
            Step::HostEnds => {
                self.stream.0.lock().sends_no_more = true;
                self.connection.stream_ready(true, false, false)
            }
            Step::Poll(len) => {
                self.poll(len);
                Fate::Lives
            }
        }
    }

    /// Takes one packet and checks it. False when there was none.
    fn poll(&mut self, len: usize) -> bool {
        let mut buf = vec![0; len];
        let expected = self.connection.has_packet();
        let packet = match self.connection.next_packet(KEY, GUEST_CID, &mut buf) {
            Outgoing::Packet(header) => header,
            Outgoing::Nothing => return false,
            Outgoing::Failed => panic!("the stream does not fail"),
        };
        assert!(expected, "{packet:?} came unexpected");
        assert_eq!(Key::of(&Header::reset_for(&packet)), KEY);
        assert_eq!(packet.buf_alloc.get(), BUFFER_BYTES);
        let fwd_cnt = packet.fwd_cnt.get();
        assert_eq!(fwd_cnt as usize, self.stream.0.lock().taken.len());
        let guest = &mut self.guest;
        assert!((guest.peer_fwd_cnt..=guest.sent).contains(&fwd_cnt));
        guest.peer_fwd_cnt = fwd_cnt;
        match Op::from_wire(packet.op.get()).unwrap() {
            Op::Data => {
                let data = &buf[..packet.len.get() as usize];
                let expected: Vec<u8> = pattern(guest.received.len(), data.len()).collect();
                assert!(data == expected, "data out of order");
                assert_eq!(guest.peer_ended & SHUTDOWN_SEND, 0);
                assert_eq!(guest.ended & SHUTDOWN_RECEIVE, 0);
                guest.received.extend(data);
                let in_flight = guest.received.len() as u32 - guest.taken;
                assert!(in_flight <= guest.buf_alloc, "{in_flight} bytes in flight");
            }
            Op::Shutdown => {
                assert_ne!(guest.peer_ended | packet.flags.get(), guest.peer_ended);
                guest.peer_ended = packet.flags.get();
            }
            Op::CreditUpdate => guest.asked = false,
            Op::Response | Op::CreditRequest => {}
            op @ (Op::Request | Op::Reset) => panic!("{op:?}"),
        }
        true
    }

    /// Takes packets until there are none.
    fn drain(&mut self) {
        for _ in 0..1000 {
            if !self.poll(4096) {
                assert!(!self.connection.has_packet(), "promised a packet");
                return;
            }
        }
        panic!("packets without end");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the order of events: no byte is lost, repeated or out of order, nobody is sent
    /// more than there is room for, and once both sides take what there is, all of it arrives.
    #[test]
    fn bytes_arrive_in_order_within_credit_and_completely(
        buf_alloc in prop_oneof![Just(0_u32), 1..5000_u32, 60_000..300_000_u32],
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let mut model = Model::new(buf_alloc);
        for step in &steps {
            prop_assert_eq!(model.apply(step), Fate::Lives);
            prop_assert!(model.connection.backlog.len() <= BUFFER_BYTES as usize);
            let taken = &model.stream.0.lock().taken;
            prop_assert!(taken.iter().copied().eq(pattern(0, taken.len())));
        }
        // Both sides take everything.
        model.guest.buf_alloc = model.guest.buf_alloc.max(1000);
        for _ in 0..5000 {
            model.drain();
            let unread = model.stream.0.lock().to_guest.len();
            prop_assert_eq!(model.apply(&Step::GuestTakes(u32::MAX / 2)), Fate::Lives);
            if unread == 0 || model.guest.ended & SHUTDOWN_RECEIVE != 0 {
                break;
            }
        }
        prop_assert_eq!(model.apply(&Step::HostTakes(1 << 30)), Fate::Lives);
        model.drain();
        let guest = &model.guest;
        prop_assert!(!guest.asked, "a request for credit went unanswered");
        let host = model.stream.0.lock();
        prop_assert_eq!(host.taken.len(), guest.sent as usize);
        if guest.ended & SHUTDOWN_RECEIVE == 0 {
            prop_assert_eq!(guest.received.len(), model.host_sent);
            let ended = if host.sends_no_more { SHUTDOWN_SEND } else { 0 };
            prop_assert_eq!(guest.peer_ended, ended);
        }
        let ended = host.ended.contains(&Shutdown::Write);
        prop_assert_eq!(ended, guest.ended & SHUTDOWN_SEND != 0);
    }

    /// A guest that closes has its data delivered first, and the reset comes only then.
    #[test]
    fn close_waits_for_the_host_to_take_all(sizes in prop::collection::vec(1..9000_usize, 0..7), takes in 0..50_000_usize) {
        let mut model = Model::new(1000);
        prop_assert_eq!(model.apply(&Step::HostTakes(takes)), Fate::Lives);
        for size in &sizes {
            prop_assert_eq!(model.apply(&Step::GuestSends(*size)), Fate::Lives);
        }
        let sent = sizes.iter().sum::<usize>();
        let fate = model.give(Op::Shutdown, SHUTDOWN_BOTH, &[]);
        if takes < sent {
            prop_assert_eq!(fate, Fate::Lives);
            prop_assert!(model.connection.time_limit().is_some());
            prop_assert_eq!(model.apply(&Step::HostTakes(sent - takes)), Fate::EndsWithReset);
        } else {
            prop_assert_eq!(fate, Fate::EndsWithReset);
        }
        prop_assert_eq!(model.stream.0.lock().taken.len(), sent);
    }
}

#[test]
fn guest_that_exceeds_its_credit_or_speaks_after_the_end_is_reset() {
    let mut model = Model::new(1000);
    let full = vec![0; BUFFER_BYTES as usize];
    assert_eq!(model.give(Op::Data, 0, &full), Fate::Lives);
    assert_eq!(model.give(Op::Data, 0, &[0]), Fate::EndsWithReset);

    let mut model = Model::new(1000);
    assert_eq!(model.give(Op::Shutdown, SHUTDOWN_SEND, &[]), Fate::Lives);
    assert_eq!(model.give(Op::Data, 0, &[0]), Fate::EndsWithReset);
}

#[test]
fn host_that_takes_no_more_is_announced_and_its_data_counts_as_taken() {
    let mut model = Model::new(1000);
    model.drain();
    assert_eq!(model.give(Op::Data, 0, &[1; 5000]), Fate::Lives);
    model.stream.0.lock().takes_no_more = true;
    let fate = model.connection.stream_ready(false, true, false);
    assert_eq!(fate, Fate::Lives);
    let mut buf = [0; 16];
    let Outgoing::Packet(packet) = model.connection.next_packet(KEY, GUEST_CID, &mut buf) else {
        panic!("no packet");
    };
    assert_eq!(packet.op.get(), Op::Shutdown as u16);
    assert_eq!(
        (packet.flags.get(), packet.fwd_cnt.get()),
        (SHUTDOWN_RECEIVE, 5000)
    );
    assert_eq!(model.give(Op::Data, 0, &[1; 100]), Fate::Lives);
}

#[test]
fn request_that_nobody_has_heard_of_needs_no_reset() {
    let connection = |polled: bool| {
        let mut connection = Connection::requested_by_host(Box::<FakeStream>::default());
        if polled {
            let packet = connection.next_packet(KEY, GUEST_CID, &mut []);
            assert!(matches!(packet, Outgoing::Packet(header) if header.op.get() == 1));
        }
        assert!(connection.time_limit().is_some());
        connection
    };
    assert_eq!(connection(false).give_up(), Fate::Ends);
    assert_eq!(connection(true).give_up(), Fate::EndsWithReset);
    let fate = connection(true).stream_ready(false, false, true);
    assert_eq!(fate, Fate::EndsWithReset);
    // A client without room for its first line is of no use.
    let mut client = connection(true);
    let response = KEY.header(GUEST_CID, Op::Response);
    let fate = client.receive(KEY, &response, Op::Response, &[]);
    assert_eq!(fate, Fate::EndsWithReset);
    for op in [Op::Request, Op::Data, Op::Shutdown, Op::CreditUpdate] {
        let fate = connection(true).receive(KEY, &response, op, &[]);
        assert_eq!(fate, Fate::EndsWithReset, "{op:?}");
    }
}

#[test]
fn counters_wrap() {
    let mut model = Model::new(1000);
    let connection = &mut model.connection;
    (connection.fwd_cnt, connection.announced_fwd_cnt) = (u32::MAX - 10, u32::MAX - 10);
    connection.credit = GuestCredit {
        buf_alloc: 1000,
        fwd_cnt: u32::MAX - 5,
        tx_cnt: u32::MAX - 5,
    };
    model.guest.taken = u32::MAX - 5;
    model.stream.0.lock().takes = 1 << 20;
    assert_eq!(model.apply(&Step::HostSends(600)), Fate::Lives);
    assert_eq!(model.give(Op::Data, 0, &[0; 40_000]), Fate::Lives);
    let mut lens = Vec::new();
    let mut buf = [0; 400];
    while let Outgoing::Packet(packet) = model.connection.next_packet(KEY, GUEST_CID, &mut buf) {
        assert_eq!(packet.fwd_cnt.get(), 40_000 - 11);
        lens.push(packet.len.get());
    }
    assert_eq!(lens, [0, 400, 200]);
    assert_eq!(model.connection.credit.free(), 400);
}
