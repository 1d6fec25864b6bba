//! Devices whose states come as streams.

use std::sync::Arc;
use std::time::Duration;

use migration::PageIndex;
use migration::destination::DestinationError;
use migration::handoff::Outcome;
use migration::source::{EncodingChoice, OnTimeout, SourceError};
use migration::testing::{DeviceFault, DevicePlan, FakeDevice, FaultKind};
use migration::wire::{DEVICES_VERSION, Versions};

use crate::good::beside_a_guest;
use crate::world::{End, Wiring, World, fill, new_handle, run};

const MIB: u64 = 1 << 20;

/// A machine with memory that takes several rounds, and these devices.
fn world_with(devices: &[(&str, DevicePlan)]) -> World {
    let mut world = World::small(true);
    attach(&mut world, devices);
    world
}

fn attach(world: &mut World, devices: &[(&str, DevicePlan)]) {
    let devices = devices.iter();
    let devices: Vec<_> = devices
        .map(|(id, plan)| FakeDevice::new(id, plan.clone()))
        .collect();
    world.host.devices.clone_from(&devices);
    world.machine.devices = devices;
}

fn stopped_only(at_stop: u64) -> DevicePlan {
    DevicePlan {
        at_stop,
        ..DevicePlan::default()
    }
}

fn precopied(before_stop: u64, at_stop: u64) -> DevicePlan {
    DevicePlan {
        at_stop,
        before_stop: Some(before_stop),
        ..DevicePlan::default()
    }
}

/// Devices with little state, for another try.
fn calm(world: &World) {
    for device in &world.machine.devices {
        *device.plan.lock().expect("no panic") = stopped_only(MIB);
    }
}

/// That each device was begun and let go so often, and nobody did what nobody may.
fn check_devices(world: &World, times: u32, what: &str) {
    for device in &world.machine.devices {
        let record = device.record();
        assert!(record.misdeeds.is_empty(), "{what}: {record:?}");
        assert_eq!((record.begun, record.ended), (times, times), "{what}");
    }
}

/// That all of their states are at the destination.
fn check_devices_arrived(world: &World, what: &str) {
    for device in &world.machine.devices {
        let record = device.record();
        assert_eq!(record.read, record.written, "{what}");
        assert_eq!(record.finished, 1, "{what}");
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<_> = causes.map(ToString::to_string).collect();
    texts.join(": ")
}

fn error_of(end: &End) -> String {
    chain(end.report.error.as_ref().expect("it has not moved"))
}

#[test]
fn states_of_all_sizes_arrive_intact_beside_memory_that_changes() {
    for streams in [1, 3, 4] {
        let mut world = World::new(&[run(0, 3000), run(10_000, 2000)], true);
        world.options.streams = streams;
        // However slow the machine is that this runs on.
        world.handle = new_handle(Duration::from_secs(10));
        let changing = DevicePlan {
            changes: 300_000,
            changing: 5,
            ..precopied(5 * MIB + 1, 2 * MIB)
        };
        attach(
            &mut world,
            &[
                ("gpu0", changing),
                ("gpu1", stopped_only(17 * MIB + 12_345)),
                ("gpu2", stopped_only(0)),
            ],
        );
        let pages: Vec<u64> = (0..3000).chain(10_000..12_000).collect();
        let guest = world.guest();
        for page in &pages {
            guest.write(PageIndex(*page), |bytes| fill(bytes, *page));
        }
        let end = beside_a_guest(&guest, &pages, Duration::from_micros(500), || {
            world.migrate(&Wiring::clean())
        });
        let what = format!("{streams} streams");
        world.check(&end, &what);
        assert_eq!(end.report.outcome, Outcome::Surrendered, "{what}");
        check_devices(&world, 1, &what);
        check_devices_arrived(&world, &what);
        let records: Vec<_> = world.machine.devices.iter().map(|d| d.record()).collect();
        assert!(records[0].read_before_stop > 5 * MIB, "{what}: {records:?}");
        assert!(records[0].read >= 7 * MIB, "{what}: {records:?}");
        assert_eq!(records[1].read, 17 * MIB + 12_345);
        assert_eq!(records[1].read_before_stop, 0);
        assert_eq!(records[2].read, 0);
        let read: u64 = records.iter().map(|record| record.read).sum();
        assert_eq!(end.report.device_bytes, read);
        let blackout = end.report.blackout.expect("it stood still");
        let last: u64 = records.iter().map(|r| r.read - r.read_before_stop).sum();
        assert_eq!(blackout.device_bytes, last, "{what}");
    }
}

/// A device does DMA until it is stopped, also when the vCPUs stand still.
#[test]
fn what_a_device_writes_until_it_stops_arrives() {
    let mut world = world_with(&[("gpu0", stopped_only(MIB))]);
    let guest = world.guest();
    world.machine.devices[0].before_stop(move || {
        guest.memory.change(PageIndex(7), |bytes| bytes.fill(0xda));
        guest.tracker.touch(PageIndex(7));
    });
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "DMA");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    let page = world.host.memory.as_ref().unwrap().page(PageIndex(7));
    assert_eq!(page.unwrap()[100], 0xda);
}

#[test]
fn a_large_state_is_never_in_memory_as_a_whole() {
    let mut world = world_with(&[("gpu0", stopped_only(256 * MIB))]);
    world.options.streams = 3;
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "256 MiB");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    check_devices_arrived(&world, "256 MiB");
    let most = world.machine.devices[0].record().most_on_the_way;
    // In the queue, at each connection's thread on either side, and on the wires.
    assert!(most <= (2 * 3 + 1 + 3 * 3 + 3) * 256 * 1024, "{most}");
}

#[test]
fn whatever_a_device_fails_at_the_source_goes_on() {
    let faults = [
        DeviceFault::Begin,
        DeviceFault::Left,
        DeviceFault::Read(0),
        DeviceFault::Read(MIB),
        DeviceFault::Read(3 * MIB),
        DeviceFault::Stop,
        DeviceFault::Write(0),
        DeviceFault::Write(2 * MIB),
        DeviceFault::Finish,
    ];
    for (streams, fault) in [1, 3].into_iter().flat_map(|n| faults.map(|f| (n, f))) {
        let what = format!("{fault:?} over {streams}");
        let broken = DevicePlan {
            fault: Some(fault),
            ..precopied(2 * MIB, 2 * MIB)
        };
        let mut world = world_with(&[
            ("gpu0", precopied(MIB, MIB)),
            ("gpu1", broken),
            ("gpu2", stopped_only(3 * MIB)),
        ]);
        world.options.streams = streams;
        let end = world.migrate(&Wiring::clean());
        world.check(&end, &what);
        let resumed = matches!(end.report.outcome, Outcome::Resumed(_));
        assert!(resumed, "{what}: {:?}", end.report.outcome);
        assert!(end.took < Duration::from_secs(30), "{what}: {:?}", end.took);
        let text = error_of(&end);
        assert!(text.contains("of gpu1 fails by the test"), "{what}: {text}");
        assert!(text.contains("the state of gpu1"), "{what}: {text}");
        match fault {
            // Those after it have not begun.
            DeviceFault::Begin => {
                let begun = world.machine.devices.iter().map(|d| d.record());
                let begun: Vec<_> = begun.map(|r| (r.begun, r.ended)).collect();
                assert_eq!(begun, [(1, 1), (1, 1), (0, 0)], "{what}");
            }
            _ => check_devices(&world, 1, &what),
        }
        calm(&world);
        world.retry(&what);
        check_devices_arrived(&world, &what);
    }
}

#[test]
fn devices_that_are_not_the_same_are_refused_with_all_reasons() {
    let mut world = world_with(&[("gpu0", stopped_only(1)), ("gpu1", stopped_only(1))]);
    let ours = world.host.devices.clone();
    world.host.devices = vec![
        FakeDevice::new("gpu1", DevicePlan::default()),
        FakeDevice::new("gpu2", DevicePlan::default()),
    ];
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "other devices");
    let Some(SourceError::Refused(reasons)) = &end.report.error else {
        panic!("{:?}", end.report.error);
    };
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons[0].contains("gpu0") && reasons[1].contains("gpu2"));
    check_devices(&world, 0, "refused");
    world.host.devices = ours;
    world.retry("other devices");
}

#[test]
fn two_devices_of_one_name_are_not_offered() {
    let twice = ("gpu0", stopped_only(1));
    let mut world = world_with(&[twice.clone(), twice]);
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "twice");
    assert!(matches!(end.report.error, Some(SourceError::Blocked(_))));
}

#[test]
fn a_destination_of_the_version_before_takes_machines_without_such_devices() {
    let older = Versions {
        oldest: DEVICES_VERSION - 1,
        newest: DEVICES_VERSION - 1,
    };
    let mut world = World::small(true);
    world.versions = older;
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "older");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    let mut world = world_with(&[("gpu0", stopped_only(1))]);
    world.versions = older;
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "older, with a device");
    let unknown =
        matches!(&end.report.error, Some(SourceError::DevicesUnknown(ids)) if ids == &["gpu0"]);
    assert!(unknown, "{:?}", end.report.error);
    world.versions = Versions::OURS;
    world.retry("older");
}

/// Cancelled while it is read, before the machine is stopped and after that.
#[test]
fn a_migration_is_cancelled_in_the_middle_of_a_state() {
    let slow = |plan: DevicePlan| DevicePlan {
        pause: Duration::from_millis(2),
        ..plan
    };
    for plan in [slow(precopied(1 << 40, 0)), slow(stopped_only(1 << 40))] {
        let what = format!("{plan:?}");
        let mut world = world_with(&[("gpu0", plan), ("gpu1", stopped_only(MIB))]);
        let device = Arc::clone(&world.machine.devices[0]);
        let handle = Arc::clone(&world.handle);
        let end = std::thread::scope(|scope| {
            scope.spawn(move || {
                while device.record().written < 4 * MIB {
                    std::thread::yield_now();
                }
                handle.cancel();
            });
            world.migrate(&Wiring::clean())
        });
        world.check(&end, &what);
        assert!(matches!(end.report.error, Some(SourceError::Cancelled)));
        assert!(end.took < Duration::from_secs(30), "{what}");
        check_devices(&world, 1, &what);
        calm(&world);
        world.retry(&what);
    }
}

#[test]
fn a_destination_that_gives_up_in_the_middle_of_a_state_is_heard() {
    let slow = DevicePlan {
        pause: Duration::from_millis(2),
        ..stopped_only(1 << 40)
    };
    let mut world = world_with(&[("gpu0", slow)]);
    let device = Arc::clone(&world.machine.devices[0]);
    let cancelled = Arc::clone(&world.destination_cancelled);
    let end = std::thread::scope(|scope| {
        scope.spawn(move || {
            while device.record().written < 4 * MIB {
                std::thread::yield_now();
            }
            cancelled.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        world.migrate(&Wiring::clean())
    });
    world.check(&end, "destination cancels");
    assert!(
        matches!(end.report.error, Some(SourceError::Peer(_))),
        "{}",
        error_of(&end)
    );
    assert!(matches!(end.received, Err(DestinationError::Cancelled)));
    assert!(end.took < Duration::from_secs(30), "{:?}", end.took);
    check_devices(&world, 1, "destination cancels");
}

/// A link of 10 MB/s, and a state that takes a second.
fn too_large(on_timeout: OnTimeout, plan: DevicePlan) -> World {
    let mut world = world_with(&[("gpu0", stopped_only(1000)), ("gpu1", plan)]);
    world.options.on_timeout = on_timeout;
    world.options.timeout = Duration::from_millis(600);
    world.options.encoding = EncodingChoice::Raw;
    let handle = new_handle(Duration::from_millis(100));
    handle.retune(|tuning| tuning.bandwidth_bytes_per_s = Some(10_000_000));
    world.handle = handle;
    world
}

#[test]
fn a_state_that_takes_too_long_is_named_before_the_machine_is_stopped() {
    let mut world = too_large(OnTimeout::Cancel, stopped_only(10_000_000));
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "too large");
    let error = end.report.error.as_ref().expect("it has not moved");
    let SourceError::DeviceTooLarge { id, bytes, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!((id.as_str(), *bytes), ("gpu1", 10_000_000));
    let text = error.to_string();
    for part in ["100 ms", "gpu1 has 10000000 bytes", "10 MB/s", "1000 ms"] {
        assert!(text.contains(part), "{part:?} in {text:?}");
    }
    assert!(end.report.blackout.is_none());
    // Nobody waits for long for what does not change.
    assert_eq!(end.report.rounds.len(), 3);
    check_devices(&world, 1, "too large");
    world.retry("too large");
}

#[test]
fn a_state_that_takes_too_long_is_sent_all_the_same_where_that_is_forced() {
    let mut world = too_large(OnTimeout::Force, stopped_only(10_000_000));
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "forced");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(end.took >= Duration::from_millis(1500), "{:?}", end.took);
    let predicted = end.report.predicted_blackout.expect("it was predicted");
    let around = Duration::from_millis(1000)..Duration::from_millis(1200);
    assert!(around.contains(&predicted), "{predicted:?}");
    check_devices_arrived(&world, "forced");
}

#[test]
fn in_a_post_copy_states_travel_while_the_machine_stands_still() {
    let mut world = too_large(OnTimeout::Postcopy, stopped_only(2_000_000));
    let end = crate::postcopy::migrate(&mut world, &Wiring::clean());
    crate::postcopy::check(&world, &end, "post-copy");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    let blackout = end.report.blackout.expect("it stood still");
    assert_eq!(blackout.device_bytes, 2_001_000);
    check_devices(&world, 1, "post-copy");
    check_devices_arrived(&world, "post-copy");
}

/// What can be read before makes the blackout short enough.
#[test]
fn the_machine_is_stopped_once_what_is_left_fits() {
    let mut world = too_large(OnTimeout::Cancel, precopied(6_000_000, 1000));
    world.options.timeout = Duration::from_secs(10);
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "shrinks");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    let blackout = end.report.blackout.expect("it stood still");
    assert_eq!(blackout.device_bytes, 2000);
    let before: u64 = end.report.rounds.iter().map(|r| r.device_bytes).sum();
    assert_eq!(before, 6_000_000);
}

#[test]
fn a_device_that_is_not_ready_holds_the_stop_up_as_long_as_it_is_not_late() {
    let never = DevicePlan {
        is_never_ready: true,
        ..precopied(1000, 1000)
    };
    let mut world = too_large(OnTimeout::Cancel, never.clone());
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "never ready");
    let error = end.report.error.as_ref().expect("it has not moved");
    let named = matches!(error, SourceError::DeviceNotReady { id, bytes: 1, .. } if id == "gpu1");
    assert!(named, "{error:?}");
    // It is looked at now and then, not all the time.
    assert!(
        (2..30).contains(&end.report.rounds.len()),
        "{}",
        end.report.rounds.len()
    );
    calm(&world);
    world.retry("never ready");
    let mut world = too_large(OnTimeout::Force, never);
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "never ready, forced");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(end.took >= Duration::from_millis(600), "{:?}", end.took);
}

/// A connection that breaks takes state with it that cannot be read again.
#[test]
fn a_connection_that_breaks_with_state_on_it_ends_the_migration() {
    for kind in [FaultKind::Cut, FaultKind::Reject] {
        for frame in [5, 15] {
            let what = format!("{kind:?} at frame {frame}");
            let mut world = world_with(&[("gpu0", precopied(4 * MIB, 5 * MIB))]);
            world.handle = new_handle(Duration::from_secs(10));
            let mut wiring = Wiring::clean();
            // Which of them takes how much nobody knows.
            for (there, _) in &mut wiring.data[..2] {
                there.fault = Some(migration::testing::Fault {
                    frame,
                    offset: 100,
                    kind,
                });
            }
            let end = world.migrate(&wiring);
            world.check(&end, &what);
            let resumed = matches!(end.report.outcome, Outcome::Resumed(_));
            assert!(resumed, "{what}: {:?}", end.report.outcome);
            assert!(end.took < Duration::from_secs(30), "{what}: {:?}", end.took);
            let text = error_of(&end);
            assert!(text.contains("data connection "), "{what}: {text}");
            check_devices(&world, 1, &what);
            calm(&world);
            world.retry(&what);
        }
    }
}

/// One that has carried none is opened again, as ever.
#[test]
fn a_connection_that_breaks_before_any_state_was_on_it_is_opened_again() {
    let mut world = world_with(&[("gpu0", stopped_only(MIB))]);
    let mut wiring = Wiring::clean();
    wiring.data[1].0.fault = Some(migration::testing::Fault {
        frame: 1,
        offset: 10,
        kind: FaultKind::Cut,
    });
    let end = world.migrate(&wiring);
    world.check(&end, "opened again");
    assert_eq!(
        end.report.outcome,
        Outcome::Surrendered,
        "{}",
        error_of(&end)
    );
    check_devices_arrived(&world, "opened again");
}

/// It has more to do than a machine without devices.
#[test]
fn a_device_may_take_its_time_to_take_its_state_over() {
    let patience = Duration::from_millis(600);
    let plan = DevicePlan {
        finishing: patience * 2,
        ..stopped_only(MIB)
    };
    let mut world = world_with(&[("gpu0", plan)]);
    world.set_patience(patience);
    let end = world.migrate(&Wiring::clean());
    assert_eq!(end.report.outcome, Outcome::Surrendered, "{:?}", end.report);
    check_devices_arrived(&world, "slow");
}
