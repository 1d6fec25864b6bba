#![allow(clippy::cast_possible_truncation)]

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::testing::*;
use super::*;
use crate::device::DeviceId;
use crate::state::{DeviceState, RestoreError};
use crate::virtio::{ActivationError, VirtioDevice};

/// Few enough for any limit on descriptors.
const MAX_CONNECTIONS: usize = 40;

/// A host made of socket pairs: the test holds the other ends.
struct Host {
    event: EventFd,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    /// Clients that wait to be accepted.
    clients: VecDeque<UnixStream>,
    /// Streams that the guest has opened, by port.
    servers: VecDeque<(u32, UnixStream)>,
    /// Nobody listens on ports from here on.
    closed_from: Option<u32>,
    /// Errors for `accept` to return.
    accept_errors: u32,
}

impl AsRawFd for Host {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl VsockHost for Host {
    fn accept(&mut self) -> io::Result<Box<dyn HostStream>> {
        self.event.read()?;
        let mut shared = self.shared.lock();
        if shared.accept_errors > 0 {
            shared.accept_errors -= 1;
            self.event.write(1)?;
            return Err(io::Error::other("out of descriptors"));
        }
        Ok(Box::new(shared.clients.pop_front().unwrap()))
    }

    fn connect(&mut self, port: u32) -> io::Result<Box<dyn HostStream>> {
        let mut shared = self.shared.lock();
        if shared.closed_from.is_some_and(|from| port >= from) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_read_timeout(Some(DEADLINE))?;
        shared.servers.push_back((port, theirs));
        Ok(Box::new(ours))
    }
}

struct Fixture {
    driver: GuestDriver,
    vsock: Vsock,
    shared: Arc<Mutex<Shared>>,
    event: EventFd,
}

fn device() -> (Vsock, Arc<Mutex<Shared>>, EventFd) {
    let event = EventFd::new(EFD_NONBLOCK | EFD_SEMAPHORE).unwrap();
    let shared = Arc::default();
    let host = Host {
        event: event.try_clone().unwrap(),
        shared: Arc::clone(&shared),
    };
    let id = DeviceId::new("vsock").unwrap();
    let options = VsockOptions {
        max_connections: MAX_CONNECTIONS,
        ..VsockOptions::new(GUEST_CID)
    };
    let vsock = Vsock::new(id, &options, Box::new(host)).unwrap();
    (vsock, shared, event)
}

/// A device that runs, with receive buffers.
fn fixture() -> Fixture {
    let (mut vsock, shared, event) = device();
    let mut driver = GuestDriver::new();
    let queues = driver.queues();
    driver.activate(&mut vsock, queues);
    driver.offer_receive_buffers();
    Fixture {
        driver,
        vsock,
        shared,
        event,
    }
}

impl Fixture {
    /// A client on the host, which says `line`.
    fn client(&self, line: &str) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(DEADLINE)).unwrap();
        theirs.write_all(line.as_bytes()).unwrap();
        self.shared.lock().clients.push_back(ours);
        self.event.write(1).unwrap();
        theirs
    }

    /// A connection from the guest's port to the host's, and the host's end.
    fn connect(&mut self, guest_port: u32, host_port: u32) -> UnixStream {
        self.driver
            .send(&Packet::new(OP_REQUEST, guest_port, host_port));
        let response = self.driver.expect(OP_RESPONSE);
        assert_eq!(response.src_port, host_port);
        assert_eq!(response.dst_port, guest_port);
        assert_eq!((response.src_cid, response.dst_cid), (2, GUEST_CID));
        let (port, server) = self.shared.lock().servers.pop_front().unwrap();
        assert_eq!(port, host_port);
        server
    }

    fn send(&mut self, op: u16, change: impl FnOnce(&mut Packet)) {
        let mut packet = Packet::new(op, 1000, 80);
        change(&mut packet);
        self.driver.send(&packet);
    }
}

fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn guest_reaches_a_port_of_the_host_and_data_flows_both_ways() {
    let mut f = fixture();
    let mut server = f.connect(1000, 80);
    f.send(OP_RW, |packet| packet.data = b"from the guest".to_vec());
    let mut bytes = [0; 14];
    server.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the guest");
    server.write_all(b"from the host").unwrap();
    let packet = f.driver.expect(OP_RW);
    assert_eq!(packet.data, b"from the host");
    assert_eq!((packet.src_port, packet.dst_port), (80, 1000));
    assert_eq!(packet.fwd_cnt, 14);
    assert_eq!(f.vsock.counters().received_bytes.get(), 14);
}

#[test]
fn client_of_the_host_reaches_a_port_of_the_guest() {
    let mut f = fixture();
    let mut client = f.client("CONNECT 22\nearly");
    let request = f.driver.expect(OP_REQUEST);
    assert_eq!(request.dst_port, 22);
    let mut response = Packet::new(OP_RESPONSE, 22, request.src_port);
    f.driver.send(&response);
    let mut line = vec![0; format!("OK {}\n", request.src_port).len()];
    client.read_exact(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", request.src_port).as_bytes());
    assert_eq!(f.driver.expect(OP_RW).data, b"early");
    response.op = OP_RW;
    response.data = b"hello".to_vec();
    f.driver.send(&response);
    let mut bytes = [0; 5];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[test]
fn refusals_reach_the_side_that_asked() {
    let mut f = fixture();
    f.shared.lock().closed_from = Some(1000);
    f.driver.send(&Packet::new(OP_REQUEST, 5, 1000));
    let reset = f.driver.expect(OP_RST);
    assert_eq!((reset.src_port, reset.dst_port), (1000, 5));

    let mut client = f.client("CONNECT 23\n");
    let request = f.driver.expect(OP_REQUEST);
    f.driver.send(&Packet::new(OP_RST, 23, request.src_port));
    assert_eq!(read_to_end(&mut client), b"");

    let mut client = f.client("GET / HTTP/1.0\n");
    // Unread bytes make it a reset.
    let _ = client.read(&mut [0; 1]);
    f.driver.wait("refusal", |_| {
        f.vsock.counters().refused_connections.get() == 2
    });
}

/// What a table entry does to a connection 1000 -> 80 that is open.
type Mischief = fn(&mut Packet);

#[test]
fn packets_that_break_the_rules_end_their_connection_only() {
    let cases: [(&str, u16, Mischief); 9] = [
        ("second request", OP_REQUEST, |_| {}),
        ("response without a request", OP_RESPONSE, |_| {}),
        ("unknown operation", 0, |_| {}),
        ("operation far out", u16::MAX, |_| {}),
        ("more than the buffer", OP_RW, |p| {
            p.data = vec![0; (64 << 10) + 1];
        }),
        ("length beyond the chain", OP_RW, |p| {
            p.data = vec![1; 10];
            p.claimed_len = Some(11);
        }),
        ("length of 4 GiB", OP_RW, |p| p.claimed_len = Some(u32::MAX)),
        ("length without data", OP_CREDIT_UPDATE, |p| {
            p.claimed_len = Some(1);
        }),
        ("end of both directions", OP_SHUTDOWN, |p| p.flags = 0xff),
    ];
    for (what, op, change) in cases {
        let mut f = fixture();
        let mut server = f.connect(1000, 80);
        let mut other = f.connect(1001, 80);
        f.send(op, change);
        let reset = f.driver.receive();
        assert_eq!((reset.op, reset.dst_port), (OP_RST, 1000), "{what}");
        assert_eq!(read_to_end(&mut server), b"", "{what}");
        // What follows on the same ports is about nothing.
        f.send(OP_RW, |packet| packet.data = b"x".to_vec());
        assert_eq!(f.driver.receive().op, OP_RST, "{what}");
        let mut packet = Packet::new(OP_RW, 1001, 80);
        packet.data = b"still here".to_vec();
        f.driver.send(&packet);
        let mut bytes = [0; 10];
        other.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"still here", "{what}");
        assert!(!f.driver.needs_reset(), "{what}");
    }
}

#[test]
fn packets_without_a_connection_are_answered_by_a_reset_or_dropped() {
    let cases: [(&str, u16, Mischief, bool); 10] = [
        ("data", OP_RW, |p| p.data = vec![1], true),
        ("response", OP_RESPONSE, |_| {}, true),
        ("shutdown", OP_SHUTDOWN, |_| {}, true),
        ("credit request", OP_CREDIT_REQUEST, |_| {}, true),
        ("reset", OP_RST, |_| {}, false),
        ("unknown type", OP_REQUEST, |p| p.kind = 7, true),
        ("seqpacket", OP_REQUEST, |p| p.kind = 2, true),
        ("to another guest", OP_REQUEST, |p| p.dst_cid = 77, true),
        ("from another guest", OP_REQUEST, |p| p.src_cid = 77, false),
        ("reset of a wrong type", OP_RST, |p| p.kind = 9, false),
    ];
    for (what, op, change, answered) in cases {
        let mut f = fixture();
        let mut packet = Packet::new(op, 1000, 80);
        change(&mut packet);
        f.driver.send(&packet);
        // A marker: answers come in order.
        f.driver.send(&Packet::new(OP_RW, 9999, 9999));
        let first = f.driver.expect(OP_RST);
        if answered {
            assert_eq!(first.dst_port, 1000, "{what}");
            assert_eq!(first.kind, packet.kind, "{what}");
            assert_eq!(first.src_cid, packet.dst_cid, "{what}");
        } else {
            assert_eq!(first.dst_port, 9999, "{what}");
        }
        assert!(f.shared.lock().servers.is_empty(), "{what}");
    }
}

#[test]
fn wrong_type_does_not_touch_the_connection_on_the_same_ports() {
    let mut f = fixture();
    let mut server = f.connect(1000, 80);
    f.send(OP_RST, |packet| packet.kind = 2);
    f.send(OP_RW, |packet| packet.kind = 2);
    assert_eq!(f.driver.expect(OP_RST).kind, 2);
    server.write_all(b"alive").unwrap();
    assert_eq!(f.driver.expect(OP_RW).data, b"alive");
}

#[test]
fn chains_that_are_no_packets_are_dropped_and_bad_buffers_break_the_device() {
    let mut f = fixture();
    for len in [0, 1, 43] {
        f.driver.send_bytes(&vec![0xff; len]);
    }
    f.driver.send(&Packet::new(OP_RW, 9999, 9999));
    f.driver.expect(OP_RST);
    assert_eq!(f.vsock.counters().refused_packets.get(), 3);

    for len in [0, 43, 44] {
        let (mut vsock, ..) = device();
        let mut driver = GuestDriver::new();
        let queues = driver.queues();
        driver.activate(&mut vsock, queues);
        driver.offer_receive_buffer(len);
        driver.send(&Packet::new(OP_RW, 9999, 9999));
        driver.wait("broken device", |driver| driver.needs_reset());
        assert_eq!(vsock.deactivate().len(), 3, "{len}");
    }
}

#[test]
fn guest_without_receive_buffers_is_taken_from_no_more_than_can_be_answered() {
    let (mut vsock, ..) = device();
    let mut driver = GuestDriver::new();
    let queues = driver.queues();
    driver.activate(&mut vsock, queues);
    // Each of these is owed a reset.
    let mut sent = 0;
    let stuck = |driver: &mut GuestDriver| driver.pending() == 64;
    while sent < 400 && !(sent >= 256 + 64 && stuck(&mut driver)) {
        driver.send(&Packet::new(OP_RW, sent, 1));
        sent += 1;
    }
    assert_eq!(
        sent,
        256 + 64,
        "256 answers wait, 64 packets are in the queue"
    );
    driver.offer_receive_buffers();
    for port in 0..sent {
        assert_eq!(driver.expect(OP_RST).dst_port, port);
    }
    driver.wait_sent();
}

#[test]
fn half_closed_connections_go_on_in_the_other_direction() {
    let mut f = fixture();
    // The guest sends no more.
    let mut server = f.connect(1000, 80);
    f.send(OP_RW, |packet| packet.data = b"question".to_vec());
    f.send(OP_SHUTDOWN, |packet| packet.flags = 2);
    assert_eq!(read_to_end(&mut server), b"question");
    server.write_all(b"answer").unwrap();
    assert_eq!(f.driver.expect(OP_RW).data, b"answer");
    // The host closes: it neither sends nor receives any more. The guest ends it.
    drop(server);
    assert_eq!(f.driver.expect(OP_SHUTDOWN).flags, 3);
    f.send(OP_RST, |_| {});

    // The host sends no more.
    let mut server = f.connect(1000, 80);
    server.write_all(b"last words").unwrap();
    server.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(f.driver.expect(OP_RW).data, b"last words");
    assert_eq!(f.driver.expect(OP_SHUTDOWN).flags, 2);
    f.send(OP_RW, |packet| packet.data = b"heard".to_vec());
    let mut bytes = [0; 5];
    server.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"heard");
    // The guest closes.
    f.send(OP_SHUTDOWN, |packet| packet.flags = 3);
    f.driver.expect(OP_RST);
    assert_eq!(read_to_end(&mut server), b"");

    // The guest receives no more.
    let mut server = f.connect(1000, 80);
    f.send(OP_SHUTDOWN, |packet| packet.flags = 1);
    f.driver.wait_sent();
    let error = server.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    f.send(OP_RW, |packet| packet.data = b"!".to_vec());
    server.read_exact(&mut [0]).unwrap();
}

#[test]
fn data_that_the_host_has_not_read_survives_the_guests_close_and_reset() {
    let mut f = fixture();
    let mut server = f.connect(1000, 80);
    // More than the socket takes, so that some waits in the device.
    let mut sent = 0_usize;
    let data = vec![7; 32 << 10];
    let mut fwd_cnt = 0;
    while sent < fwd_cnt + (64 << 10) {
        f.send(OP_RW, |packet| packet.data.clone_from(&data));
        sent += data.len();
        f.send(OP_CREDIT_REQUEST, |_| {});
        f.driver.wait_sent();
        // A stopped device has said all that it had to say.
        let queues = f.vsock.deactivate();
        while let Some(packet) = f.driver.poll() {
            assert_eq!(packet.op, OP_CREDIT_UPDATE);
            fwd_cnt = packet.fwd_cnt as usize;
        }
        f.driver.activate(&mut f.vsock, queues);
    }
    assert!(sent > fwd_cnt, "the socket took all {sent} bytes");
    f.send(OP_SHUTDOWN, |packet| packet.flags = 3);
    f.send(OP_RST, |_| {});
    f.driver.wait_sent();
    // The ports can be used again at once, but then the rest is lost; other ports are free.
    let mut other = f.connect(1001, 80);
    assert_eq!(read_to_end(&mut server).len(), sent);
    other.write_all(b"x").unwrap();
    assert_eq!(f.driver.expect(OP_RW).dst_port, 1001, "no reset was sent");
}

#[test]
fn guest_is_never_sent_more_than_it_has_room_for() {
    let mut f = fixture();
    let mut request = Packet::new(OP_REQUEST, 1000, 80);
    request.buf_alloc = 1000;
    f.driver.send(&request);
    f.driver.expect(OP_RESPONSE);
    let (_, mut server) = f.shared.lock().servers.pop_front().unwrap();
    server.write_all(&[1; 2500]).unwrap();
    assert_eq!(f.driver.expect(OP_RW).data.len(), 1000);
    // It is asked for room once, and again only after it has given some.
    f.driver.expect(OP_CREDIT_REQUEST);
    for (fwd_cnt, expected) in [(0, 0), (400, 400), (1000, 600), (1000, 0), (2000, 500)] {
        f.send(OP_CREDIT_UPDATE, |packet| {
            packet.buf_alloc = 1000;
            packet.fwd_cnt = fwd_cnt;
        });
        if expected > 0 {
            assert_eq!(f.driver.expect(OP_RW).data.len(), expected);
            if fwd_cnt < 2000 {
                f.driver.expect(OP_CREDIT_REQUEST);
            }
        }
    }
    // Acknowledging what was never sent leaves it without room, and breaks nothing.
    f.send(OP_CREDIT_UPDATE, |packet| {
        packet.buf_alloc = 1000;
        packet.fwd_cnt = 1 << 31;
    });
    server.write_all(&[2; 10]).unwrap();
    f.driver.expect(OP_CREDIT_REQUEST);
    f.driver.wait_sent();
    assert_eq!(f.driver.poll(), None);
}

#[test]
fn connections_take_turns() {
    let mut f = fixture();
    let mut servers: Vec<_> = (0..4).map(|port| f.connect(1000 + port, 80)).collect();
    let queues = f.vsock.deactivate();
    for server in &mut servers {
        server.write_all(&[0; 40_000]).unwrap();
    }
    f.driver.activate(&mut f.vsock, queues);
    // Ten packets each, of a receive buffer's size: they come in turn.
    let ports: Vec<_> = (0..40).map(|_| f.driver.expect(OP_RW).dst_port).collect();
    for turn in ports.chunks(4) {
        let mut turn = turn.to_vec();
        turn.sort_unstable();
        assert_eq!(turn, [1000, 1001, 1002, 1003], "{ports:?}");
    }
}

#[test]
fn connections_are_bounded_and_room_comes_back() {
    let mut f = fixture();
    let mut servers = VecDeque::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        servers.push_back(f.connect(port, 80));
    }
    f.driver.send(&Packet::new(OP_REQUEST, 5000, 80));
    f.driver.expect(OP_RST);
    let mut client = f.client("CONNECT 1\n");
    // Closed at once, its line unread.
    let result = client.read(&mut [0]);
    assert!(matches!(result, Ok(0) | Err(_)), "{result:?}");
    f.driver.send(&Packet::new(OP_RST, 7, 80));
    f.driver.wait_sent();
    assert_eq!(read_to_end(&mut servers[7]), b"");
    f.connect(5000, 80);
    assert_eq!(f.vsock.counters().refused_connections.get(), 2);
}

#[test]
fn host_out_of_descriptors_is_tried_again() {
    let mut f = fixture();
    f.shared.lock().accept_errors = 2;
    let _client = f.client("CONNECT 22\n");
    assert_eq!(f.driver.expect(OP_REQUEST).dst_port, 22);
    assert_eq!(f.shared.lock().accept_errors, 0);
}

#[test]
fn pause_keeps_connections_and_what_waits_in_them() {
    let mut f = fixture();
    let mut server = f.connect(1000, 80);
    let queues = f.vsock.deactivate();
    f.send(OP_RW, |packet| packet.data = b"while paused".to_vec());
    server.write_all(b"likewise").unwrap();
    let client = f.client("CONNECT 22\n");
    assert_eq!(f.driver.poll(), None);
    f.driver.activate(&mut f.vsock, queues);
    let mut bytes = [0; 12];
    server.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"while paused");
    let mut ops = [f.driver.receive().op, f.driver.receive().op];
    ops.sort_unstable();
    assert_eq!(ops, [OP_REQUEST, OP_RW]);
    drop(client);
    f.driver.expect(OP_RST);
}

#[test]
fn driver_that_resets_the_device_loses_its_connections() {
    let mut f = fixture();
    let mut server = f.connect(1000, 80);
    f.vsock.deactivate();
    f.vsock.reset();
    assert_eq!(read_to_end(&mut server), b"");
    let mut driver = GuestDriver::new();
    let queues = driver.queues();
    driver.activate(&mut f.vsock, queues);
    driver.offer_receive_buffers();
    driver.send(&Packet::new(OP_RW, 1000, 80));
    driver.expect(OP_RST);
}

#[test]
fn restored_device_tells_the_driver_that_its_connections_are_gone() {
    let mut f = fixture();
    let _server = f.connect(1000, 80);
    let queues = f.vsock.deactivate();
    let state = f.vsock.save().unwrap();
    let (mut restored, ..) = device();
    restored.restore(&state).unwrap();
    // No event buffer yet, and another pause: the event is not lost.
    f.driver.activate(&mut restored, queues);
    let queues = restored.deactivate();
    f.driver.activate(&mut restored, queues);
    f.driver.offer_event_buffer(8);
    assert_eq!(f.driver.wait_event(), 0);
    f.send(OP_RW, |_| {});
    f.driver.expect(OP_RST);
    // Once is enough; a reset of the device makes it needless.
    let queues = restored.deactivate();
    f.driver.offer_event_buffer(8);
    f.driver.activate(&mut restored, queues);
    assert_eq!(restored.deactivate()[2].state().next_avail, 1);
    restored.restore(&state).unwrap();
    restored.reset();
    let queues = f.driver.queues();
    f.driver.activate(&mut restored, queues);
    assert_eq!(restored.deactivate()[2].state().next_avail, 0);
}

#[test]
fn event_buffer_without_room_breaks_the_device() {
    let f = fixture();
    let state = f.vsock.save().unwrap();
    let (mut restored, ..) = device();
    restored.restore(&state).unwrap();
    let mut driver = GuestDriver::new();
    let queues = driver.queues();
    driver.offer_event_buffer(3);
    driver.activate(&mut restored, queues);
    driver.wait("broken device", |driver| driver.needs_reset());
}

#[test]
fn impossible_states_and_context_ids_are_refused() {
    let (mut vsock, ..) = device();
    for guest_cid in [0, 1, 2, 0xffff_ffff, u64::MAX] {
        let state = DeviceState::encode("virtio-vsock", 1, &VsockStateV1 { guest_cid }).unwrap();
        let error = vsock.restore(&state).unwrap_err();
        assert!(
            matches!(
                error,
                RestoreError::InvalidField {
                    field: "guest_cid",
                    ..
                }
            ),
            "{error}"
        );
        let host = Host {
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            shared: Arc::default(),
        };
        let id = DeviceId::new("vsock").unwrap();
        let error = Vsock::new(id, &VsockOptions::new(guest_cid), Box::new(host))
            .err()
            .unwrap();
        assert!(error.to_string().contains(&guest_cid.to_string()));
    }
    let mut config = [0xff; 12];
    vsock.read_config(0, &mut config);
    assert_eq!(config, [52, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn all_three_queues_are_needed() {
    for missing in 0..3 {
        let (mut vsock, ..) = device();
        let driver = GuestDriver::new();
        let mut queues = driver.queues();
        queues.remove(missing);
        let interrupt = Arc::clone(queues[0].interrupt().shared());
        let activation = crate::virtio::Activation {
            memory: Arc::clone(queues[0].memory()),
            queues,
            features: 0,
            interrupt,
        };
        let error = vsock.activate(activation).unwrap_err();
        assert!(
            matches!(error, ActivationError::MissingQueue(index) if usize::from(index) == missing),
            "{error}"
        );
    }
}
