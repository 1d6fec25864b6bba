//! Snapshots of a fake machine whose guest writes meanwhile.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use migration::ports::{PageStore, PortError};
use migration::snapshot::{Image, TakeError, TakeOptions, Taken, take};
use migration::source::Parts;
use migration::testing::machine::Guest;
use migration::testing::{Copies, DeviceFault, DevicePlan, FakeDevice};
use migration::testing::{Failures, FakeDisk, FakeMachine, FakeMemory, Side, Step};
use migration::{PageIndex, PageRun, Section};

const PAGE: usize = 4096;
const PAGES: usize = 600;

const OPTIONS: TakeOptions = TakeOptions {
    max_downtime: Duration::from_millis(20),
    patience: Duration::from_secs(5),
};

/// An image in memory that can be full.
struct Files {
    bytes: Vec<u8>,
    devices: [Vec<u8>; 2],
    room: usize,
    written: usize,
}

impl Files {
    fn new() -> Self {
        Self {
            bytes: vec![0; PAGES * PAGE],
            devices: [const { Vec::new() }; 2],
            room: usize::MAX,
            written: 0,
        }
    }
}

impl Files {
    fn take_room(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        match self.written > self.room {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

impl Image for Files {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.take_room(bytes)?;
        let at = usize::try_from(offset).expect("it is short");
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn append(&mut self, device: usize, bytes: &[u8]) -> io::Result<()> {
        self.take_room(bytes)?;
        self.devices[device].extend_from_slice(bytes);
        Ok(())
    }
}

struct World {
    machine: FakeMachine,
    copies: Copies,
    failures: Failures,
}

fn world() -> World {
    let (copies, failures) = (Copies::default(), Failures::default());
    let regions = [(0, 500), (10_000, 100)];
    let regions =
        regions.map(|(start, count)| PageRun::new(PageIndex(start), count).expect("pages"));
    let memory = FakeMemory::with_regions(regions.to_vec());
    let mut machine = FakeMachine::new(memory, &FakeDisk::new(true), &copies, &failures);
    machine.sections = vec![Section {
        id: "vcpu0".to_owned(),
        kind: "vcpu".to_owned(),
        version: 1,
        bytes: vec![1, 2, 3],
    }];
    World {
        machine,
        copies,
        failures,
    }
}

impl World {
    fn guest(&self) -> Guest {
        self.machine.guest.clone()
    }

    fn take(&mut self, image: &mut Files) -> Result<Taken, TakeError> {
        self.take_with(image, &mut || Ok(()), &|| false)
    }

    fn take_with(
        &mut self,
        image: &mut Files,
        settle: &mut dyn FnMut() -> Result<(), PortError>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Taken, TakeError> {
        let guest = self.guest();
        let mut parts = Parts {
            machine: &mut self.machine,
            pages: &*guest.memory,
            tracker: &*guest.tracker,
        };
        take(&mut parts, image, settle, cancelled, &OPTIONS)
    }

    /// It runs at full speed, with nothing logged.
    fn check_runs(&self) {
        let guest = self.guest();
        assert!(!guest.tracker.is_logging());
        assert_eq!(guest.percent(), 100);
        assert!(
            guest.write(PageIndex(0), |page| page[0] = 1),
            "stands still"
        );
        assert!(self.copies.runs(Side::Source));
    }
}

/// All memory in the image's order.
fn memory(guest: &Guest) -> Vec<u8> {
    let mut bytes = Vec::new();
    for region in guest.memory.regions() {
        for page in region.start.0..region.end().0 {
            let page = guest.memory.page(PageIndex(page));
            bytes.extend(page.unwrap_or_else(|| vec![0; PAGE]));
        }
    }
    bytes
}

#[test]
fn image_is_memory_as_it_was_when_the_machine_stood_still() {
    for seed in 0..20_u64 {
        let mut world = world();
        let guest = world.guest();
        for page in (0..400).chain(10_050..10_060) {
            guest.write(PageIndex(page), |bytes| bytes.fill(7));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let (guest, stop) = (guest.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut state = seed | 1;
                while !stop.load(Ordering::Relaxed) {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let page = PageIndex(state >> 33 & 0x1ff).0 % 500;
                    match state >> 60 {
                        0 => guest.discard(PageIndex(page)),
                        1 => guest.write(PageIndex(10_000 + page % 100), |bytes| bytes.fill(0)),
                        _ => guest.write(PageIndex(page), |bytes| {
                            let at = usize::try_from(state >> 40).unwrap() % PAGE;
                            bytes[at] = bytes[at].wrapping_add(1);
                        }),
                    };
                    std::thread::sleep(Duration::from_micros(20));
                }
            })
        };
        let mut image = Files::new();
        let mut then = Vec::new();
        let settled = guest.clone();
        let mut settle = || {
            then = memory(&settled);
            Ok(())
        };
        let taken = world.take_with(&mut image, &mut settle, &|| false).unwrap();
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        let differs = image.bytes.chunks(PAGE).zip(then.chunks(PAGE));
        let differs = differs.zip(0..).find(|((image, then), _)| image != then);
        assert_eq!(differs.map(|(_, page)| page), None, "seed {seed}");
        for (chunk, index) in image.bytes.chunks(16 * PAGE).zip(0..) {
            taken.checks.verify(index, chunk).unwrap();
        }
        assert_eq!(taken.skeleton, b"fake machine");
        assert_eq!(taken.sections, world.machine.sections);
        world.check_runs();
    }
}

#[test]
fn untouched_memory_is_not_written() {
    let mut world = world();
    world.guest().write(PageIndex(3), |bytes| bytes.fill(1));
    world.guest().write(PageIndex(9), |bytes| bytes.fill(0));
    let mut image = Files::new();
    let taken = world.take(&mut image).unwrap();
    assert_eq!((image.written, taken.written_bytes), (PAGE, 4096));
    taken.checks.verify(0, &image.bytes[..16 * PAGE]).unwrap();
    taken.checks.verify_zero(1, 16).unwrap();
}

#[test]
fn full_image_is_an_error_and_the_machine_goes_on() {
    for pages in [0, 1, 100, 399] {
        let mut world = world();
        for page in 0..400 {
            world.guest().write(PageIndex(page), |bytes| bytes.fill(7));
        }
        let mut image = Files::new();
        image.room = pages * PAGE;
        let error = world.take(&mut image).unwrap_err();
        assert!(matches!(error, TakeError::Image(_)), "{error}");
        world.check_runs();
    }
}

#[test]
fn every_failure_lets_the_machine_go_on() {
    for step in [Step::Skeleton, Step::Pause, Step::Save] {
        let mut world = world();
        world.failures.add(step);
        let error = world.take(&mut Files::new()).unwrap_err();
        assert!(matches!(error, TakeError::Port(_)), "{step:?}: {error}");
        world.check_runs();
    }
    let mut world = world();
    let refusal = || PortError::Machine {
        what: "disks",
        source: "full".into(),
    };
    let error = world.take_with(&mut Files::new(), &mut || Err(refusal()), &|| false);
    assert_eq!(error.unwrap_err().to_string(), "disks");
    world.check_runs();
    world.machine.blockers = vec!["disk0: it is no good".to_owned()];
    let error = world.take(&mut Files::new()).unwrap_err();
    let expected = "the VM's state cannot be saved: disk0: it is no good";
    assert_eq!(error.to_string(), expected);
    world.check_runs();
}

/// One that is read while the machine runs, too, and one that is not.
fn with_devices(plan: DevicePlan) -> (World, [Arc<FakeDevice>; 2]) {
    let mut world = world();
    let early = DevicePlan {
        at_stop: 300_000,
        before_stop: Some(5_000_000),
        changes: 10_000,
        changing: 3,
        ..plan
    };
    let late = DevicePlan {
        at_stop: 3_000_000,
        ..DevicePlan::default()
    };
    let devices = [("gpu0", early), ("gpu1", late)].map(|(id, plan)| FakeDevice::new(id, plan));
    world.machine.devices = devices.to_vec();
    (world, devices)
}

#[test]
fn devices_are_read_in_full_and_write_to_memory_until_they_stop() {
    let (mut world, devices) = with_devices(DevicePlan::default());
    let guest = world.guest();
    devices[1].before_stop(move || {
        guest.memory.change(PageIndex(77), |page| page.fill(9));
        guest.tracker.touch(PageIndex(77));
    });
    let mut image = Files::new();
    let taken = world.take(&mut image).unwrap();
    assert!(
        image.bytes[77 * PAGE..78 * PAGE]
            .iter()
            .all(|byte| *byte == 9)
    );
    for ((device, state), record) in devices.iter().zip(&image.devices).zip(&taken.devices) {
        device.sink().write(state).unwrap();
        let seen = device.record();
        assert_eq!(
            (seen.begun, seen.ended, seen.read),
            (1, 1, state.len() as u64)
        );
        assert!(!seen.is_stopped);
        assert_eq!(seen.misdeeds, [""; 0]);
        assert_eq!(record.bytes, state.len() as u64);
        assert_eq!(record.check, crc32fast::hash(state));
    }
    let [early, late] = devices.map(|device| device.record());
    assert!(
        early.read_before_stop >= 5_000_000 && early.read >= 5_310_000,
        "{early:?}"
    );
    assert_eq!((late.read_before_stop, late.read), (0, 3_000_000));
    let rest = early.read - early.read_before_stop + late.read;
    assert_eq!(taken.still.device_bytes, rest);
    world.check_runs();
}

#[test]
fn a_device_that_fails_lets_the_machine_go_on() {
    let faults = [
        DeviceFault::Begin,
        DeviceFault::Left,
        DeviceFault::Read(70_000),
        DeviceFault::Stop,
    ];
    for fault in faults {
        let (mut world, devices) = with_devices(DevicePlan {
            fault: Some(fault),
            ..DevicePlan::default()
        });
        let error = world.take(&mut Files::new()).unwrap_err();
        assert!(
            matches!(&error, TakeError::Device { device, .. } if device == "gpu0"),
            "{fault:?}: {error}"
        );
        for device in devices {
            let seen = device.record();
            assert_eq!(seen.begun, seen.ended, "{fault:?}");
            assert!(!seen.is_stopped, "{fault:?}");
            assert_eq!(seen.misdeeds, [""; 0]);
        }
        world.check_runs();
    }
    // Memory has room, a device's state has none.
    let (mut world, devices) = with_devices(DevicePlan::default());
    let mut image = Files::new();
    image.room = 6_000_000;
    let error = world.take(&mut image).unwrap_err();
    let expected = "the state of gpu1 cannot be written to the snapshot";
    assert_eq!(error.to_string(), expected);
    assert!(devices.iter().all(|device| device.record().ended == 1));
    world.check_runs();
}

#[test]
fn machine_that_cannot_be_resumed_is_told() {
    let mut world = world();
    world.failures.add(Step::Resume);
    let error = world.take(&mut Files::new()).unwrap_err();
    assert!(matches!(error, TakeError::NotResumed(_)), "{error}");
    assert!(!world.guest().tracker.is_logging());
}

#[test]
fn cancelled_snapshot_ends_and_the_machine_goes_on() {
    let mut world = world();
    for page in 0..500 {
        world.guest().write(PageIndex(page), |bytes| bytes.fill(7));
    }
    let asked = AtomicU64::new(0);
    let cancelled = || asked.fetch_add(1, Ordering::Relaxed) >= 1;
    // Two regions, so that it is asked twice in a round.
    world
        .guest()
        .write(PageIndex(10_000), |bytes| bytes.fill(7));
    let error = world.take_with(&mut Files::new(), &mut || Ok(()), &cancelled);
    assert!(matches!(error.unwrap_err(), TakeError::Cancelled));
    world.check_runs();
}

#[test]
fn log_that_cannot_be_read_makes_all_pages_be_written_again() {
    let mut world = world();
    for page in 0..400 {
        world.guest().write(PageIndex(page), |bytes| bytes.fill(7));
    }
    world.guest().tracker.set_broken(true);
    let mut image = Files::new();
    world.take(&mut image).unwrap();
    assert!(image.bytes == memory(&world.guest()));
    world.check_runs();
}
