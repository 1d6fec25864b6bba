#![allow(clippy::cast_possible_truncation)]

use super::*;
use crate::testing::{Buffer, DriverQueue, ram};

const DATA: u64 = 0x1_0000;

fn queue(size: u16) -> (DriverQueue, Virtqueue, Arc<crate::testing::FakeRoute>) {
    let driver = DriverQueue::new(&ram(0x2_0000), 0, size);
    let (queue, route) = driver.device_side(0);
    (driver, queue, route)
}

#[test]
fn chain_is_split_into_readable_and_writable() {
    let (mut driver, mut queue, _route) = queue(8);
    let head = driver.offer(&[
        Buffer::readable(DATA, 16),
        Buffer::readable(DATA + 0x100, 4),
        Buffer::writable(DATA + 0x200, 512),
    ]);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.head(), head);
    assert_eq!(chain.readable().len(), 2);
    let expected = Segment {
        addr: GuestAddress(DATA + 0x200),
        len: 512,
    };
    assert_eq!(chain.writable(), [expected]);
    assert!(queue.pop().unwrap().is_none());
}

#[test]
fn chain_has_at_most_1024_descriptors_and_empty_ones_are_passed_over() {
    let chain_of = |count| {
        let (mut driver, mut queue, _route) = queue(8);
        let mut buffers = vec![Buffer::writable(DATA + 0x8000, 8); count];
        // Empty, and nowhere: it is never looked at.
        buffers[0] = Buffer::writable(u64::MAX, 0);
        driver.offer_indirect(DATA, &buffers);
        queue.pop()
    };
    assert_eq!(chain_of(1024).unwrap().unwrap().writable().len(), 1023);
    let error = chain_of(1025).unwrap_err().to_string();
    assert!(error.contains("more than 1024 descriptors"), "{error}");
}

#[test]
fn indirect_chain_reads_like_a_direct_one() {
    let (mut driver, mut queue, _route) = queue(8);
    let buffers: Vec<_> = (0..20)
        .map(|i| Buffer::writable(DATA + 0x1000 + i * 8, 8))
        .collect();
    driver.offer_indirect(DATA, &buffers);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(
        chain.writable().len(),
        20,
        "longer than the queue is allowed when indirect"
    );
}

#[test]
fn used_chains_come_back_in_order_with_their_length() {
    let (mut driver, mut queue, _route) = queue(4);
    for round in 0..10 {
        let heads = [
            driver.offer(&[Buffer::writable(DATA, 8)]),
            driver.offer(&[Buffer::writable(DATA, 8)]),
        ];
        for _ in heads {
            let chain = queue.pop().unwrap().unwrap();
            queue.push(&chain, round).unwrap();
        }
        assert_eq!(driver.used(), heads.map(|head| (head, round)));
    }
}

/// Every way to break a chain is an error, never an endless loop or a short chain.
#[test]
fn broken_chains_are_refused() {
    use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT};
    type Break = fn(&mut DriverQueue);
    let cases: [(&str, Break); 8] = [
        ("loop", |driver| {
            let buffer = Buffer::readable(DATA, 8);
            driver.write_descriptor(0, &buffer, VRING_DESC_F_NEXT, 1);
            driver.write_descriptor(1, &buffer, VRING_DESC_F_NEXT, 0);
            driver.publish(0);
        }),
        ("next out of the table", |driver| {
            driver.write_descriptor(0, &Buffer::readable(DATA, 8), VRING_DESC_F_NEXT, 99);
            driver.publish(0);
        }),
        ("head out of the table", |driver| driver.publish(99)),
        ("buffer outside RAM", |driver| {
            driver.offer(&[Buffer::readable(0x1_ffff, 2)]);
        }),
        ("buffer wraps the address space", |driver| {
            driver.offer(&[Buffer::readable(u64::MAX - 1, 16)]);
        }),
        ("readable after writable", |driver| {
            driver.offer(&[Buffer::writable(DATA, 8), Buffer::readable(DATA, 8)]);
        }),
        ("indirect table of odd length", |driver| {
            let table = Buffer::readable(DATA, 17);
            driver.write_descriptor(0, &table, VRING_DESC_F_INDIRECT, 0);
            driver.publish(0);
        }),
        ("indirect within indirect", |driver| {
            let table = Buffer::readable(DATA, 16);
            driver.write_descriptor(0, &table, VRING_DESC_F_INDIRECT, 0);
            // The table's only entry lies at DATA, as descriptor DATA / 16 of the main table would.
            driver.write_descriptor((DATA / 16) as u16, &table, VRING_DESC_F_INDIRECT, 0);
            driver.publish(0);
        }),
    ];
    for (name, break_it) in cases {
        let (mut driver, mut queue, _route) = queue(8);
        break_it(&mut driver);
        let error = queue.pop().expect_err(name);
        assert!(
            matches!(error, QueueError::Malformed { .. }),
            "{name}: {error}"
        );
    }
}

#[test]
fn available_index_far_ahead_is_refused() {
    let (driver, mut queue, _route) = queue(8);
    driver.set_avail_index(9);
    assert!(matches!(queue.pop(), Err(QueueError::Ring { .. })));
}

#[test]
fn interrupt_follows_the_drivers_wish() {
    let (driver, mut queue, route) = queue(8);
    queue.signal().unwrap();
    assert_eq!(route.delivered().len(), 1);
    driver.suppress_interrupts(true);
    queue.signal().unwrap();
    assert_eq!(route.delivered().len(), 1);
}

#[test]
fn doorbell_is_asked_for_only_when_nothing_waits() {
    let (mut driver, mut queue, _route) = queue(8);
    queue.disable_doorbell().unwrap();
    assert!(!queue.enable_doorbell().unwrap());
    driver.offer(&[Buffer::writable(DATA, 8)]);
    assert!(queue.has_available());
    assert!(queue.enable_doorbell().unwrap(), "something came meanwhile");
    queue.pop().unwrap();
    queue.unpop();
    assert!(queue.pop().unwrap().is_some(), "offered again");
}
