#![allow(clippy::cast_possible_truncation)]

use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use devices::DeviceId;
use devices::events::{DeviceEvent, EventSink, Reporter};
use devices::testing::{Buffer, DriverQueue};
use devices::virtio::balloon::{Balloon, BalloonOptions};
use devices::virtio::{Activation, VirtioDevice};
use vm_memory::{Bytes, MemoryRegionAddress};

use super::super::{Layout, RamOptions, allocate};
use super::*;

const DEADLINE: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn ram(bytes: u64) -> Arc<GuestRam> {
    let layout = Layout::new(bytes, 4096, 40).unwrap();
    Arc::new(allocate(&layout, &RamOptions::default()).unwrap())
}

/// Bytes of the file behind RAM that take up memory.
fn file_bytes(ram: &GuestRam) -> u64 {
    let region = ram.iter().next().unwrap();
    let file = region.file_offset().unwrap().file();
    file.metadata().unwrap().blocks() * 512
}

/// Resident bytes of the mapping that begins at the first region's host address.
fn resident_bytes(ram: &GuestRam) -> u64 {
    let region = ram.iter().next().unwrap();
    let host = region.get_host_address(MemoryRegionAddress(0)).unwrap();
    let start = format!("{:x}-", host as usize);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
    let rss = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
    let kib: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap();
    kib * 1024
}

fn fill(ram: &GuestRam, start: u64, len: u64) {
    let page = [0x5a; 4096];
    for at in (start..start + len).step_by(4096) {
        ram.write_slice(&page, GuestAddress(at)).unwrap();
    }
}

fn byte(ram: &GuestRam, at: u64) -> u8 {
    ram.read_obj(GuestAddress(at)).unwrap()
}

/// Pages that the VMM's write log has marked in the region of `at`.
fn harvest(ram: &GuestRam, at: u64) -> Vec<usize> {
    let region = ram.find_region(GuestAddress(at)).unwrap();
    let mut words = vec![0_u64; (region.len() / 4096).div_ceil(64) as usize];
    region.get_mmap().bitmap().harvest(&mut words);
    let bits = (0..words.len() * 64).filter(|bit| words[bit / 64] & 1 << (bit % 64) != 0);
    bits.collect()
}

#[test]
fn discarded_pages_are_freed_and_read_as_zeroes() {
    let ram = ram(64 * MIB);
    fill(&ram, 0, 8 * MIB);
    assert_eq!(file_bytes(&ram), 8 * MIB);
    let discard = RamDiscard::new(Arc::clone(&ram), None);
    let freed = discard.discard(GuestAddress(MIB), 2 * MIB).unwrap();
    assert_eq!(freed, 2 * MIB);
    assert_eq!(file_bytes(&ram), 6 * MIB);
    // Transparent huge pages may be unmapped as a whole.
    assert!(resident_bytes(&ram) <= 6 * MIB);
    for (at, expected) in [(MIB - 1, 0x5a), (MIB, 0), (3 * MIB - 1, 0), (3 * MIB, 0x5a)] {
        assert_eq!(byte(&ram, at), expected, "{at:#x}");
    }
}

#[test]
fn only_whole_pages_are_discarded() {
    let ram = ram(16 * MIB);
    fill(&ram, 0, 0x8000);
    let discard = RamDiscard::new(Arc::clone(&ram), None);
    for (start, len, freed) in [
        (0x1001, 0x1ffe, 0),
        (0x1fff, 0x1002, 0x1000),
        (0x4000, 0xfff, 0),
    ] {
        let result = discard.discard(GuestAddress(start), len).unwrap();
        assert_eq!(result, freed, "{start:#x} {len:#x}");
    }
    for (at, expected) in [(0x1fff, 0x5a), (0x2000, 0), (0x2fff, 0), (0x3000, 0x5a)] {
        assert_eq!(byte(&ram, at), expected, "{at:#x}");
    }
}

#[test]
fn high_memory_is_found_in_the_file_behind_the_hole() {
    let ram = ram(4 * GIB);
    fill(&ram, 4 * GIB, 4 * MIB);
    fill(&ram, 3 * GIB - 2 * MIB, 2 * MIB);
    let discard = RamDiscard::new(Arc::clone(&ram), None);
    discard.discard(GuestAddress(4 * GIB), 4 * MIB).unwrap();
    assert_eq!(file_bytes(&ram), 2 * MIB);
    assert_eq!(byte(&ram, 3 * GIB - 1), 0x5a);
}

#[test]
fn ranges_that_are_not_ram_are_refused_and_nothing_is_freed() {
    let ram = ram(4 * GIB);
    fill(&ram, 3 * GIB - 2 * MIB, 2 * MIB);
    let discard = RamDiscard::new(Arc::clone(&ram), None);
    for (start, len) in [
        (3 * GIB - 4096, 8192),
        (3 * GIB, 4096),
        (4 * GIB - 4096, 8192),
        (5 * GIB - 4096, 8192),
        (0, 5 * GIB),
        (u64::MAX - 4095, 4096),
        (u64::MAX, u64::MAX),
        (0, 0),
    ] {
        let error = discard.discard(GuestAddress(start), len).unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::InvalidInput,
            "{start:#x} {len:#x}"
        );
    }
    assert_eq!(file_bytes(&ram), 2 * MIB);
}

#[test]
fn discarded_pages_count_as_written() {
    let ram = ram(4 * GIB);
    let discard = RamDiscard::new(Arc::clone(&ram), None);
    for region in ram.iter() {
        region.get_mmap().bitmap().enable();
    }
    discard.discard(GuestAddress(0x5000), 0x3000).unwrap();
    discard
        .discard(GuestAddress(4 * GIB + 0x2000), 0x1000)
        .unwrap();
    assert_eq!(harvest(&ram, 0), [5, 6, 7]);
    assert_eq!(harvest(&ram, 4 * GIB), [2]);
    assert!(harvest(&ram, 0).is_empty());
}

#[test]
fn huge_pages_are_freed_whole_or_not_at_all() {
    let huge = HugePages::Size2M.bytes();
    let layout = Layout::new(16 * MIB, huge, 40).unwrap();
    let options = RamOptions {
        hugepages: Some(HugePages::Size2M),
        ..RamOptions::default()
    };
    let ram = match allocate(&layout, &options) {
        Ok(ram) => Arc::new(ram),
        Err(error) => {
            println!("SKIPPED: {error}");
            return;
        }
    };
    fill(&ram, 0, 8 * MIB);
    let discard = RamDiscard::new(Arc::clone(&ram), options.hugepages);
    assert_eq!(discard.page_bytes(), huge);
    assert_eq!(discard.discard(GuestAddress(0), huge - 4096).unwrap(), 0);
    assert_eq!(byte(&ram, 0), 0x5a);
    let freed = discard.discard(GuestAddress(huge - 4096), huge + 8192);
    assert_eq!(freed.unwrap(), huge);
    assert_eq!(file_bytes(&ram), 6 * MIB);
    let around = [huge - 1, huge, 2 * huge - 1, 2 * huge];
    assert_eq!(around.map(|at| byte(&ram, at)), [0x5a, 0, 0, 0x5a]);
}

struct Sink(Sender<DeviceEvent>);

impl EventSink for Sink {
    fn report(&self, _device: &DeviceId, event: DeviceEvent) {
        self.0.send(event).unwrap();
    }
}

/// Offers `frames` to a balloon's queue, 256 to a chain as Linux does, and waits for the answers.
fn give(ram: &GuestRam, driver: &mut DriverQueue, ring: &dyn Fn(), frames: &[u32]) {
    const FRAMES_AT: u64 = 0x10_0000;
    for chunk in frames.chunks(256) {
        let bytes: Vec<u8> = chunk.iter().flat_map(|frame| frame.to_le_bytes()).collect();
        ram.write_slice(&bytes, GuestAddress(FRAMES_AT)).unwrap();
        driver.offer(&[Buffer::readable(FRAMES_AT, bytes.len() as u32)]);
        ring();
        let start = Instant::now();
        while driver.used().is_empty() {
            assert!(start.elapsed() < DEADLINE, "no answer in {DEADLINE:?}");
            std::thread::yield_now();
        }
    }
}

#[test]
fn memory_of_the_host_follows_the_balloon() {
    const SIZE: u64 = 96 * MIB;
    let ram = ram(SIZE);
    fill(&ram, 0, SIZE);
    let rings = 2 * DriverQueue::BYTES;
    ram.write_slice(&vec![0; rings as usize], GuestAddress(0))
        .unwrap();
    let reclaim = Arc::new(RamDiscard::new(Arc::clone(&ram), None));
    let options = BalloonOptions {
        ram_bytes: SIZE,
        ..BalloonOptions::default()
    };
    let (sender, events) = channel();
    let reporter = Reporter::new(DeviceId::new("balloon").unwrap(), Arc::new(Sink(sender)));
    let mut balloon = Balloon::new(reclaim, &options, reporter).unwrap();
    let mut inflate = DriverQueue::new(&ram, 0, 16);
    let mut deflate = DriverQueue::new(&ram, DriverQueue::BYTES, 16);
    let queues = [inflate.device_side(0).0, deflate.device_side(1).0];
    let doorbells = [0, 1].map(|queue| queues[queue].doorbell().try_clone().unwrap());
    let interrupt = Arc::clone(queues[0].interrupt().shared());
    balloon
        .activate(Activation {
            memory: Arc::clone(&ram),
            queues: queues.into(),
            features: 0,
            interrupt,
        })
        .unwrap();

    let before = resident_bytes(&ram);
    assert_eq!(before, SIZE);
    // Every other page of 32 MiB, downwards, and 32 MiB in one piece.
    let scattered = (0x2000..0x4000_u32).rev().filter(|frame| frame % 2 == 0);
    let frames: Vec<u32> = scattered.chain(0x4000..0x6000).collect();
    let out = frames.len() as u64 * 4096;
    give(
        &ram,
        &mut inflate,
        &|| doorbells[0].write(1).unwrap(),
        &frames,
    );
    assert_eq!(file_bytes(&ram), SIZE - out);
    assert!(resident_bytes(&ram) <= SIZE - out);
    assert_eq!(byte(&ram, 0x3001 * 4096), 0x5a, "a page that stayed");

    give(
        &ram,
        &mut deflate,
        &|| doorbells[1].write(1).unwrap(),
        &frames,
    );
    for frame in &frames {
        fill(&ram, u64::from(*frame) * 4096, 4096);
    }
    assert_eq!(file_bytes(&ram), SIZE);
    balloon.deactivate();
    assert_eq!(balloon.counters().freed_bytes.get(), out);
    assert!(events.try_recv().is_err(), "no errors");
}
