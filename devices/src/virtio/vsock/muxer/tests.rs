#![allow(clippy::cast_possible_truncation)]

use std::os::unix::net::UnixStream;

use parking_lot::Mutex;
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::vsock::host::HostStream;

const GUEST_CID: u64 = 9;
const CAPACITY: usize = 8;

/// Accepts nobody and connects every port but 0 to a stream that nobody reads.
struct Host {
    event: EventFd,
    streams: Arc<Mutex<Vec<UnixStream>>>,
}

impl AsRawFd for Host {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl VsockHost for Host {
    fn accept(&mut self) -> io::Result<Box<dyn HostStream>> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn connect(&mut self, port: u32) -> io::Result<Box<dyn HostStream>> {
        if port == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        self.streams.lock().push(theirs);
        Ok(Box::new(ours))
    }
}

fn muxer() -> (Muxer, Arc<Mutex<Vec<UnixStream>>>) {
    let streams = Arc::default();
    let host = Host {
        event: EventFd::new(EFD_NONBLOCK).unwrap(),
        streams: Arc::clone(&streams),
    };
    let options = VsockOptions {
        guest_cid: GUEST_CID,
        max_connections: CAPACITY,
    };
    let muxer = Muxer::new(&options, Box::new(host), Arc::default()).unwrap();
    (muxer, streams)
}

#[derive(Clone, Debug)]
enum Step {
    Packet(Header, usize),
    Refuse(Header),
    HostEnd(usize),
    HostTalk(usize),
    Give(usize),
    Tick(u64),
    Pause,
}

/// Headers that are mostly about the same few connections.
fn header() -> impl Strategy<Value = Header> {
    let cid = prop_oneof![9 => Just(GUEST_CID), 1 => any::<u64>()];
    let dst = prop_oneof![9 => Just(HOST_CID), 1 => any::<u64>()];
    let kind = prop_oneof![9 => Just(TYPE_STREAM), 1 => any::<u16>()];
    let op = prop_oneof![9 => 0..9_u16, 1 => any::<u16>()];
    let credit = (any::<u32>(), prop_oneof![0..70_000_u32, any::<u32>()]);
    let ports = (0..6_u32, 0..3_u32);
    let parts = (cid, dst, kind, op, credit, ports, 0..8_u32);
    parts.prop_map(
        |(src_cid, dst_cid, kind, op, (buf_alloc, fwd_cnt), (src_port, dst_port), flags)| Header {
            src_cid: src_cid.into(),
            dst_cid: dst_cid.into(),
            src_port: src_port.into(),
            dst_port: dst_port.into(),
            len: 0.into(),
            kind: kind.into(),
            op: op.into(),
            flags: flags.into(),
            buf_alloc: buf_alloc.into(),
            fwd_cnt: fwd_cnt.into(),
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (header(), 0..66_000_usize).prop_map(|(header, len)| Step::Packet(header, len)),
        1 => header().prop_map(Step::Refuse),
        1 => any::<usize>().prop_map(Step::HostEnd),
        3 => any::<usize>().prop_map(Step::HostTalk),
        6 => (1..5000_usize).prop_map(Step::Give),
        1 => (0..12_u64).prop_map(Step::Tick),
        1 => Just(Step::Pause),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// No sequence of packets makes the muxer hold more than it may, or go on without end.
    #[test]
    fn hostile_packets_are_borne(steps in prop::collection::vec(step(), 0..120)) {
        let (mut muxer, streams) = muxer();
        let data = vec![0x5a; 66_000];
        let mut buf = vec![0; 5000];
        let mut now = Instant::now();
        for step in steps {
            match step {
                Step::Packet(header, len) if muxer.takes_packets() => {
                    muxer.take_packet(&header, &data[..len]);
                }
                Step::Refuse(header) if muxer.takes_packets() => muxer.refuse_packet(&header),
                Step::Packet(..) | Step::Refuse(_) => {}
                Step::HostEnd(at) => {
                    let mut streams = streams.lock();
                    if !streams.is_empty() {
                        let at = at % streams.len();
                        streams.remove(at);
                    }
                }
                Step::HostTalk(at) => {
                    let mut streams = streams.lock();
                    let count = streams.len().max(1);
                    if let Some(stream) = streams.get_mut(at % count) {
                        let _ = std::io::Write::write(stream, &data[..3000]);
                    }
                }
                Step::Give(len) => {
                    if let Some(header) = muxer.next_packet(&mut buf[..len]) {
                        prop_assert!(header.len.get() as usize <= len);
                    }
                }
                Step::Tick(seconds) => {
                    now += Duration::from_secs(seconds);
                    muxer.tick(now);
                }
                Step::Pause => muxer.pause(),
            }
            muxer.poll_host();
            prop_assert!(muxer.table.iter_mut().count() <= CAPACITY);
            prop_assert!(muxer.resets.len() <= MAX_RESETS + CAPACITY);
        }
        // A guest that listens gets everything, and that is not without end.
        for _ in 0..100_000 {
            if muxer.next_packet(&mut buf).is_none() {
                break;
            }
        }
        prop_assert!(!muxer.has_packets());
        let counters = Arc::clone(&muxer.counters);
        muxer.clear();
        prop_assert_eq!(counters.opened.get(), counters.closed.get());
        prop_assert!(muxer.table.iter_mut().next().is_none());
    }
}

fn request(guest_port: u32, host_port: u32) -> Header {
    packet(Op::Request, guest_port, host_port)
}

fn packet(op: Op, guest_port: u32, host_port: u32) -> Header {
    let key = Key {
        guest_port,
        host_port,
    };
    let mut header = Header::reset_for(&key.header(GUEST_CID, op));
    header.op = (op as u16).into();
    header.buf_alloc = (64 << 10).into();
    header
}

#[test]
fn what_waits_for_the_other_side_too_long_is_ended() {
    let (mut muxer, streams) = muxer();
    let start = Instant::now();
    let after = |seconds| start + Duration::from_secs(seconds);
    muxer.take_packet(&request(1, 80), &[]);
    assert!(
        !muxer.needs_tick(),
        "an open connection may be silent for ever"
    );
    // The host closes, the guest is told and says nothing.
    streams.lock().clear();
    muxer.poll_host();
    let mut buf = [0; 100];
    let ops = [0, 1].map(|_| muxer.next_packet(&mut buf).unwrap().op.get());
    assert_eq!(ops, [Op::Response as u16, Op::Shutdown as u16]);
    assert!(muxer.needs_tick());
    muxer.tick(start);
    muxer.tick(after(9));
    assert!(!muxer.has_packets());
    // Time does not run while the machine is paused.
    muxer.pause();
    muxer.tick(after(100));
    muxer.tick(after(109));
    assert!(!muxer.has_packets());
    muxer.tick(after(110));
    let reset = muxer.next_packet(&mut buf).unwrap();
    assert_eq!(
        (reset.op.get(), reset.dst_port.get()),
        (Op::Reset as u16, 1)
    );
    muxer.tick(after(111));
    assert!(!muxer.needs_tick());
}

#[test]
fn ports_of_a_connection_that_only_drains_can_be_used_again() {
    let (mut muxer, streams) = muxer();
    muxer.take_packet(&request(1, 80), &[]);
    let full = vec![0; 64 << 10];
    // The socket takes some, then the connection's buffer fills up.
    while let Some(Entry::Connection(_, connection)) = muxer.entry(0)
        && !connection.is_stalled()
    {
        muxer.take_packet(&packet(Op::Data, 1, 80), &full[..1000]);
    }
    let mut end = packet(Op::Shutdown, 1, 80);
    end.flags = 3.into();
    muxer.take_packet(&end, &[]);
    muxer.take_packet(&packet(Op::Reset, 1, 80), &[]);
    assert_eq!(
        muxer.counters.closed.get(),
        0,
        "it still has data for the host"
    );
    muxer.take_packet(&request(1, 80), &[]);
    assert_eq!(muxer.counters.closed.get(), 1);
    assert_eq!(streams.lock().len(), 2);
    let response = muxer.next_packet(&mut [0; 10]).unwrap();
    assert_eq!(response.op.get(), Op::Response as u16);
}
