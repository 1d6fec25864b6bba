//! The balloon, over pages of 8 KiB, from a driver that is ready.

use std::io;
use std::sync::{Arc, Mutex};

use devices::virtio::VirtioDevice;
use devices::virtio::balloon::{Balloon, BalloonHandle, BalloonOptions, RamReclaim};
use vm_memory::GuestAddress;

use crate::input::{Input, Script};
use crate::rig::{self, RAM, Subject};

const PAGE_BYTES: u64 = 4096;

pub fn run(data: &[u8]) {
    rig::run::<Host>(data, true);
}

/// The host's memory, and the operator.
#[derive(Default)]
pub struct Host {
    reclaim: Arc<Reclaim>,
    /// That of the device in use.
    handle: Mutex<Option<BalloonHandle>>,
}

#[derive(Default)]
struct Reclaim {
    fails: Mutex<bool>,
}

impl RamReclaim for Reclaim {
    fn page_bytes(&self) -> u64 {
        2 * PAGE_BYTES
    }

    /// Nothing is freed: the driver goes on to look at its memory.
    fn discard(&self, start: GuestAddress, len: u64) -> io::Result<u64> {
        let end = start.0.checked_add(len).expect("a range of RAM");
        let is_ram = RAM.iter().any(|ram| ram.start <= start.0 && end <= ram.end);
        assert!(
            is_ram && len > 0,
            "{len} bytes at {:#x} are no RAM",
            start.0
        );
        let fails = std::mem::take(&mut *self.fails.lock().expect("a panic ends everything"));
        if fails {
            Err(io::ErrorKind::OutOfMemory.into())
        } else {
            Ok(len)
        }
    }
}

impl Subject for Host {
    const QUEUES: u16 = 5;

    /// Which queue the others are depends on the features; one of them keeps its buffer.
    fn answers_all(&self, queue: u16) -> bool {
        queue < 2
    }

    fn new() -> Self {
        Self::default()
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let options = BalloonOptions {
            ram_bytes: RAM.iter().map(|ram| ram.end - ram.start).sum(),
            target_bytes: 0,
            deflate_on_oom: true,
            free_page_reporting: true,
            stats_interval_s: 1,
        };
        let balloon = Balloon::new(self.reclaim.clone(), &options, rig::reporter());
        let balloon = balloon.expect("a target of nothing");
        *self.handle.lock().expect("a panic ends everything") = Some(balloon.handle());
        Box::new(balloon)
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let handle = self.handle.lock().expect("a panic ends everything");
        let handle = handle.as_ref().expect("there is a device");
        if input.flag() {
            *self.reclaim.fails.lock().expect("a panic ends everything") = true;
            return;
        }
        let pages = u64::from(input.below(32));
        match handle.set_target_bytes(pages * PAGE_BYTES) {
            Ok(()) => assert_eq!(handle.target_bytes(), pages * PAGE_BYTES),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        drop(handle.stats());
        assert!(handle.actual_bytes() <= RAM.iter().map(|ram| ram.end - ram.start).sum());
    }

    fn release(&mut self) {}
}

pub fn seeds() -> Vec<Vec<u8>> {
    let frames = |queue: u8, frames: &[u32]| {
        let bytes: Vec<u8> = frames
            .iter()
            .flat_map(|frame| frame.to_le_bytes())
            .collect();
        Script::new().u8(queue).u8(0).u8(2).u8(5).u8(0).blob(&bytes)
    };
    let statistics: Vec<u8> = [(0_u16, 7_u64), (4, 1 << 30), (99, 5)]
        .iter()
        .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
        .collect();
    let reported = Script::new()
        .u8(4)
        .u8(1)
        .u8(1)
        .u8(6)
        .u8(0)
        .u8(0x81)
        .u8(6)
        .u8(0);
    let mut seeds = rig::seeds(&[
        frames(0, &[8, 9, 10, 11, 0x20, 0x21, 0xffff_ffff]),
        frames(1, &[9, 8]),
        Script::new()
            .u8(2)
            .u8(0)
            .u8(4)
            .u8(1)
            .u8(20)
            .blob(&statistics),
        reported,
        Script::new().u8(3).u8(0).u8(1).u8(1).u8(0),
    ]);
    let target = Script::new()
        .u8(10)
        .u8(0)
        .u8(9)
        .u8(0)
        .u8(3)
        .u8(0)
        .width(8)
        .u8(0);
    let actual = target
        .u8(0)
        .u8(3)
        .u8(4)
        .width(4)
        .u8(1)
        .u64(9)
        .u8(9)
        .u8(0)
        .u8(3)
        .u8(4)
        .width(4);
    seeds.push(actual.u8(0).done());
    seeds
}
