//! From the host to the guest, one step at a time.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::memory::LOG_PAGE_BYTES;
use crate::virtio::queue::QueueError;

/// The packet as the driver must see it.
fn expected(mut packet: Vec<u8>, buffers: u16) -> Vec<u8> {
    packet[10..12].copy_from_slice(&buffers.to_le_bytes());
    packet
}

impl Bench {
    fn serve(&mut self, receiver: &mut Receiver) -> bool {
        receiver
            .serve(self.io.as_mut(), &self.shared)
            .expect("the driver keeps the rules")
    }
}

#[test]
fn packet_lands_in_one_buffer_with_its_header() {
    let mut bench = Bench::new(8);
    bench.offer_buffers(DATA, 2048, 2);
    let mut receiver = bench.receiver(true);
    for seed in [1, 2] {
        assert!(bench.net.arrives(0, &packet(100, seed)));
    }
    assert!(!bench.serve(&mut receiver));
    assert_eq!(bench.driver.used(), [(0, 100), (1, 100)]);
    assert_eq!(bench.read(DATA, 100), expected(packet(100, 1), 1));
    assert_eq!(bench.read(DATA + 2048, 100), expected(packet(100, 2), 1));
    assert_eq!(bench.interrupts(), 1, "one for both packets");
    let counters = &bench.shared.counters.receive;
    assert_eq!((counters.packets.get(), counters.bytes.get()), (2, 176));
}

#[test]
fn flags_are_cleared_for_a_driver_without_checksum_offload() {
    let mut bench = Bench::new(8);
    bench.shared.apply_offloads(Offloads::NONE).unwrap();
    bench.offer_buffers(DATA, 2048, 1);
    let mut receiver = bench.receiver(false);
    bench.net.arrives(0, &packet(64, 1));
    bench.serve(&mut receiver);
    let mut seen = expected(packet(64, 1), 1);
    seen[0] = 0;
    assert_eq!(bench.read(DATA, 64), seen);
}

/// The first large packet comes unexpected and through the overflow area, the second does not.
#[test]
fn large_packet_takes_several_buffers_at_once() {
    let mut bench = Bench::new(256);
    let mut receiver = bench.receiver(true);
    for round in 0..3 {
        bench.offer_buffers(DATA, 1536, 50);
        bench.net.arrives(0, &packet(60_000, round));
        receiver.readable();
        bench.serve(&mut receiver);
        let used = bench.driver.used();
        assert_eq!(used.len(), 40, "round {round}");
        let lens: Vec<u32> = used.iter().map(|(_, len)| *len).collect();
        assert!(lens[..39].iter().all(|len| *len == 1536), "{lens:?}");
        assert_eq!(lens[39], 60_000 - 39 * 1536);
        // Buffers are used in the order in which they were offered, 50 at a time.
        let first = u64::from(round) * 40 % 50;
        let mut seen = Vec::new();
        for buffer in first..first + 40 {
            seen.extend(bench.read(DATA + 1536 * (buffer % 50), 1536));
        }
        seen.truncate(60_000);
        assert_eq!(seen, expected(packet(60_000, round), 40), "round {round}");
    }
}

#[test]
fn largest_packet_is_received_whole() {
    let len = super::super::MAX_PACKET_BYTES as usize;
    for (buffer, count) in [(4096, 20), (70_000, 2)] {
        let mut bench = Bench::new(256);
        bench.offer_buffers(DATA, buffer, count);
        let mut receiver = bench.receiver(buffer == 4096);
        bench.net.arrives(0, &packet(len, 3));
        bench.serve(&mut receiver);
        let buffers = len.div_ceil(buffer as usize) as u16;
        assert_eq!(bench.read(DATA, len), expected(packet(len, 3), buffers));
    }
}

#[test]
fn header_may_be_cut_into_pieces() {
    let mut bench = Bench::new(8);
    bench.driver.offer(&[
        Buffer::writable(DATA, 5),
        Buffer::writable(DATA + 0x100, 0),
        Buffer::writable(DATA + 0x200, 6),
        Buffer::writable(DATA + 0x300, 500),
    ]);
    let mut receiver = bench.receiver(true);
    bench.net.arrives(0, &packet(64, 9));
    bench.serve(&mut receiver);
    let pieces = [
        bench.read(DATA, 5),
        bench.read(DATA + 0x200, 6),
        bench.read(DATA + 0x300, 53),
    ];
    assert_eq!(pieces.concat(), expected(packet(64, 9), 1));
}

#[test]
fn packet_that_fits_no_buffer_is_dropped_and_the_next_one_is_not() {
    let mut bench = Bench::new(8);
    bench.offer_buffers(DATA, 1526, 2);
    let mut receiver = bench.receiver(false);
    bench.net.arrives(0, &packet(1527, 1));
    bench.net.arrives(0, &packet(1526, 2));
    bench.serve(&mut receiver);
    assert_eq!(bench.driver.used(), [(0, 1526)]);
    assert_eq!(bench.read(DATA, 1526), expected(packet(1526, 2), 1));
    assert_eq!(bench.shared.counters.receive.dropped.get(), 1);
}

#[test]
fn without_buffers_packets_stay_in_the_host_until_the_doorbell() {
    let mut bench = Bench::new(8);
    let mut receiver = bench.receiver(true);
    bench.net.arrives(0, &packet(64, 1));
    assert!(!bench.serve(&mut receiver));
    assert!(receiver.is_waiting() && bench.wants_doorbell());
    // More packets change nothing.
    bench.net.arrives(0, &packet(64, 2));
    receiver.readable();
    assert!(!bench.serve(&mut receiver));
    assert_eq!(bench.shared.counters.starved.get(), 1);
    bench.offer_buffers(DATA, 2048, 4);
    receiver.doorbell();
    assert!(!bench.serve(&mut receiver));
    assert_eq!(bench.driver.used().len(), 2);
    assert!(!bench.wants_doorbell(), "there are buffers left");
    assert!(!receiver.is_waiting());
}

#[test]
fn packet_waits_for_the_buffers_that_it_still_needs() {
    let mut bench = Bench::new(16);
    bench.offer_buffers(DATA, 2048, 2);
    let mut receiver = bench.receiver(true);
    bench.net.arrives(0, &packet(9000, 5));
    assert!(!bench.serve(&mut receiver));
    assert!(bench.driver.used().is_empty() && bench.wants_doorbell());
    bench.offer_buffers(DATA + 4096, 2048, 1);
    receiver.doorbell();
    assert!(!bench.serve(&mut receiver));
    assert!(bench.driver.used().is_empty(), "two more are needed");
    bench.offer_buffers(DATA + 6144, 2048, 2);
    receiver.doorbell();
    bench.serve(&mut receiver);
    assert_eq!(bench.driver.used().len(), 5);
    assert_eq!(bench.read(DATA, 9000), expected(packet(9000, 5), 5));
}

/// All descriptors are the device's already: waiting for more would be for ever.
#[test]
fn packet_larger_than_the_whole_ring_is_dropped() {
    let mut bench = Bench::new(4);
    bench.offer_buffers(DATA, 12, 4);
    let mut receiver = bench.receiver(true);
    bench.net.arrives(0, &packet(49, 1));
    bench.net.arrives(0, &packet(48, 2));
    bench.serve(&mut receiver);
    assert_eq!(bench.shared.counters.receive.dropped.get(), 1);
    assert_eq!(bench.driver.used().len(), 4);
    assert_eq!(bench.read(DATA, 48), expected(packet(48, 2), 4));
}

#[test]
fn buffer_without_room_for_the_header_is_an_error_of_the_driver() {
    for buffers in [
        vec![Buffer::writable(DATA, 11)],
        vec![Buffer::writable(DATA, 0)],
        vec![Buffer::readable(DATA, 100)],
        vec![Buffer::readable(DATA, 100), Buffer::writable(DATA, 4)],
    ] {
        for merge in [false, true] {
            let mut bench = Bench::new(8);
            bench.driver.offer(&buffers);
            let mut receiver = bench.receiver(merge);
            bench.net.arrives(0, &packet(64, 1));
            let error = receiver.serve(bench.io.as_mut(), &bench.shared);
            let error = error.expect_err("too small");
            assert!(matches!(error, QueueError::Malformed { .. }), "{error}");
        }
    }
}

#[test]
fn packets_before_a_bad_buffer_are_delivered() {
    let mut bench = Bench::new(8);
    bench.offer_buffers(DATA, 2048, 1);
    bench.driver.offer(&[Buffer::writable(DATA, 1)]);
    let mut receiver = bench.receiver(true);
    bench.net.arrives(0, &packet(64, 1));
    bench.net.arrives(0, &packet(64, 2));
    assert!(receiver.serve(bench.io.as_mut(), &bench.shared).is_err());
    assert_eq!(bench.driver.used(), [(0, 64)]);
    assert_eq!(bench.interrupts(), 1);
}

/// With event indices, an index that several buffers of one packet pass must interrupt.
#[test]
fn interrupt_comes_when_a_packet_of_several_buffers_passes_the_event_index() {
    let mut bench = Bench::with(16, true, RateLimits::default());
    let mut receiver = bench.receiver(true);
    bench.offer_buffers(DATA, 1536, 16);
    bench.set_used_event(1);
    bench.net.arrives(0, &packet(64, 1));
    bench.serve(&mut receiver);
    assert_eq!(bench.interrupts(), 0, "index 1 is not passed yet");
    bench.net.arrives(0, &packet(6000, 2));
    receiver.readable();
    bench.serve(&mut receiver);
    assert_eq!(bench.driver.used().len(), 5);
    assert_eq!(bench.interrupts(), 1);
    // The event index lies behind: no more interrupts until the driver moves it.
    bench.net.arrives(0, &packet(6000, 3));
    receiver.readable();
    bench.serve(&mut receiver);
    assert_eq!(bench.interrupts(), 1);
}

#[test]
fn used_index_moves_over_whole_packets_only() {
    let bench = Bench::new(16);
    let queue = bench.queue(0);
    let mut used = super::super::used::UsedRing::new(&queue);
    let mut driver = bench.driver;
    for head in 0..3 {
        used.add(head, 100).unwrap();
        assert!(driver.used().is_empty(), "visible before it is complete");
    }
    used.signal().unwrap();
    assert_eq!(driver.used(), [(0, 100), (1, 100), (2, 100)]);
    used.signal().unwrap();
    assert_eq!(
        bench.route.delivered().len(),
        1,
        "nothing new, no interrupt"
    );
}

#[test]
fn rate_limit_holds_packets_back_and_lets_them_through_later() {
    let limits = RateLimits {
        ops: limit(100, 3),
        bytes: None,
    };
    let mut bench = Bench::with(16, false, limits);
    bench.offer_buffers(DATA, 2048, 8);
    let mut receiver = bench.receiver(true);
    for seed in 0..6 {
        bench.net.arrives(0, &packet(64, seed));
    }
    assert!(!bench.serve(&mut receiver));
    let mut seen = bench.driver.used().len();
    // The bucket may go into debt by one packet; and it fills while the test runs.
    assert!((3..6).contains(&seen), "{seen}");
    assert!(receiver.is_waiting());
    while receiver.is_waiting() {
        receiver.throttle().unwrap().expired();
        bench.serve(&mut receiver);
        seen += bench.driver.used().len();
    }
    assert_eq!(seen, 6);
    assert!(bench.shared.counters.receive.throttled.get() > 0);
}

#[test]
fn byte_limit_counts_whole_packets() {
    let limits = RateLimits {
        bytes: limit(10_000, 1000),
        ops: None,
    };
    let mut bench = Bench::with(256, false, limits);
    bench.offer_buffers(DATA, 2048, 200);
    let mut receiver = bench.receiver(true);
    let start = Instant::now();
    let mut arrived = 0;
    let mut seen = 0;
    while seen < 50 {
        while arrived < 50 && bench.net.arrives(0, &packet(112, 0)) {
            arrived += 1;
        }
        receiver.readable();
        bench.serve(&mut receiver);
        seen += bench.driver.used().len();
        if receiver.is_waiting() {
            receiver.throttle().unwrap().expired();
        }
    }
    // 50 packets of 100 bytes, 10 of them and the one in debt for nothing.
    let elapsed = start.elapsed();
    assert!(elapsed.as_millis() >= 380, "{elapsed:?}");
}

#[test]
fn errors_of_the_host_are_reported_and_do_not_stop_the_queue() {
    let mut bench = Bench::new(8);
    bench.offer_buffers(DATA, 2048, 4);
    let mut receiver = bench.receiver(true);
    bench.net.arrives(0, &packet(64, 1));
    bench.net.fail(5);
    assert!(!bench.serve(&mut receiver), "an error must not spin");
    assert_eq!(bench.shared.counters.receive.errors.get(), 1);
    assert!(!bench.serve(&mut receiver));
    receiver.readable();
    bench.serve(&mut receiver);
    assert_eq!(bench.driver.used().len(), 1);
    // The other end is gone: told once.
    bench.events.taken();
    for _ in 0..3 {
        receiver.readable();
        bench.net.fail(32);
        bench.serve(&mut receiver);
    }
    let events = bench.events.taken();
    assert!(
        matches!(events.as_slice(), [DeviceEvent::BackendLost { .. }]),
        "{events:?}"
    );
}

#[test]
fn short_packet_of_the_host_is_an_error() {
    let mut bench = Bench::new(8);
    bench.offer_buffers(DATA, 2048, 1);
    let mut receiver = bench.receiver(true);
    bench.net.arrives(0, &[0; 12]);
    bench.serve(&mut receiver);
    assert!(bench.driver.used().is_empty());
    assert_eq!(bench.shared.counters.receive.errors.get(), 1);
}

#[test]
fn staged_buffers_are_as_if_never_taken_when_the_device_stops() {
    let mut bench = Bench::new(64);
    bench.offer_buffers(DATA, 1536, 50);
    let mut receiver = bench.receiver(true);
    bench.net.arrives(0, &packet(5000, 1));
    bench.serve(&mut receiver);
    bench.net.arrives(0, &packet(64, 2));
    receiver.readable();
    bench.serve(&mut receiver);
    let used = bench.driver.used().len() as u16;
    assert_eq!(used, 5);
    let queue = receiver.into_queue(&bench.shared);
    let state = queue.state();
    assert_eq!((state.next_avail, state.next_used), (used, used));
}

#[test]
fn packet_that_waits_for_buffers_is_lost_when_the_device_stops() {
    let mut bench = Bench::new(8);
    bench.offer_buffers(DATA, 2048, 2);
    let mut receiver = bench.receiver(true);
    bench.net.arrives(0, &packet(9000, 5));
    bench.serve(&mut receiver);
    let state = receiver.into_queue(&bench.shared).state();
    assert_eq!((state.next_avail, state.next_used), (0, 0));
    assert_eq!(bench.shared.counters.receive.dropped.get(), 1);
}

#[test]
fn every_byte_written_for_the_guest_is_logged() {
    let mut bench = Bench::new(64);
    // Overflow, then in place; the buffers of the second packet follow those of the first.
    bench.offer_buffers(DATA, 4096, 8);
    let memory = Arc::clone(&bench.memory);
    let region = memory.find_region(GuestAddress(0)).unwrap();
    let mapping = region.get_mmap();
    let log = mapping.bitmap();
    log.enable();
    let mut receiver = bench.receiver(true);
    for seed in [1, 2] {
        bench.net.arrives(0, &packet(9000, seed));
    }
    bench.serve(&mut receiver);
    let mut words = vec![0_u64; region.len() as usize / LOG_PAGE_BYTES / 64];
    log.harvest(&mut words);
    let dirty = |at: u64| {
        let page = at as usize / LOG_PAGE_BYTES;
        words[page / 64] & 1 << (page % 64) != 0
    };
    for page in 0..6 {
        assert!(dirty(DATA + 4096 * page), "page {page}");
    }
    assert!(!dirty(DATA + 4096 * 6), "nothing came here");
    let [_, _, used] = bench.driver.addresses();
    assert!(dirty(used));
}

/// Whatever sizes packets and buffers have, what comes out is what went in.
#[test]
fn any_mix_of_packets_and_buffers_arrives_intact() {
    for seed in 1..60_u64 {
        let mut random = Random(seed);
        let mut bench = Bench::with(128, seed % 2 == 0, RateLimits::default());
        let mut receiver = bench.receiver(true);
        let mut buffers = std::collections::VecDeque::new();
        let mut expected_packets = std::collections::VecDeque::new();
        let mut free = 128;
        let mut at = DATA;
        for step in 0..400 {
            while free > 0 && random.below(4) != 0 {
                let len = 12 + random.below(5000);
                if at + len > RAM_BYTES as u64 {
                    at = DATA;
                }
                bench.driver.offer(&[Buffer::writable(at, len as u32)]);
                buffers.push_back((at, len));
                at += len;
                free -= 1;
            }
            let large = random.below(8) == 0;
            let len = 13 + random.below(if large { 60_000 } else { 1600 });
            let sent = packet(len as usize, step as u8);
            if random.below(2) == 0 && bench.net.arrives(0, &sent) {
                expected_packets.push_back(sent);
            }
            receiver.readable();
            receiver.doorbell();
            while bench.serve(&mut receiver) {}
            let mut used = bench.driver.used().into_iter();
            while let Some((_, first)) = used.next() {
                let (addr, _) = *buffers.front().unwrap();
                let count = u16::from_le_bytes(bench.read(addr + 10, 2).try_into().unwrap());
                let mut seen = Vec::new();
                for i in 0..count {
                    let len = if i == 0 {
                        first
                    } else {
                        used.next().unwrap().1
                    };
                    let (addr, size) = buffers.pop_front().unwrap();
                    assert!(u64::from(len) <= size);
                    seen.extend(bench.read(addr, len as usize));
                    free += 1;
                }
                let sent = expected_packets.pop_front().unwrap();
                assert_eq!(seen, expected(sent, count), "seed {seed}, step {step}");
            }
        }
        assert!(
            bench.shared.counters.receive.packets.get() > 50,
            "seed {seed}"
        );
        assert_eq!(bench.shared.counters.receive.dropped.get(), 0);
    }
}

/// Marsaglia's xorshift: the same sequence on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
