//! Whether a machine could be moved, found out without moving it.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use migration::PageIndex;
use migration::destination::{DestinationError, DestinationOptions, receive};
use migration::handoff::Outcome;
use migration::ports::{Channel, Dial};
use migration::source::{CheckReport, Objection, OnTimeout, Parts, Prospect, SourceError, check};
use migration::testing::{DevicePlan, FakeDevice, Fault, FaultKind, Wire, network, pair};
use migration::wire::message::{Attach, Hello, MAGIC, Offer, Prepare, Welcome};
use migration::wire::{FrameReader, Message, Versions};

use crate::good::beside_a_guest;
use crate::world::{PATIENCE, Wiring, World, fill, new_handle, run};

/// Memory of `pages` pages that hold something.
fn filled(pages: u64) -> World {
    let world = World::new(&[run(0, pages)], true);
    let guest = world.guest();
    for page in 0..pages {
        guest.write(PageIndex(page), |bytes| fill(bytes, page));
    }
    world
}

/// That the destination was told in the end that this was all.
fn assert_told(error: &DestinationError) {
    let is_told = |end: &DestinationError| matches!(end, DestinationError::Peer(_));
    assert!(
        matches!(error, DestinationError::Checked(end) if is_told(end)),
        "{error}: {:?}",
        error.source()
    );
}

fn limited(world: &mut World, bytes_per_s: u64) {
    world.handle.retune(|tuning| {
        tuning.bandwidth_bytes_per_s = Some(bytes_per_s);
    });
}

fn objections(report: &CheckReport) -> Vec<String> {
    report.objections.iter().map(ToString::to_string).collect()
}

#[test]
fn idle_machine_would_move_and_then_does() {
    let mut world = filled(2000);
    let (report, destination) = world.look_ahead(&Wiring::clean());
    assert!(report.would_move(), "{report:?}");
    assert_told(&destination);
    let sample = report.sample.unwrap();
    assert_eq!(sample.used_bytes, 2000 * 4096);
    assert_eq!(sample.dirty_bytes_per_s, 0);
    assert!(sample.link_bytes_per_s.is_some());
    let forecast = report.forecast.unwrap();
    assert_eq!((forecast.rounds, forecast.cpu_percent), (1, 100));
    assert!(forecast.blackout <= Duration::from_millis(300));
    world.retry("a check");
}

#[test]
fn guest_computes_on_and_what_it_writes_is_counted() {
    let mut world = filled(1000);
    let guest = world.guest();
    let pages: Vec<u64> = (0..200).collect();
    let (report, _) = beside_a_guest(&guest, &pages, Duration::from_micros(200), || {
        world.look_ahead(&Wiring::clean())
    });
    let sample = report.sample.unwrap();
    let seen = sample.dirty_bytes_per_s / 4096;
    // At most all that it writes to, in some 300 ms.
    assert!((50..=1000).contains(&seen), "{seen}");
}

#[test]
fn all_reasons_of_both_sides_are_named_together() {
    let mut world = filled(10);
    world.machine.blockers = vec!["gpu0: no state".to_owned(), "fs0: shared".to_owned()];
    world.host.refusals = vec!["no avx512".to_owned(), "no disk0".to_owned()];
    let (report, destination) = world.look_ahead(&Wiring::clean());
    assert_eq!(report.blockers, ["gpu0: no state", "fs0: shared"]);
    assert_eq!(report.refusals, ["no avx512", "no disk0"]);
    assert!(!report.would_move() && report.error.is_none());
    let DestinationError::Checked(end) = destination else {
        panic!("{destination}");
    };
    assert!(matches!(*end, DestinationError::Refused(_)), "{end}");
    // The destination has nothing against it.
    world.host.refusals.clear();
    let (report, destination) = world.look_ahead(&Wiring::clean());
    assert_eq!((report.blockers.len(), report.refusals.len()), (2, 0));
    assert!(!report.would_move() && report.sample.is_none());
    assert_told(&destination);
    world.retry("two checks");
}

#[test]
fn slow_link_is_told_in_time_and_rate() {
    let mut world = filled(5000);
    limited(&mut world, 4 << 20);
    let (report, _) = world.look_ahead(&Wiring::clean());
    let rate = report.sample.as_ref().unwrap().link_bytes_per_s.unwrap();
    assert!((1 << 20..8 << 20).contains(&rate), "{rate}");
    let forecast = report.forecast.unwrap();
    assert!(forecast.total > Duration::from_millis(500), "{forecast:?}");
    world.options.timeout = Duration::from_millis(100);
    let (report, destination) = world.look_ahead(&Wiring::clean());
    assert_eq!(report.forecast.unwrap().prospect, Prospect::FirstRound);
    let text = objections(&report).join("\n");
    let start = "memory would not be sent once within 0.1 s: 19 MiB are in use, which take some ";
    assert!(text.starts_with(start), "{text}");
    assert_told(&destination);
}

#[test]
fn guest_that_writes_faster_than_the_link_does_not_converge() {
    let mut world = filled(2000);
    world.handle = new_handle(Duration::from_millis(20));
    // All of it once takes 15 s; the guest writes that in far less than a twentieth of a second.
    limited(&mut world, 1 << 19);
    let guest = world.guest();
    let pages: Vec<u64> = (0..2000).collect();
    let look = |world: &mut World| {
        beside_a_guest(&guest, &pages, Duration::ZERO, || {
            world.look_ahead(&Wiring::clean()).0
        })
    };
    let report = look(&mut world);
    assert!(!report.would_move());
    let [Objection::Diverges { .. }] = &report.objections[..] else {
        panic!("{report:?}");
    };
    let text = objections(&report).join("");
    assert!(text.starts_with("it would not converge within 20 s: the guest changes "));
    world.options.on_timeout = OnTimeout::Postcopy;
    let report = look(&mut world);
    assert!(report.would_move(), "{report:?}");
    world.options.on_timeout = OnTimeout::Force;
    let report = look(&mut world);
    let [Objection::Blackout { .. }] = &report.objections[..] else {
        panic!("{report:?}");
    };
}

#[test]
fn devices_are_begun_let_go_and_counted_but_not_read() {
    let mut world = filled(2000);
    let plan = DevicePlan {
        at_stop: 300 << 20,
        before_stop: Some(1 << 20),
        ..DevicePlan::default()
    };
    let device = FakeDevice::new("gpu0", plan);
    world.host.devices = vec![device.clone()];
    world.machine.devices = vec![device.clone()];
    limited(&mut world, 100 << 20);
    let (report, destination) = world.look_ahead(&Wiring::clean());
    assert_told(&destination);
    let record = device.record();
    assert!(record.misdeeds.is_empty(), "{record:?}");
    assert_eq!((record.begun, record.ended), (1, 1));
    assert_eq!((record.read, record.finished), (0, 0));
    let sample = report.sample.as_ref().unwrap();
    assert!(sample.device_bytes >= 300 << 20, "{sample:?}");
    assert!(report.forecast.unwrap().blackout > Duration::from_secs(1));
    let text = objections(&report).join("\n");
    assert!(text.contains("the state of gpu0 has "), "{text}");
    // It is no part of the destination's machine.
    world.host.devices.clear();
    let (report, _) = world.look_ahead(&Wiring::clean());
    assert!(report.refusals.join("").contains("gpu0"), "{report:?}");
    world.host.devices = vec![device.clone()];
    world.handle = new_handle(Duration::from_secs(10));
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "after checks");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
}

#[test]
fn link_that_breaks_and_log_that_fails_are_told_and_leave_nothing_behind() {
    let mut world = filled(2000);
    world.machine.guest.tracker.set_start_fails(true);
    let (report, destination) = world.look_ahead(&Wiring::clean());
    assert!(matches!(report.error, Some(SourceError::Port(_))));
    assert_told(&destination);
    world.machine.guest.tracker.set_start_fails(false);
    let mut wiring = Wiring::clean();
    // Within the pages.
    wiring.data[0].0.fault = Some(Fault {
        frame: 3,
        offset: 10,
        kind: FaultKind::Cut,
    });
    let (report, _) = world.look_ahead(&wiring);
    assert!(report.error.is_some() && !report.would_move());
    world.handle = new_handle(Duration::from_millis(300));
    world.handle.cancel();
    let (report, _) = world.look_ahead(&Wiring::clean());
    assert!(matches!(report.error, Some(SourceError::Cancelled)));
    world.retry("checks that have failed");
}

/// A build that takes every offer for a machine that is to come.
#[test]
fn destination_that_does_not_know_of_checks_is_offered_nothing() {
    let mut world = filled(10);
    let (ours, mut theirs) = pair(Wire::default(), Wire::default());
    let (mut dial, _accept) = network(None, Box::new(|_| Default::default()));
    let tracker = Arc::clone(&world.machine.guest.tracker);
    let memory = Arc::clone(&world.machine.guest.memory);
    let mut parts = Parts {
        machine: &mut world.machine,
        pages: &*memory,
        tracker: &*tracker,
    };
    let (report, after) = std::thread::scope(|scope| {
        let peer = scope.spawn(move || {
            theirs.set_timeout(PATIENCE).expect("any time is good");
            let mut reader = FrameReader::default();
            let hello = Message::receive(&mut reader, &mut theirs);
            assert!(matches!(hello, Ok(Message::Hello(_))), "{hello:?}");
            let welcome = Message::Welcome(Welcome {
                version: Versions::OURS.newest,
                token: b"a token".to_vec(),
                data_url: None,
                checks: false,
            });
            welcome.send(&mut theirs).expect("it is read");
            Message::receive(&mut reader, &mut theirs)
        });
        let (options, handle) = (&world.options, &world.handle);
        let report = check(&mut parts, Box::new(ours), &mut dial, options, handle);
        (report, peer.join().expect("no panic"))
    });
    assert!(matches!(report.error, Some(SourceError::ChecksUnknown)));
    assert!(after.is_err(), "{after:?}");
}

/// Whatever else is said in a check, the machine does not come.
#[test]
fn source_that_goes_on_after_a_check_gives_nothing_away() {
    let mut world = filled(10);
    let (mut control, theirs) = pair(Wire::default(), Wire::default());
    let (mut dial, mut accept) = network(None, Box::new(|_| Default::default()));
    let options = DestinationOptions {
        versions: Versions::OURS,
        token: b"a token".to_vec(),
        patience: PATIENCE,
        max_streams: 4,
        linger: PATIENCE,
    };
    let host = &mut world.host;
    let received = std::thread::scope(|scope| {
        let received = scope.spawn(move || {
            let cancelled = AtomicBool::new(false);
            receive(Box::new(theirs), &mut accept, host, &options, &cancelled)
        });
        control.set_timeout(PATIENCE).expect("any time is good");
        let mut reader = FrameReader::default();
        let hello = Message::Hello(Hello {
            magic: MAGIC.to_owned(),
            oldest: Versions::OURS.oldest,
            newest: Versions::OURS.newest,
        });
        hello.send(&mut control).expect("it is read");
        let welcome = Message::receive(&mut reader, &mut control);
        assert!(matches!(welcome, Ok(Message::Welcome(found)) if found.checks));
        let offer = Message::Offer(Offer {
            skeleton: b"machine".to_vec(),
            regions: vec![(0, 10)],
            streams: 1,
            postcopy: false,
            devices: vec![],
            check: true,
        });
        offer.send(&mut control).expect("it is read");
        let accepted = Message::receive(&mut reader, &mut control);
        assert!(matches!(accepted, Ok(Message::Accept)), "{accepted:?}");
        let mut data = dial.dial(None, &|| false).expect("it is waited for");
        let token = b"a token".to_vec();
        let attach = Message::Attach(Attach { token, index: 0 });
        attach.send(&mut data).expect("it is read");
        Message::StreamEnd.send(&mut data).expect("it is read");
        let prepare = Message::Prepare(Prepare { sections: 0 });
        prepare.send(&mut control).expect("it is read");
        let answer = Message::receive(&mut reader, &mut control);
        assert!(matches!(answer, Ok(Message::Abort(_))), "{answer:?}");
        received.join().expect("no panic")
    });
    let Err(DestinationError::Checked(end)) = received else {
        panic!("it was taken for a migration");
    };
    assert!(matches!(*end, DestinationError::Protocol(_)), "{end}");
    assert_eq!(world.copies.destination_starts(), 0);
}
