//! The device with its threads.

#![allow(clippy::cast_possible_truncation)]

use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::DeviceId;
use crate::events::{DeviceEvent, EventSink};
use crate::rate::Rate;
use crate::testing::MemoryDisk;
use crate::virtio::block::test_driver::{BlockDriver, Request};
use crate::virtio::block::{BlockInfo, BlockOp};

const SECTORS: u64 = 64;
/// Everything here takes milliseconds; only a defect takes longer.
const DEADLINE: Duration = Duration::from_secs(20);

struct NoEvents;

impl EventSink for NoEvents {
    fn report(&self, _device: &DeviceId, event: DeviceEvent) {
        panic!("unexpected {event:?}");
    }
}

fn options() -> BlockOptions {
    BlockOptions {
        serial: String::new(),
        queues: 1,
        queue_size: 16,
        rate_limits: RateLimits::default(),
    }
}

fn device(disk: &Arc<MemoryDisk>, options: BlockOptions) -> Block {
    let id = DeviceId::new("disk0").unwrap();
    Block::new(disk.clone(), options, Reporter::new(id, Arc::new(NoEvents)))
}

/// Activates `block` with one queue; returns the queue's doorbell.
fn activate(block: &mut Block, driver: &BlockDriver, features: u64) -> EventFd {
    let (queue, _route) = driver.device_side();
    let doorbell = queue.doorbell().try_clone().unwrap();
    let interrupt = Arc::clone(queue.interrupt().shared());
    block
        .activate(Activation {
            memory: Arc::clone(&driver.memory),
            queues: vec![queue],
            features,
            interrupt,
        })
        .unwrap();
    doorbell
}

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// Waits until `count` requests have been answered.
fn answered(driver: &mut BlockDriver, count: usize) -> Vec<(u16, u32)> {
    let deadline = Instant::now() + DEADLINE;
    let mut used = Vec::new();
    while used.len() < count {
        assert!(Instant::now() < deadline, "{} of {count}", used.len());
        used.extend(driver.queue.used());
        std::thread::yield_now();
    }
    used
}

fn is_ok(driver: &BlockDriver, request: &Request) -> bool {
    u32::from(driver.status(request)) == VIRTIO_BLK_S_OK
}

#[test]
fn requests_offered_before_and_after_activation_are_served() {
    let disk = MemoryDisk::new(SECTORS);
    let mut block = device(&disk, options());
    let mut driver = BlockDriver::new(16);
    let early = driver.offer_out(VIRTIO_BLK_T_OUT, 0, &[7; 512]);
    let doorbell = activate(&mut block, &driver, FLUSH);
    answered(&mut driver, 1);
    assert!(is_ok(&driver, &early));
    for round in 0..100 {
        let late = driver.offer_in(VIRTIO_BLK_T_IN, 0, 512);
        doorbell.write(1).unwrap();
        answered(&mut driver, 1);
        assert!(is_ok(&driver, &late), "round {round}");
        assert_eq!(driver.data(&late, 512), [7; 512]);
    }
    assert_eq!(block.counters().reads.get(), 100);
    assert_eq!(block.deactivate().len(), 1);
}

#[test]
fn completions_that_come_late_are_answered_without_a_doorbell() {
    let disk = MemoryDisk::new(SECTORS);
    disk.hold();
    let mut block = device(&disk, options());
    let mut driver = BlockDriver::new(16);
    let request = driver.offer_in(VIRTIO_BLK_T_IN, 0, 512);
    activate(&mut block, &driver, FLUSH);
    disk.release();
    answered(&mut driver, 1);
    assert!(is_ok(&driver, &request));
    block.deactivate();
}

#[test]
fn deactivation_waits_for_requests_in_flight_and_the_queue_goes_on_later() {
    let disk = MemoryDisk::new(SECTORS);
    disk.hold();
    let mut block = device(&disk, options());
    let mut driver = BlockDriver::new(16);
    let requests: Vec<_> = (0..3)
        .map(|sector| driver.offer_out(VIRTIO_BLK_T_OUT, sector, &[9; 512]))
        .collect();
    activate(&mut block, &driver, FLUSH);
    let releaser = std::thread::spawn({
        let disk = Arc::clone(&disk);
        move || {
            // Not needed for the test to pass: it makes a deactivation that does not wait fail.
            std::thread::sleep(Duration::from_millis(50));
            disk.release();
        }
    });
    let queues = block.deactivate();
    assert_eq!(driver.queue.used().len(), 3, "answered before the return");
    assert!(requests.iter().all(|request| is_ok(&driver, request)));
    assert_eq!(queues[0].state().next_avail, 3);
    assert!(block.deactivate().is_empty());
    releaser.join().unwrap();
    assert_eq!(disk.contents()[..1536], [9; 1536]);
}

#[test]
fn rate_limit_spreads_requests_over_time() {
    let disk = MemoryDisk::new(SECTORS);
    let ops = Rate {
        per_second: 100,
        burst: Some(1),
    };
    let limited = BlockOptions {
        rate_limits: RateLimits {
            bytes: None,
            ops: Some(ops),
        },
        ..options()
    };
    let mut block = device(&disk, limited);
    let mut driver = BlockDriver::new(16);
    for _ in 0..5 {
        driver.offer_in(VIRTIO_BLK_T_IN, 0, 512);
    }
    let start = Instant::now();
    activate(&mut block, &driver, FLUSH);
    answered(&mut driver, 5);
    let elapsed = start.elapsed();
    // The first passes on the burst, the second on credit.
    assert!(elapsed >= Duration::from_millis(29), "{elapsed:?}");
    assert!(block.counters().throttled.get() >= 1);
    block.deactivate();
}

#[test]
fn driver_without_flush_gets_write_through() {
    for (features, expected) in [
        (FLUSH, &[BlockOp::Write][..]),
        (0, &[BlockOp::Write, BlockOp::Flush]),
    ] {
        let disk = MemoryDisk::new(SECTORS);
        let mut block = device(&disk, options());
        let mut driver = BlockDriver::new(16);
        driver.offer_out(VIRTIO_BLK_T_OUT, 0, &[1; 512]);
        activate(&mut block, &driver, features);
        answered(&mut driver, 1);
        block.deactivate();
        let ops: Vec<_> = disk.seen().into_iter().map(|(op, ..)| op).collect();
        assert_eq!(ops, expected);
    }
}

fn read_config(block: &Block, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xaa; len];
    block.read_config(offset, &mut data);
    data
}

#[test]
fn driver_chooses_the_cache_mode_and_nothing_else() {
    let disk = MemoryDisk::new(SECTORS);
    let mut block = device(&disk, options());
    let before = read_config(&block, 0, 64);
    for (offset, value) in [(0, &[9_u8; 8][..]), (32, &[2]), (32, &[0, 0]), (33, &[0])] {
        block.write_config(offset, value);
    }
    assert_eq!(read_config(&block, 0, 64), before);
    assert_eq!(before[32], 1, "writeback by default");
    block.write_config(32, &[0]);
    assert_eq!(read_config(&block, 32, 1), [0]);
    block.reset();
    assert_eq!(read_config(&block, 32, 1), [1]);
}

#[test]
fn config_space_has_the_specified_layout() {
    let disk = MemoryDisk::with_info(BlockInfo {
        capacity_bytes: 1 << 30,
        block_bytes: 4096,
        physical_block_bytes: 16384,
        read_only: false,
        discard: true,
        write_zeroes: true,
    });
    let block = device(
        &disk,
        BlockOptions {
            queues: 3,
            queue_size: 128,
            ..options()
        },
    );
    let le32 = |offset| u32::from_le_bytes(read_config(&block, offset, 4).try_into().unwrap());
    let le16 = |offset| u16::from_le_bytes(read_config(&block, offset, 2).try_into().unwrap());
    assert_eq!(read_config(&block, 0, 8), (1_u64 << 21).to_le_bytes());
    assert_eq!(le32(12), 126, "seg_max leaves room for header and status");
    assert_eq!(le32(20), 4096, "blk_size");
    assert_eq!(
        read_config(&block, 24, 2),
        [2, 0],
        "physical_block_exp, offset"
    );
    assert_eq!(le16(34), 3, "num_queues");
    assert_eq!(le32(36), 1 << 21, "max_discard_sectors");
    assert_eq!(le32(40), 16, "max_discard_seg");
    assert_eq!(le32(44), 8, "discard_sector_alignment");
    assert_eq!(le32(48), 1 << 21, "max_write_zeroes_sectors");
    assert_eq!(le32(52), 16, "max_write_zeroes_seg");
    assert_eq!(read_config(&block, 56, 1), [1], "write_zeroes_may_unmap");
    assert_eq!(read_config(&block, 58, 8), [0; 8], "zeroes after the end");
    assert_eq!(read_config(&block, u64::MAX, 4), [0; 4]);
}

#[test]
fn features_follow_the_image() {
    let info = MemoryDisk::new(SECTORS).info().clone();
    let bits = |info: BlockInfo, queues| {
        let options = BlockOptions {
            queues,
            ..options()
        };
        let block = device(&MemoryDisk::with_info(info), options);
        move |bit: u32| block.identity().features & 1 << bit != 0
    };
    let all = bits(info.clone(), 2);
    assert!(all(VIRTIO_BLK_F_DISCARD) && all(VIRTIO_BLK_F_WRITE_ZEROES));
    assert!(all(VIRTIO_BLK_F_FLUSH) && all(VIRTIO_BLK_F_CONFIG_WCE) && all(VIRTIO_BLK_F_MQ));
    assert!(!all(VIRTIO_BLK_F_RO));
    let read_only = BlockInfo {
        read_only: true,
        ..info.clone()
    };
    let read_only = bits(read_only, 1);
    assert!(read_only(VIRTIO_BLK_F_RO) && !read_only(VIRTIO_BLK_F_DISCARD));
    assert!(!read_only(VIRTIO_BLK_F_WRITE_ZEROES) && !read_only(VIRTIO_BLK_F_MQ));
    let plain = BlockInfo {
        discard: false,
        write_zeroes: false,
        ..info
    };
    let plain = bits(plain, 1);
    assert!(!plain(VIRTIO_BLK_F_DISCARD) && !plain(VIRTIO_BLK_F_WRITE_ZEROES));
}

#[test]
fn state_round_trips_and_saving_is_pure() {
    let disk = MemoryDisk::new(SECTORS);
    let mut source = device(&disk, options());
    source.write_config(32, &[0]);
    let state = source.save().unwrap();
    assert_eq!(source.save().unwrap(), state);
    let mut destination = device(&disk, options());
    destination.restore(&state).unwrap();
    assert_eq!(read_config(&destination, 32, 1), [0]);
    assert_eq!(destination.save().unwrap(), state);
    assert!(matches!(
        destination.migratability(),
        Migratability::Supported
    ));
}

#[test]
fn states_of_other_disks_and_hostile_states_are_refused() {
    let disk = MemoryDisk::new(SECTORS);
    let good = BlockStateV1 {
        capacity_sectors: SECTORS,
        block_bytes: 512,
        read_only: false,
        writeback: true,
    };
    let encode = |wire: &BlockStateV1| DeviceState::encode(KIND, 1, wire).unwrap();
    let larger = BlockStateV1 {
        capacity_sectors: u64::MAX,
        ..good.clone()
    };
    let blocks = BlockStateV1 {
        block_bytes: 4096,
        ..good.clone()
    };
    let read_only = BlockStateV1 {
        read_only: true,
        ..good.clone()
    };
    let newer = DeviceState {
        version: 2,
        ..encode(&good)
    };
    let other = DeviceState {
        kind: "virtio-net".to_owned(),
        ..encode(&good)
    };
    let garbage = DeviceState {
        bytes: vec![0xff; 100],
        ..encode(&good)
    };
    let cases = [
        (encode(&larger), "capacity_sectors is 18446744073709551615"),
        (encode(&blocks), "block_bytes is 4096"),
        (encode(&read_only), "read_only is true"),
        (newer, "version 2"),
        (other, "virtio-net"),
        (garbage, "malformed"),
    ];
    for (state, expected) in cases {
        let mut block = device(&disk, options());
        let error = block.restore(&state).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(block.save().unwrap(), encode(&good), "unchanged");
    }
}
