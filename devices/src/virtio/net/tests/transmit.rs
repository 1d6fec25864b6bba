//! From the guest to the host, one step at a time.

use super::*;
use crate::virtio::queue::QueueError;

impl Bench {
    fn serve_transmit(&mut self, transmitter: &mut Transmitter) -> bool {
        transmitter
            .serve(self.io.as_mut(), &self.shared)
            .expect("the driver keeps the rules")
    }

    fn offer_packet(&mut self, at: u64, packet: &[u8]) {
        self.write(at, packet);
        let buffer = Buffer::readable(at, packet.len() as u32);
        self.driver.offer(&[buffer]);
    }
}

#[test]
fn packets_leave_whole_in_order_and_buffers_come_back() {
    let mut bench = Bench::new(16);
    let first = packet(1000, 1);
    bench.write(DATA, &first[..12]);
    bench.write(DATA + 0x1000, &first[12..500]);
    bench.write(DATA + 0x2000, &first[500..]);
    let head = bench.driver.offer(&[
        Buffer::readable(DATA, 12),
        Buffer::readable(DATA + 0x1000, 488),
        Buffer::readable(DATA + 0x2000, 500),
    ]);
    let second = packet(65_000, 2);
    bench.offer_packet(DATA + 0x10_000, &second);
    let mut transmitter = bench.transmitter();
    assert!(!bench.serve_transmit(&mut transmitter));
    assert_eq!(bench.net.sent(0), Some(first));
    assert_eq!(bench.net.sent(0), Some(second));
    assert_eq!(bench.driver.used(), [(head, 0), (head + 3, 0)]);
    assert_eq!(bench.interrupts(), 1, "one for both packets");
    let counters = &bench.shared.counters.transmit;
    assert_eq!((counters.packets.get(), counters.bytes.get()), (2, 65_976));
    assert!(bench.wants_doorbell());
}

#[test]
fn malformed_packets_are_dropped_and_do_not_stop_the_next() {
    let cases: [(&str, Vec<Buffer>); 5] = [
        ("only writable", vec![Buffer::writable(DATA, 100)]),
        ("empty", vec![Buffer::readable(DATA, 0)]),
        ("part of a header", vec![Buffer::readable(DATA, 11)]),
        ("header only", vec![Buffer::readable(DATA, 12)]),
        (
            "larger than any packet",
            vec![Buffer::readable(DATA, 65_606)],
        ),
    ];
    for (name, buffers) in cases {
        let mut bench = Bench::new(16);
        bench.driver.offer_indirect(DATA + 0x80_0000, &buffers);
        let good = packet(64, 1);
        bench.offer_packet(DATA + 0x40_0000, &good);
        let mut transmitter = bench.transmitter();
        assert!(!bench.serve_transmit(&mut transmitter));
        assert_eq!(bench.net.sent(0), Some(good), "{name}");
        assert_eq!(bench.driver.used().len(), 2, "{name}");
        assert_eq!(bench.shared.counters.transmit.dropped.get(), 1, "{name}");
    }
}

#[test]
fn broken_chain_is_an_error_of_the_driver_and_earlier_packets_leave() {
    let mut bench = Bench::new(16);
    bench.offer_packet(DATA, &packet(64, 1));
    bench
        .driver
        .offer(&[Buffer::readable(RAM_BYTES as u64 - 1, 2)]);
    let mut transmitter = bench.transmitter();
    let result = transmitter.serve(bench.io.as_mut(), &bench.shared);
    assert!(matches!(result, Err(QueueError::Malformed { .. })));
    assert!(bench.net.sent(0).is_some());
    assert_eq!(bench.driver.used().len(), 1);
    assert_eq!(bench.shared.counters.transmit.packets.get(), 1);
}

#[test]
fn full_host_end_holds_packets_back_and_loses_none() {
    let mut bench = Bench::new(256);
    let mut transmitter = bench.transmitter();
    let mut seen = 0;
    for seed in 0..200_u8 {
        bench.offer_packet(DATA + 8192 * u64::from(seed), &packet(6000, seed));
    }
    assert!(!bench.serve_transmit(&mut transmitter));
    assert_eq!(bench.shared.counters.blocked.get(), 1);
    assert!(bench.driver.used().len() < 200);
    // Until there is room, nothing is tried.
    assert!(!bench.serve_transmit(&mut transmitter));
    assert_eq!(bench.shared.counters.blocked.get(), 1);
    while seen < 200 {
        let sent = bench.net.sent(0).expect("none is lost");
        assert_eq!(sent, packet(6000, seen), "in order");
        seen += 1;
        transmitter.writable();
        bench.serve_transmit(&mut transmitter);
    }
    assert_eq!(bench.shared.counters.transmit.errors.get(), 0);
}

#[test]
fn stopping_while_the_host_end_is_full_keeps_the_packets_in_the_ring() {
    let mut bench = Bench::new(256);
    let mut transmitter = bench.transmitter();
    for seed in 0..200_u8 {
        bench.offer_packet(DATA + 8192 * u64::from(seed), &packet(6000, seed));
    }
    bench.serve_transmit(&mut transmitter);
    let used = bench.driver.used().len() as u16;
    let state = transmitter.into_queue().state();
    assert_eq!((state.next_avail, state.next_used), (used, used));
}

#[test]
fn long_queue_is_served_in_bursts() {
    let mut bench = Bench::new(512);
    let mut transmitter = bench.transmitter();
    for i in 0..300_u64 {
        bench.offer_packet(DATA + 64 * i, &packet(20, 0));
    }
    // The socket takes a few at a time; whatever stops the burst, nothing is lost.
    let mut sent = 0;
    let mut calls = 0;
    while sent < 300 {
        bench.serve_transmit(&mut transmitter);
        while bench.net.sent(0).is_some() {
            sent += 1;
        }
        transmitter.writable();
        calls += 1;
    }
    assert!(calls > 1, "other directions had their turn");
    assert_eq!(bench.driver.used().len(), 300);
}

#[test]
fn rate_limit_holds_packets_back_and_an_idle_queue_is_not_throttled() {
    let limits = RateLimits {
        ops: limit(100, 3),
        bytes: None,
    };
    let mut bench = Bench::with(16, false, limits);
    let mut transmitter = bench.transmitter();
    for seed in 0..6 {
        bench.offer_packet(DATA + 64 * seed, &packet(20, 0));
    }
    bench.serve_transmit(&mut transmitter);
    let mut seen = bench.driver.used().len();
    assert!((3..6).contains(&seen), "{seen}");
    while transmitter.throttle().unwrap().is_waiting() {
        transmitter.throttle().unwrap().expired();
        bench.serve_transmit(&mut transmitter);
        seen += bench.driver.used().len();
    }
    assert_eq!(seen, 6);
    let throttled = bench.shared.counters.transmit.throttled.get();
    assert!(throttled > 0);
    transmitter.doorbell();
    bench.serve_transmit(&mut transmitter);
    assert_eq!(bench.shared.counters.transmit.throttled.get(), throttled);
}

#[test]
fn refusals_of_the_host_are_told_apart() {
    const EINVAL: i32 = 22;
    const EIO: i32 = 5;
    let mut bench = Bench::new(16);
    let mut transmitter = bench.transmitter();
    // The header promises what is not there: the driver's fault, no event.
    bench.net.fail(EINVAL);
    bench.offer_packet(DATA, &packet(64, 1));
    bench.serve_transmit(&mut transmitter);
    assert_eq!(bench.shared.counters.transmit.dropped.get(), 1);
    assert!(bench.events.taken().is_empty());
    bench.net.fail(EIO);
    bench.offer_packet(DATA, &packet(64, 1));
    transmitter.doorbell();
    bench.serve_transmit(&mut transmitter);
    assert_eq!(bench.shared.counters.transmit.errors.get(), 1);
    assert_eq!(bench.driver.used().len(), 2, "buffers come back either way");
}
