//! Packets between a guest's driver and the host's network stack, through a real TAP.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::Duration;

use devices::events::DeviceEvent;
use devices::virtio::net::{NetBackend, Offloads};

use super::frame::{
    GUEST_MAC, HOST_MAC, Header, ICMP, UDP, arp_answer, is_ipv4, ping, udp_data, udp_partial,
};
use super::guest::{Guest, wait_for};
use super::*;

const NEEDS_CSUM: u8 = 1;
const GSO_UDP_L4: u8 = 5;

/// A TAP with the host's address; both sides know each other unless `strangers`.
fn tap(pairs: u16, strangers: bool) -> Tap {
    let tap = Tap::open(&options("guest0", pairs)).unwrap();
    let mac = |bytes: [u8; 6]| bytes.map(|byte| format!("{byte:02x}")).join(":");
    ip(&format!("link set guest0 address {}", mac(HOST_MAC)));
    ip("addr add 10.9.0.1/24 dev guest0");
    if !strangers {
        ip(&format!(
            "neigh add 10.9.0.2 lladdr {} dev guest0",
            mac(GUEST_MAC)
        ));
    }
    tap
}

fn host_socket() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

/// The header of a datagram whose checksum the host completes, cut into `segment` bytes each.
fn udp_header(segment: u16) -> Header {
    Header {
        flags: NEEDS_CSUM,
        gso_type: if segment > 0 { GSO_UDP_L4 } else { 0 },
        hdr_len: 42,
        gso_size: segment,
        csum_start: 34,
        csum_offset: 6,
        num_buffers: 0,
    }
}

#[test]
fn host_answers_the_guests_ping() {
    in_namespace(|| {
        let mut guest = Guest::new(tap(1, true), true);
        guest.activate();
        for sequence in 1..=3 {
            let data = [sequence as u8; 900];
            guest.send(0, Header::default(), &ping(sequence, &data));
            // At first the host asks for the guest's address.
            let answer = loop {
                let (_, frame) = guest.wait_for_packet(0, |_| true);
                match arp_answer(&frame) {
                    Some(answer) => guest.send(0, Header::default(), &answer),
                    None if is_ipv4(&frame, ICMP) => break frame,
                    None => {}
                }
            };
            assert_eq!(answer[34..36], [0, 0], "an echo reply");
            assert_eq!(answer[40..42], sequence.to_be_bytes());
            assert_eq!(answer[42..], data);
        }
        assert!(guest.events.seen().is_empty());
    });
}

#[test]
fn host_completes_the_guests_checksums() {
    in_namespace(|| {
        let mut guest = Guest::new(tap(1, false), true);
        let (socket, port) = host_socket();
        guest.activate();
        guest.send(0, udp_header(0), &udp_partial(port, b"partial"));
        let mut buffer = [0; 100];
        let len = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"partial");
    });
}

#[test]
fn host_cuts_the_guests_large_packets() {
    in_namespace(|| {
        let tap = tap(1, false);
        if !tap.info().offloads.contains(Offloads::USO4) {
            return skip(
                "net",
                "the kernel has no UDP segmentation for TAPs (Linux 6.2)",
            );
        }
        let mut guest = Guest::new(tap, true);
        let (socket, port) = host_socket();
        guest.activate();
        let data: Vec<u8> = (0..40_000_u32).map(|i| (i / 1000) as u8).collect();
        guest.send(0, udp_header(1000), &udp_partial(port, &data));
        let mut buffer = [0; 2000];
        for piece in 0..40 {
            let len = socket.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..len], [piece; 1000]);
        }
    });
}

/// Sends `data` from the host in pieces of 1000 bytes, which the network device may cut.
fn send_segmented(socket: &UdpSocket, data: &[u8]) {
    let segment: libc::c_int = 1000;
    // SAFETY: the value outlives the call and its size is given.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const segment).cast(),
            4,
        )
    };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
    socket.send_to(data, "10.9.0.2:6000").unwrap();
}

#[test]
fn guest_gets_large_packets_whole_when_it_wants_them() {
    in_namespace(|| {
        let tap = tap(1, false);
        if !tap.info().offloads.contains(Offloads::USO4) {
            return skip(
                "net",
                "the kernel has no UDP segmentation for TAPs (Linux 6.2)",
            );
        }
        let mut guest = Guest::new(tap, true);
        let (socket, _) = host_socket();
        guest.activate();
        let data: Vec<u8> = (0..30_000_u32).map(|i| (i / 7) as u8).collect();
        // The first comes unexpected, the others do not.
        for _ in 0..3 {
            send_segmented(&socket, &data);
            let (header, frame) = guest.wait_for_packet(0, |frame| is_ipv4(frame, UDP));
            assert_eq!(header.gso_type, GSO_UDP_L4);
            assert_eq!(header.gso_size, 1000);
            assert_eq!(header.flags, NEEDS_CSUM);
            assert_eq!(header.num_buffers, 8);
            assert_eq!(udp_data(&frame).0, data);
        }
    });
}

#[test]
fn guest_without_offloads_gets_complete_small_packets() {
    in_namespace(|| {
        let mut guest = Guest::new(tap(1, false), false);
        let (socket, _) = host_socket();
        guest.activate();
        send_segmented(&socket, &[7; 5000]);
        let mut packets = Vec::new();
        wait_for(|| {
            packets.extend(guest.received(0));
            (packets.len() == 5).then_some(())
        });
        for (header, frame) in packets {
            let expected = Header {
                num_buffers: 1,
                ..Header::default()
            };
            assert_eq!(header, expected);
            assert_eq!(udp_data(&frame), (&[7; 1000][..], true));
        }
    });
}

#[test]
fn packets_wait_in_the_tap_while_the_device_is_paused() {
    in_namespace(|| {
        let mut guest = Guest::new(tap(1, false), false);
        let (socket, _) = host_socket();
        for round in 0..20_u8 {
            guest.activate();
            guest.deactivate();
            assert!(guest.received(0).is_empty());
            socket.send_to(&[round; 10], "10.9.0.2:6000").unwrap();
            assert!(guest.received(0).is_empty());
            guest.activate();
            let (_, frame) = guest.wait_for_packet(0, |frame| is_ipv4(frame, UDP));
            assert_eq!(udp_data(&frame).0, [round; 10]);
            guest.deactivate();
        }
    });
}

#[test]
fn closed_queues_get_no_packets_and_still_send() {
    const PAIRS: u8 = 4;
    in_namespace(|| {
        let mut guest = Guest::new(tap(u16::from(PAIRS), false), true);
        guest.activate();
        let send_flows = || {
            // Many flows, so that every open queue gets some.
            for _ in 0..64 {
                let (socket, _) = host_socket();
                socket.send_to(b"flow", "10.9.0.2:6000").unwrap();
            }
        };
        let count = |guest: &mut Guest| {
            let mut seen = [0; PAIRS as usize];
            wait_for(|| {
                for (pair, seen) in seen.iter_mut().enumerate() {
                    *seen += guest.received(pair).len();
                }
                (seen.iter().sum::<usize>() == 64).then_some(seen)
            })
        };
        send_flows();
        assert_eq!(count(&mut guest), [64, 0, 0, 0]);
        // A queue that does not receive sends nevertheless.
        let (socket, port) = host_socket();
        guest.send(2, udp_header(0), &udp_partial(port, b"closed"));
        assert_eq!(socket.recv(&mut [0; 10]).unwrap(), 6);
        assert_eq!(guest.command(&[4, 0, PAIRS, 0]), 0);
        send_flows();
        let seen = count(&mut guest);
        assert!(seen.iter().all(|packets| *packets > 0), "{seen:?}");
        assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
        send_flows();
        let seen = count(&mut guest);
        assert_eq!(seen[2..], [0, 0], "{seen:?}");
    });
}

#[test]
fn deleted_interface_is_reported_once_and_does_not_spin() {
    in_namespace(|| {
        let mut guest = Guest::new(tap(1, false), true);
        guest.activate();
        ip("link delete guest0");
        let events = wait_for(|| Some(guest.events.seen()).filter(|events| !events.is_empty()));
        assert!(
            matches!(events.as_slice(), [DeviceEvent::BackendLost { .. }]),
            "{events:?}"
        );
        // Buffers of packets that cannot be sent come back.
        for _ in 0..3 {
            guest.send(0, Header::default(), &ping(1, b"gone"));
        }
        assert_eq!(guest.events.seen().len(), 1);
        let counters = guest.net.handle().counters();
        assert_eq!(counters.transmit.errors.get(), 3);
        assert!(counters.receive.errors.get() <= 2, "no busy loop");
    });
}

#[test]
fn interface_that_is_down_loses_packets_and_says_so() {
    in_namespace(|| {
        let mut guest = Guest::new(tap(1, false), true);
        guest.activate();
        ip("link set guest0 down");
        guest.send(0, Header::default(), &ping(1, b"down"));
        let counters = guest.net.handle().counters();
        assert_eq!(counters.transmit.errors.get(), 1);
        let events = guest.events.seen();
        assert!(
            matches!(
                events.as_slice(),
                [DeviceEvent::IoError {
                    operation: "send",
                    ..
                }]
            ),
            "{events:?}"
        );
        ip("link set guest0 up");
        guest.send(0, Header::default(), &ping(2, b"up"));
        assert_eq!(counters.transmit.packets.get(), 1);
    });
}

/// Headers that promise what is not there are the kernel's to refuse.
#[test]
fn hostile_headers_only_cost_their_packet() {
    in_namespace(|| {
        let mut guest = Guest::new(tap(1, false), true);
        let (socket, port) = host_socket();
        guest.activate();
        let good = udp_header(0);
        let frame = udp_partial(port, b"hostile");
        for header in [
            Header {
                csum_start: 0xffff,
                ..good
            },
            Header {
                csum_offset: 0xffff,
                ..good
            },
            Header {
                hdr_len: 0xffff,
                gso_type: GSO_UDP_L4,
                gso_size: 1,
                ..good
            },
            Header {
                gso_type: 0x7f,
                ..good
            },
            Header {
                gso_type: GSO_UDP_L4,
                gso_size: 0,
                ..good
            },
        ] {
            guest.send(0, header, &frame);
        }
        guest.send(0, good, &udp_partial(port, b"good"));
        let mut buffer = [0; 10];
        loop {
            let len = socket.recv(&mut buffer).unwrap();
            if &buffer[..len] == b"good" {
                break;
            }
        }
        let counters = guest.net.handle().counters();
        assert!(counters.transmit.dropped.get() >= 3);
        assert!(
            guest.events.seen().is_empty(),
            "the guest's fault is no event"
        );
    });
}

#[test]
fn queue_reads_and_writes_scattered_guest_memory_and_logs_it() {
    use devices::virtio::Segment;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
    in_namespace(|| {
        let tap = tap(1, false);
        let (socket, port) = host_socket();
        // Two regions that meet at 64 KiB: a segment may lie in both.
        let ranges = [
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x1_0000), 0x1_0000),
        ];
        let memory = devices::GuestRam::from_ranges(&ranges).unwrap();
        let mut queue = tap.open_queue(0).unwrap();
        let segment = |addr, len| Segment {
            addr: GuestAddress(addr),
            len,
        };
        let none = queue.receive(&memory, &[segment(0, 100)], &mut []);
        assert_eq!(none.unwrap_err().kind(), ErrorKind::WouldBlock);

        let packet = [udp_header(0).bytes(), udp_partial(port, &[9; 1000])].concat();
        memory.write_slice(&packet, GuestAddress(0xff00)).unwrap();
        queue
            .send(
                &memory,
                &[
                    segment(0xff00, 10),
                    segment(0xff0a, packet.len() as u32 - 10),
                ],
            )
            .unwrap();
        let mut buffer = [0; 2000];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 1000);

        for region in memory.iter() {
            region.get_mmap().bitmap().enable();
        }
        socket.send_to(&[5; 1000], "10.9.0.2:6000").unwrap();
        let mut overflow = [0; 2000];
        // 1054 bytes: 16 + 512 (across the regions) + 526 of overflow.
        let segments = [segment(0x3000, 16), segment(0xff00, 512)];
        let len = queue.receive(&memory, &segments, &mut overflow).unwrap();
        assert_eq!(len, 1054);
        assert_eq!(overflow[..526], [5; 526]);
        let mut bytes = [0; 400];
        memory
            .read_slice(&mut bytes, GuestAddress(0xff00 + 112))
            .unwrap();
        assert_eq!(bytes, [5; 400]);
        let dirty: Vec<u64> = memory
            .iter()
            .map(|region| {
                let mut words = [0];
                region.get_mmap().bitmap().harvest(&mut words);
                words[0]
            })
            .collect();
        assert_eq!(dirty, [1 << 3 | 1 << 15, 1]);

        let outside = queue.send(&memory, &[segment(0x2_0000 - 4, 100)]);
        assert!(outside.is_err());
        let pieces = [segment(0, 1), segment(0x100, 1)].repeat(600);
        let many = queue.send(&memory, &pieces).unwrap_err();
        assert_eq!(many.kind(), ErrorKind::InvalidInput);
    });
}
