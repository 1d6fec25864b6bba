#![allow(clippy::cast_possible_truncation)]

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::config::{F_MUST_TELL_HOST, F_PAGE_POISON, F_PAGE_REPORTING, F_STATS_VQ};
use super::*;
use crate::GuestRam;
use crate::device::DeviceId;
use crate::events::{DeviceEvent, EventSink, Reporter};
use crate::state::{DeviceState, RestoreError};
use crate::testing::{Buffer, DriverQueue, FakeRoute};
use crate::virtio::{Activation, ActivationError, VirtioDevice, VirtioInterrupt, Virtqueue};

const DEADLINE: Duration = Duration::from_secs(10);
const HUGE: u64 = 2 << 20;
/// RAM from 0 to 4 MiB and, after a hole, from 8 to 12 MiB.
const RAM: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 4 << 20), (GuestAddress(8 << 20), 4 << 20)];
const RAM_BYTES: u64 = 8 << 20;
const DATA: u64 = 0x10_0000;

struct Sink(Sender<DeviceEvent>);

impl EventSink for Sink {
    fn report(&self, _device: &DeviceId, event: DeviceEvent) {
        self.0.send(event).unwrap();
    }
}

/// Remembers what is freed.
struct Reclaim {
    page_bytes: u64,
    freed: Mutex<Vec<(u64, u64)>>,
    fails: bool,
}

impl RamReclaim for Reclaim {
    fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    fn discard(&self, start: GuestAddress, len: u64) -> io::Result<u64> {
        self.freed.lock().push((start.0, len));
        if self.fails {
            return Err(io::Error::other("not today"));
        }
        Ok(len)
    }
}

struct Fixture {
    memory: Arc<GuestRam>,
    /// Inflate, deflate, statistics, hints, reports.
    drivers: Vec<DriverQueue>,
    balloon: Balloon,
    handle: BalloonHandle,
    reclaim: Arc<Reclaim>,
    events: Receiver<DeviceEvent>,
    route: Arc<FakeRoute>,
    interrupt: Arc<VirtioInterrupt>,
}

fn options() -> BalloonOptions {
    BalloonOptions {
        ram_bytes: RAM_BYTES,
        target_bytes: 0x10_0000,
        deflate_on_oom: true,
        free_page_reporting: true,
        stats_interval_s: 1,
    }
}

fn fixture() -> Fixture {
    fixture_with(4096, false, &options())
}

fn fixture_with(page_bytes: u64, fails: bool, options: &BalloonOptions) -> Fixture {
    let memory = Arc::new(GuestRam::from_ranges(&RAM).unwrap());
    let reclaim = Arc::new(Reclaim {
        page_bytes,
        freed: Mutex::default(),
        fails,
    });
    let (sender, events) = channel();
    let reporter = Reporter::new(DeviceId::new("balloon").unwrap(), Arc::new(Sink(sender)));
    let balloon = Balloon::new(reclaim.clone(), options, reporter).unwrap();
    let drivers: Vec<_> = (0..5)
        .map(|index| DriverQueue::new(&memory, index * DriverQueue::BYTES, 16))
        .collect();
    // The interrupt side of changes only.
    let (spare, route) = drivers[0].device_side(0);
    Fixture {
        memory,
        drivers,
        handle: balloon.handle(),
        balloon,
        reclaim,
        events,
        route,
        interrupt: Arc::clone(spare.interrupt().shared()),
    }
}

impl Fixture {
    fn activate(&mut self, features: &[u32], queues: &[u16]) -> Result<(), ActivationError> {
        let queues = queues.iter().map(|index| {
            let driver = &self.drivers[usize::from(*index)];
            driver.device_side(*index).0
        });
        let queues = queues.collect();
        self.activate_with(features, queues)
    }

    fn activate_with(
        &mut self,
        features: &[u32],
        queues: Vec<Virtqueue>,
    ) -> Result<(), ActivationError> {
        self.balloon.activate(Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features: features.iter().fold(0, |bits, bit| bits | 1 << bit),
            interrupt: Arc::clone(&self.interrupt),
        })
    }

    /// Puts page frame numbers into memory at `at`; the buffer that holds them.
    fn frames(&self, at: u64, frames: &[u32]) -> Buffer {
        let bytes: Vec<u8> = frames.iter().flat_map(|f| f.to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        Buffer::readable(at, bytes.len() as u32)
    }

    fn freed(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *self.reclaim.freed.lock())
    }

    fn wait_used(&mut self, queue: usize, count: usize) {
        let mut seen = 0;
        wait("used chains", || {
            seen += self.drivers[queue].used().len();
            seen >= count
        });
        assert_eq!(seen, count);
    }

    fn config(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.balloon.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < DEADLINE, "no {what} in {DEADLINE:?}");
        std::thread::yield_now();
    }
}

#[test]
fn inflated_pages_are_freed_in_runs_and_deflated_ones_left_alone() {
    let mut f = fixture();
    let first = f.frames(DATA, &[0x205, 0x203, 0x204]);
    let second = f.frames(DATA + 64, &[0x206, 0x300]);
    f.drivers[0].offer(&[first, second]);
    let deflated = f.frames(DATA + 128, &[0x203]);
    f.drivers[1].offer(&[deflated]);
    f.activate(&[], &[0, 1]).unwrap();
    f.wait_used(0, 1);
    f.wait_used(1, 1);
    assert_eq!(f.freed(), [(0x20_3000, 0x4000), (0x30_0000, 0x1000)]);
    let counters = f.balloon.counters();
    assert_eq!(counters.inflated_pages.get(), 5);
    assert_eq!(counters.deflated_pages.get(), 1);
    assert_eq!(counters.freed_bytes.get(), 0x5000);
}

#[test]
fn hostile_page_frames_are_refused_one_by_one() {
    type Runs = &'static [(u64, u64)];
    let cases: [(&str, &[u32], Runs, u64); 6] = [
        ("past the end", &[0xc00, 0xbff], &[(0xbf_f000, 0x1000)], 1),
        (
            "the hole",
            &[0x3ff, 0x400, 0x7ff, 0x800],
            &[(0x3f_f000, 0x1000), (0x80_0000, 0x1000)],
            2,
        ),
        ("the last frame there is", &[u32::MAX], &[], 1),
        ("twice the same", &[0x210, 0x210], &[(0x21_0000, 0x1000)], 0),
        ("the queue itself", &[0], &[(0, 0x1000)], 0),
        ("nothing", &[], &[], 0),
    ];
    for (what, frames, freed, refused) in cases {
        let mut f = fixture();
        let buffer = f.frames(DATA, frames);
        f.drivers[0].offer(&[buffer]);
        f.activate(&[], &[0, 1]).unwrap();
        f.wait_used(0, 1);
        assert_eq!(f.freed(), freed, "{what}");
        assert_eq!(f.balloon.counters().refused_pages.get(), refused, "{what}");
        assert!(!f.interrupt.needs_reset(), "{what}");
    }
}

#[test]
fn request_with_too_many_frames_is_acknowledged_and_taken_in_part() {
    let mut f = fixture();
    // 64 Ki frames are taken: all of them frame 0; the 64 Ki beyond are not.
    let many = Buffer::readable(DATA, 2 * 4 * (64 << 10));
    f.drivers[0].offer(&[many]);
    f.activate(&[], &[0, 1]).unwrap();
    f.wait_used(0, 1);
    assert_eq!(f.freed(), [(0, 0x1000)]);
    assert_eq!(f.balloon.counters().refused_pages.get(), 64 << 10);
}

#[test]
fn odd_lengths_and_writable_buffers_are_harmless_and_bad_chains_break_the_device() {
    let mut f = fixture();
    f.frames(DATA, &[0x200, 0x201]);
    f.drivers[0].offer(&[Buffer::readable(DATA, 7), Buffer::writable(DATA + 64, 4)]);
    f.drivers[0].offer(&[Buffer::writable(DATA + 64, 4)]);
    f.activate(&[], &[0, 1]).unwrap();
    f.wait_used(0, 2);
    assert_eq!(f.freed(), [(0x20_0000, 0x1000)]);
    for queue in 0..2 {
        let mut f = fixture();
        f.drivers[queue].offer(&[Buffer::readable(0x50_0000, 4)]);
        let (inflate, deflate) = (f.drivers[0].device_side(0).0, f.drivers[1].device_side(1).0);
        let errors = Arc::clone(inflate.interrupt().shared());
        f.activate_with(&[], vec![inflate, deflate]).unwrap();
        assert_eq!(f.balloon.deactivate().len(), 2);
        assert!(errors.needs_reset(), "queue {queue}");
    }
}

#[test]
fn huge_pages_are_freed_when_the_balloon_has_all_of_one() {
    let mut f = fixture_with(HUGE, false, &options());
    assert_ne!(f.balloon.identity().features & 1 << F_MUST_TELL_HOST, 0);
    let all: Vec<u32> = (0x200..0x400).collect();
    let (first, rest) = all.split_at(256);
    let buffers = [f.frames(DATA, first), f.frames(DATA + 0x1000, rest)];
    f.drivers[0].offer(&buffers[..1]);
    f.activate(&[F_MUST_TELL_HOST], &[0, 1]).unwrap();
    f.wait_used(0, 1);
    // A pause does not forget what the balloon has.
    let queues = f.balloon.deactivate();
    f.drivers[0].offer(&buffers[1..]);
    f.activate_with(&[F_MUST_TELL_HOST], queues).unwrap();
    f.wait_used(0, 1);
    assert_eq!(f.freed(), [(HUGE, HUGE)]);
    // A driver that uses pages again without a word must not lose them.
    let queues = f.balloon.deactivate();
    f.drivers[0].offer(&buffers[..1]);
    f.activate_with(&[], queues).unwrap();
    f.wait_used(0, 1);
    let page = (HUGE, 256 * 4096);
    assert_eq!(f.freed(), [page], "the port decides about whole pages");
}

#[test]
fn reported_pages_are_freed_unless_they_are_poisoned() {
    for (features, poison, expected) in [
        (&[F_PAGE_REPORTING][..], 0xaa, true),
        (&[F_PAGE_REPORTING, F_PAGE_POISON], 0, true),
        (&[F_PAGE_REPORTING, F_PAGE_POISON], 0xaa, false),
    ] {
        let mut f = fixture();
        f.balloon.write_config(12, &u32::to_le_bytes(poison));
        let two = [
            Buffer::writable(0x20_0000, 0x20_0000),
            Buffer::writable(0x80_1000, 0x3000),
        ];
        f.drivers[4].offer(&two);
        f.activate(features, &[0, 1, 4]).unwrap();
        f.wait_used(4, 1);
        let freed = [(0x20_0000, 0x20_0000), (0x80_1000, 0x3000)];
        assert_eq!(f.freed(), if expected { &freed[..] } else { &[] });
        assert_eq!(f.balloon.counters().reported_bytes.get(), 0x20_3000);
        assert_eq!(f.config(12), poison);
    }
}

#[test]
fn queues_are_found_by_the_specifications_numbers_and_by_contiguous_ones() {
    let both = &[F_STATS_VQ, F_PAGE_REPORTING][..];
    let cases = [
        (both, &[0, 1, 2, 4][..], 4),
        (both, &[0, 1, 2, 3], 3),
        (&[F_PAGE_REPORTING], &[0, 1, 4], 4),
        (&[F_PAGE_REPORTING], &[0, 1, 2], 2),
    ];
    for (features, queues, reports) in cases {
        let mut f = fixture();
        f.drivers[reports].offer(&[Buffer::writable(0x20_0000, 0x1000)]);
        f.activate(features, queues).unwrap();
        f.wait_used(reports, 1);
        assert_eq!(f.freed(), [(0x20_0000, 0x1000)], "{queues:?}");
        assert_eq!(f.balloon.deactivate().len(), queues.len());
    }
}

#[test]
fn missing_queues_are_named() {
    let both = &[F_STATS_VQ, F_PAGE_REPORTING][..];
    let cases = [
        (&[][..], &[1][..], 0),
        (&[], &[0, 2], 1),
        (both, &[0, 1], 2),
        (both, &[0, 1, 2], 4),
    ];
    for (features, queues, missing) in cases {
        let error = fixture().activate(features, queues).unwrap_err();
        assert!(
            matches!(error, ActivationError::MissingQueue(index) if index == missing),
            "{queues:?}: {error}"
        );
    }
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_are_asked_for_and_read_each_time() {
    let mut f = fixture();
    let features = &[F_STATS_VQ];
    f.memory
        .write_slice(&stat(4, 111), GuestAddress(DATA))
        .unwrap();
    f.drivers[2].offer(&[Buffer::readable(DATA, 10)]);
    // Two buffers are one more than a driver may have; the second must wait for its turn.
    f.memory
        .write_slice(&stat(4, 222), GuestAddress(DATA + 16))
        .unwrap();
    f.drivers[2].offer(&[Buffer::readable(DATA + 16, 10)]);
    f.activate(features, &[0, 1, 2]).unwrap();
    let free = |f: &Fixture| f.handle.stats().and_then(|sample| sample.stats.free_bytes);
    wait("statistics", || free(&f) == Some(111));
    // The interval is a second.
    wait("the next statistics", || free(&f) == Some(222));
    assert_eq!(f.drivers[2].used(), [(0, 0)]);
    assert!(f.handle.stats().unwrap().age() < DEADLINE);
    // A paused device has given the buffer back: the next activation finds it again.
    let queues = f.balloon.deactivate();
    assert_eq!(queues[2].state().next_avail, 1);
    f.memory
        .write_slice(&stat(4, 333), GuestAddress(DATA + 16))
        .unwrap();
    f.activate_with(features, queues).unwrap();
    wait("statistics", || free(&f) == Some(333));
    f.balloon.deactivate();
    f.balloon.reset();
    assert_eq!(free(&f), None);
}

#[test]
fn target_is_announced_now_or_when_the_driver_runs() {
    let mut f = fixture();
    assert_eq!(f.handle.target_bytes(), 0x10_0000);
    assert_eq!(f.config(0), 0x100);
    f.activate(&[], &[0, 1]).unwrap();
    // The driver reads the first target by itself.
    assert_eq!(f.route.delivered().len(), 0);
    f.handle.set_target_bytes(0x20_0000).unwrap();
    f.handle.set_target_bytes(0x20_0000).unwrap();
    assert_eq!(f.route.delivered().len(), 1);
    assert_eq!(f.config(0), 0x200);
    let queues = f.balloon.deactivate();
    f.handle.set_target_bytes(0).unwrap();
    assert_eq!(f.route.delivered().len(), 1);
    f.activate_with(&[], queues).unwrap();
    assert_eq!(f.route.delivered().len(), 2);
}

#[test]
fn impossible_targets_are_refused() {
    let f = fixture();
    for (bytes, expected) in [
        (RAM_BYTES, "8388608 bytes of memory"),
        (1 << 60, "8388608 bytes of memory"),
        (u64::MAX - 4095, "8388608 bytes of memory"),
        (4097, "not a multiple"),
    ] {
        let error = f.handle.set_target_bytes(bytes).unwrap_err().to_string();
        assert!(
            error.contains(expected) && error.contains(&bytes.to_string()),
            "{error}"
        );
    }
    assert_eq!(f.handle.target_bytes(), 0x10_0000);
    let wrong = BalloonOptions {
        target_bytes: RAM_BYTES,
        ..options()
    };
    let reporter = Reporter::new(
        DeviceId::new("balloon").unwrap(),
        Arc::new(Sink(channel().0)),
    );
    assert!(Balloon::new(f.reclaim.clone(), &wrong, reporter).is_err());
}

#[test]
fn size_events_come_at_a_bounded_rate_and_end_with_the_last() {
    let mut f = fixture();
    f.activate(&[], &[0, 1]).unwrap();
    let start = Instant::now();
    for pages in 1..=0x100_u32 {
        f.balloon.write_config(4, &pages.to_le_bytes());
    }
    f.balloon.write_config(4, &[1]);
    f.balloon.write_config(5, &[0; 4]);
    assert_eq!(f.handle.actual_bytes(), 0x10_0000);
    assert_eq!(f.config(4), 0x100);
    let mut events = 0;
    loop {
        events += 1;
        let event = f.events.recv_timeout(DEADLINE).unwrap();
        let DeviceEvent::BalloonActual { bytes } = event else {
            panic!("{event:?}");
        };
        if bytes == 0x10_0000 {
            break;
        }
    }
    let intervals = start.elapsed().as_millis() / 200;
    assert!(events <= intervals + 2, "{events} events");
    // The last word is not lost when the device stops.
    f.balloon.write_config(4, &u32::MAX.to_le_bytes());
    f.balloon.deactivate();
    let last = f.events.try_iter().last();
    assert_eq!(last, Some(DeviceEvent::BalloonActual { bytes: RAM_BYTES }));
}

#[test]
fn hosts_errors_are_events_and_the_guest_goes_on() {
    let mut f = fixture_with(4096, true, &options());
    let frames: Vec<u32> = (0..40).map(|index| 0x200 + 2 * index).collect();
    let buffer = f.frames(DATA, &frames);
    f.drivers[0].offer(&[buffer]);
    f.activate(&[], &[0, 1]).unwrap();
    f.wait_used(0, 1);
    f.balloon.deactivate();
    assert_eq!(f.balloon.counters().errors.get(), 40);
    let events: Vec<_> = f.events.try_iter().collect();
    assert!((1..=10).contains(&events.len()), "{} events", events.len());
    assert!(matches!(
        &events[0],
        DeviceEvent::IoError {
            operation: "discard",
            offset: 0x20_0000,
            ..
        }
    ));
}

#[test]
fn features_follow_the_options() {
    let plain = BalloonOptions {
        ram_bytes: RAM_BYTES,
        ..BalloonOptions::default()
    };
    assert_eq!(
        fixture_with(4096, false, &plain)
            .balloon
            .identity()
            .features,
        0
    );
    assert_eq!(fixture().balloon.identity().features, 0b11_0110);
}

#[test]
fn state_round_trips_and_impossible_ones_are_refused() {
    let mut f = fixture();
    f.handle.set_target_bytes(0x30_0000).unwrap();
    f.balloon.write_config(4, &0x250_u32.to_le_bytes());
    f.balloon.write_config(12, &7_u32.to_le_bytes());
    let state = f.balloon.save().unwrap();
    let mut g = fixture();
    g.balloon.restore(&state).unwrap();
    assert_eq!(g.handle.target_bytes(), 0x30_0000);
    assert_eq!(g.handle.actual_bytes(), 0x25_0000);
    assert_eq!(g.config(12), 7);
    g.activate(&[], &[0, 1]).unwrap();
    assert_eq!(g.route.delivered().len(), 0, "the driver knows the target");
    g.balloon.deactivate();
    assert!(g.events.try_recv().is_err(), "the size is not news");

    let wire: BalloonStateV1 = state.decode("virtio-balloon", 1..=1).unwrap();
    for (field, bad) in [
        (
            "target_pages",
            BalloonStateV1 {
                target_pages: 0x801,
                ..wire.clone()
            },
        ),
        (
            "actual_pages",
            BalloonStateV1 {
                actual_pages: u32::MAX,
                ..wire
            },
        ),
    ] {
        let state = DeviceState::encode("virtio-balloon", 1, &bad).unwrap();
        let error = fixture().balloon.restore(&state).unwrap_err();
        assert!(
            matches!(error, RestoreError::InvalidField { field: at, .. } if at == field),
            "{error}"
        );
    }
}

#[test]
fn test_memory_has_the_hole_that_the_tests_rely_on() {
    let f = fixture();
    assert!(!f.memory.address_in_range(GuestAddress(0x40_0000)));
}
