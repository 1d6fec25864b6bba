//! The worker driven step by step, without its thread.

#![allow(clippy::cast_possible_truncation)]

use std::io::ErrorKind;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::DeviceId;
use crate::events::{DeviceEvent, EventSink, Reporter};
use crate::rate::{Rate, RateLimiter, RateLimits};
use crate::rate_log::RateLimit;
use crate::testing::{Buffer, FakeRoute, MemoryDisk};
use crate::virtio::block::BlockBackend;
use crate::virtio::block::test_driver::{BlockDriver, Request, SECTOR, UNANSWERED};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const SECTORS: u64 = 256;

#[derive(Default)]
struct Events(Mutex<Vec<DeviceEvent>>);

impl EventSink for Events {
    fn report(&self, device: &DeviceId, event: DeviceEvent) {
        assert_eq!(device.as_str(), "disk0");
        self.0.lock().push(event);
    }
}

struct Rig {
    driver: BlockDriver,
    disk: Arc<MemoryDisk>,
    shared: Arc<Shared>,
    events: Arc<Events>,
    route: Arc<FakeRoute>,
    worker: BlockWorker,
}

fn rig() -> Rig {
    rig_with(16, RateLimits::default(), MemoryDisk::new(SECTORS))
}

fn rig_with(queue_size: u16, limits: RateLimits, disk: Arc<MemoryDisk>) -> Rig {
    let driver = BlockDriver::new(queue_size);
    let (queue, route) = driver.device_side();
    let events = Arc::new(Events::default());
    let limiter = RateLimiter::new(limits, Instant::now());
    let shared = Arc::new(Shared {
        serial: request::serial_bytes("drover-test"),
        info: disk.info().clone(),
        limiter: (!limiter.is_unlimited()).then(|| Mutex::new(limiter)),
        counters: Arc::default(),
        reporter: Reporter::new(DeviceId::new("disk0").unwrap(), events.clone()),
        writeback: AtomicBool::new(true),
        io_errors: RateLimit::new(),
    });
    let io = disk
        .open_queue(Arc::clone(&driver.memory), queue_size)
        .unwrap();
    let worker = BlockWorker::new(queue, io, Arc::clone(&shared)).unwrap();
    Rig {
        driver,
        disk,
        shared,
        events,
        route,
        worker,
    }
}

impl Rig {
    /// Serves what was offered, asserts that exactly `request` was answered, and returns status
    /// and used length.
    fn answer(&mut self, request: &Request) -> (u8, u32) {
        self.worker.serve();
        let used = self.driver.queue.used();
        assert_eq!(used.len(), 1, "{used:?}");
        assert_eq!(used[0].0, request.head);
        (self.driver.status(request), used[0].1)
    }

    fn needs_reset(&self) -> bool {
        self.worker.queue.interrupt().shared().needs_reset()
    }
}

#[test]
fn written_data_reads_back_and_is_counted() {
    let mut rig = rig();
    let data: Vec<u8> = (0..1024_u32).map(|i| (i % 251) as u8).collect();
    let write = rig.driver.offer_out(VIRTIO_BLK_T_OUT, 5, &data);
    assert_eq!(rig.answer(&write), (OK, 1));
    assert_eq!(rig.disk.contents()[5 * SECTOR..7 * SECTOR], data);
    let read = rig.driver.offer_in(VIRTIO_BLK_T_IN, 5, 1024);
    assert_eq!(rig.answer(&read), (OK, 1025));
    assert_eq!(rig.driver.data(&read, 1024), data);
    let counters = &rig.shared.counters;
    assert_eq!(
        (counters.writes.get(), counters.written_bytes.get()),
        (1, 1024)
    );
    assert_eq!((counters.reads.get(), counters.read_bytes.get()), (1, 1024));
    assert_eq!(rig.route.delivered().len(), 2);
}

#[test]
fn flush_discard_and_write_zeroes_reach_the_backend() {
    let mut rig = rig();
    rig.disk.fill(0, &[1; 64 * SECTOR]);
    let flush = rig.driver.offer_out(VIRTIO_BLK_T_FLUSH, 0, &[]);
    assert_eq!(rig.answer(&flush), (OK, 1));
    let ranges = [(0, 2, 0), (8, 1, 0)];
    let discard = rig.driver.offer_ranges(VIRTIO_BLK_T_DISCARD, &ranges);
    assert_eq!(rig.answer(&discard), (OK, 1), "one answer for two ranges");
    let zeroes = rig
        .driver
        .offer_ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(16, 4, 1)]);
    assert_eq!(rig.answer(&zeroes), (OK, 1));
    let expected = [
        (BlockOp::Flush, 0, 0),
        (BlockOp::Discard, 0, 1024),
        (BlockOp::Discard, 4096, 512),
        (BlockOp::WriteZeroes { unmap: true }, 8192, 2048),
    ];
    assert_eq!(rig.disk.seen(), expected);
    let counters = &rig.shared.counters;
    assert_eq!((counters.flushes.get(), counters.discards.get()), (1, 2));
}

#[test]
fn get_id_returns_the_serial_as_far_as_there_is_room() {
    let mut rig = rig();
    let whole = rig.driver.offer_in(VIRTIO_BLK_T_GET_ID, 0, 20);
    assert_eq!(rig.answer(&whole), (OK, 21));
    assert_eq!(
        rig.driver.data(&whole, 20),
        b"drover-test\0\0\0\0\0\0\0\0\0"
    );
    let short = rig.driver.offer_in(VIRTIO_BLK_T_GET_ID, 0, 4);
    assert_eq!(rig.answer(&short), (OK, 5));
    assert_eq!(rig.driver.data(&short, 6), b"drov\0\0", "not a byte more");
    let long = rig.driver.offer_in(VIRTIO_BLK_T_GET_ID, 0, 512);
    assert_eq!(rig.answer(&long), (OK, 21));
    assert!(rig.disk.seen().is_empty());
}

#[test]
fn refused_requests_are_answered_and_leave_storage_alone() {
    let mut rig = rig();
    let far = rig.driver.offer_in(VIRTIO_BLK_T_IN, SECTORS, 512);
    assert_eq!(rig.answer(&far), (IOERR, 1));
    assert_eq!(rig.driver.data(&far, 1), [0], "no data was made up");
    let unknown = rig.driver.offer_in(77, 0, 512);
    assert_eq!(rig.answer(&unknown), (UNSUPP, 1));
    let flags = [(0, 1, 4)];
    let flags = rig.driver.offer_ranges(VIRTIO_BLK_T_DISCARD, &flags);
    assert_eq!(rig.answer(&flags), (UNSUPP, 1));
    assert_eq!(rig.shared.counters.refused.get(), 3);
    assert!(rig.disk.seen().is_empty());
    assert!(!rig.needs_reset());
    let good = rig.driver.offer_in(VIRTIO_BLK_T_IN, 0, 512);
    assert_eq!(rig.answer(&good), (OK, 513), "the device works on");
}

#[test]
fn read_only_image_refuses_writes() {
    let info = crate::virtio::block::BlockInfo {
        read_only: true,
        ..MemoryDisk::new(SECTORS).info().clone()
    };
    let mut rig = rig_with(16, RateLimits::default(), MemoryDisk::with_info(info));
    let write = rig.driver.offer_out(VIRTIO_BLK_T_OUT, 0, &[1; 512]);
    assert_eq!(rig.answer(&write), (IOERR, 1));
    assert!(rig.disk.seen().is_empty());
}

#[test]
fn chain_without_status_byte_breaks_the_device_after_earlier_requests_were_served() {
    let mut rig = rig();
    let good = rig.driver.offer_in(VIRTIO_BLK_T_IN, 0, 512);
    rig.driver.queue.offer(&[Buffer::readable(0x1_0000, 16)]);
    assert_eq!(rig.answer(&good), (OK, 513));
    assert!(rig.needs_reset());
    rig.driver.offer_in(VIRTIO_BLK_T_IN, 0, 512);
    rig.worker.serve();
    assert!(rig.driver.queue.used().is_empty(), "until it is reset");
}

#[test]
fn head_that_is_in_flight_breaks_the_device_and_is_answered_once() {
    let mut rig = rig();
    rig.disk.hold();
    let request = rig.driver.offer_in(VIRTIO_BLK_T_IN, 0, 512);
    rig.worker.serve();
    rig.driver.queue.publish(request.head);
    rig.worker.serve();
    assert!(rig.needs_reset());
    rig.disk.release();
    rig.worker.reap();
    assert_eq!(rig.driver.queue.used(), [(request.head, 513)]);
    assert_eq!(rig.disk.seen().len(), 1);
}

#[test]
fn host_errors_become_io_errors_events_and_counts() {
    let mut rig = rig();
    rig.disk.fail_next(ErrorKind::StorageFull);
    let write = rig.driver.offer_out(VIRTIO_BLK_T_OUT, 3, &[1; 512]);
    assert_eq!(rig.answer(&write), (IOERR, 1));
    rig.disk.fail_next(ErrorKind::Other);
    let read = rig.driver.offer_in(VIRTIO_BLK_T_IN, 3, 512);
    assert_eq!(rig.answer(&read), (IOERR, 1), "no data counts as written");
    let events = rig.events.0.lock().clone();
    let event = |operation, error: &str| DeviceEvent::IoError {
        operation,
        offset: 1536,
        error: error.to_owned(),
    };
    assert_eq!(
        events,
        [
            event("write", "no storage space"),
            event("read", "other error")
        ]
    );
    let counters = &rig.shared.counters;
    assert_eq!(counters.errors.get(), 2);
    assert_eq!((counters.writes.get(), counters.reads.get()), (0, 0));
    assert!(!rig.needs_reset());
    let again = rig.driver.offer_out(VIRTIO_BLK_T_OUT, 3, &[1; 512]);
    assert_eq!(rig.answer(&again), (OK, 1), "the disk works again");
}

#[test]
fn one_failed_range_fails_the_request() {
    let mut rig = rig();
    rig.disk.fail_next(ErrorKind::Other);
    let ranges = [(0, 1, 0), (8, 1, 0), (16, 1, 0)];
    let discard = rig.driver.offer_ranges(VIRTIO_BLK_T_DISCARD, &ranges);
    assert_eq!(rig.answer(&discard), (IOERR, 1));
    assert_eq!(rig.disk.seen().len(), 3);
}

#[test]
fn a_disk_that_fails_always_reports_a_few_events_and_counts_all() {
    let mut rig = rig();
    for _ in 0..50 {
        rig.disk.fail_next(ErrorKind::Other);
        let read = rig.driver.offer_in(VIRTIO_BLK_T_IN, 0, 512);
        assert_eq!(rig.answer(&read).0, IOERR);
    }
    assert_eq!(rig.events.0.lock().len(), 10);
    assert_eq!(rig.shared.counters.errors.get(), 50);
}

#[test]
fn write_through_flushes_before_it_answers() {
    let mut rig = rig();
    rig.shared.writeback.store(false, Ordering::Relaxed);
    let write = rig.driver.offer_out(VIRTIO_BLK_T_OUT, 0, &[1; 512]);
    rig.worker.serve();
    rig.worker.reap();
    assert_eq!(rig.driver.status(&write), OK);
    let read = rig.driver.offer_in(VIRTIO_BLK_T_IN, 0, 512);
    rig.worker.serve();
    assert_eq!(rig.driver.status(&read), OK);
    let ops: Vec<_> = rig.disk.seen().into_iter().map(|(op, ..)| op).collect();
    assert_eq!(ops, [BlockOp::Write, BlockOp::Flush, BlockOp::Read]);
}

#[test]
fn failed_flush_of_a_write_through_fails_the_write() {
    let mut rig = rig();
    rig.shared.writeback.store(false, Ordering::Relaxed);
    let write = rig.driver.offer_out(VIRTIO_BLK_T_OUT, 0, &[1; 512]);
    rig.worker.serve();
    assert_eq!(rig.driver.status(&write), UNANSWERED, "not yet durable");
    rig.disk.fail_next(ErrorKind::Other);
    rig.worker.reap();
    assert_eq!(rig.driver.status(&write), IOERR);
    let failed = rig.driver.offer_out(VIRTIO_BLK_T_OUT, 0, &[1; 512]);
    rig.disk.fail_next(ErrorKind::Other);
    rig.worker.serve();
    assert_eq!(rig.driver.status(&failed), IOERR);
    let ops: Vec<_> = rig.disk.seen().into_iter().map(|(op, ..)| op).collect();
    assert_eq!(
        ops,
        [BlockOp::Write, BlockOp::Flush, BlockOp::Write],
        "a failed write is not flushed"
    );
}

#[test]
fn rate_limit_lets_the_burst_through_and_holds_the_rest_until_the_timer() {
    // A sector takes 8.5 minutes to earn: the clock cannot help within the test. The third
    // request drives the budget 512 bytes into debt.
    let limits = RateLimits {
        bytes: Some(Rate {
            per_second: 1,
            burst: Some(5 * 512),
        }),
        ops: None,
    };
    let mut rig = rig_with(16, limits, MemoryDisk::new(SECTORS));
    let requests: Vec<_> = (0..5)
        .map(|sector| rig.driver.offer_in(VIRTIO_BLK_T_IN, sector, 1024))
        .collect();
    rig.worker.serve();
    assert_eq!(rig.driver.queue.used().len(), 3);
    assert_eq!(rig.shared.counters.throttled.get(), 1);
    assert!(rig.worker.timer.is_armed().unwrap());
    // Doorbells are ignored meanwhile.
    rig.worker.serve();
    assert!(rig.driver.queue.used().is_empty());
    // A quiet time later.
    let limiter = RateLimiter::new(limits, Instant::now());
    *rig.shared.limiter.as_ref().unwrap().lock() = limiter;
    rig.worker.throttled = false;
    rig.worker.serve();
    let heads: Vec<_> = rig.driver.queue.used().iter().map(|used| used.0).collect();
    assert_eq!(heads, [requests[3].head, requests[4].head]);
    assert!(!rig.worker.throttled, "an idle queue is not throttled");
    assert_eq!(rig.shared.counters.throttled.get(), 1);
}

#[test]
fn more_than_a_queueful_is_left_for_the_next_round() {
    let mut rig = rig_with(16, RateLimits::default(), MemoryDisk::new(SECTORS));
    // Requests that need no backend: their heads are free again at once, as with a driver that
    // refills the queue as fast as it is emptied.
    let request = rig.driver.offer_in(VIRTIO_BLK_T_GET_ID, 0, 20);
    for _ in 0..15 {
        rig.driver.queue.publish(request.head);
    }
    rig.worker.serve();
    assert_eq!(rig.driver.queue.used().len(), 16);
    assert!(rig.worker.more, "a full round asks for another");
    for _ in 0..3 {
        rig.driver.queue.publish(request.head);
    }
    assert!(!rig.worker.before_sleep(), "the other round is enough");
    assert_eq!(rig.driver.queue.used().len(), 3);
}

#[test]
fn held_requests_are_drained() {
    let mut rig = rig();
    rig.disk.hold();
    let requests: Vec<_> = (0..4)
        .map(|sector| rig.driver.offer_in(VIRTIO_BLK_T_IN, sector, 512))
        .collect();
    rig.worker.serve();
    assert_eq!(rig.worker.in_flight, 4);
    rig.disk.release();
    rig.worker.drain();
    assert_eq!(rig.worker.in_flight, 0);
    assert!(
        requests
            .iter()
            .all(|request| rig.driver.status(request) == OK)
    );
}
