//! Hosts and machines that fail.

use std::io::{Read, Write};
use std::time::Duration;

use migration::destination::DestinationError;
use migration::handoff::{Cause, Doubt, Outcome, Reason};
use migration::source::{Parts, SourceError, migrate};
use migration::testing::{Side, Step, Wire, network, pair};

use crate::world::{Wiring, World};

#[test]
fn all_reasons_of_a_refusal_arrive() {
    let mut world = World::small(true);
    let reasons = ["no /dev/vfio", "the CPU lacks avx512", "disk0 is missing"];
    world.host.refusals = reasons.map(str::to_owned).to_vec();
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "refused");
    match &end.report.error {
        Some(SourceError::Refused(found)) => assert_eq!(*found, reasons),
        other => panic!("{other:?}"),
    }
    world.retry("refused");
}

/// Some other server: a banner, an answer, or a TLS alert, which is shorter than a header.
#[test]
fn what_speaks_another_protocol_is_told_from_a_damaged_frame() {
    let answers: [&[u8]; 3] = [
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        &[0x15, 3, 3, 0, 2, 2, 50],
    ];
    for answer in answers {
        let mut world = World::small(true);
        let (ours, mut theirs) = pair(Wire::default(), Wire::default());
        let server = std::thread::spawn(move || {
            theirs.read_exact(&mut [0; 16])?;
            theirs.write_all(answer)
        });
        let (mut dial, _accept) = network(None, Box::new(|_| Default::default()));
        let (memory, tracker) = (world.guest().memory, world.guest().tracker);
        let mut parts = Parts {
            machine: &mut world.machine,
            pages: &*memory,
            tracker: &*tracker,
        };
        let (options, handle) = (&world.options, &world.handle);
        let report = migrate(&mut parts, Box::new(ours), &mut dial, options, handle);
        server.join().unwrap().unwrap();
        let error = report.error.expect("nothing has moved");
        assert!(matches!(error, SourceError::NotDrover(_)), "{error:?}");
        assert!(error.to_string().contains("is not Drover"), "{error}");
        assert!(matches!(report.outcome, Outcome::Resumed(_)));
    }
}

#[test]
fn memory_of_another_shape_is_refused() {
    let mut world = World::small(true);
    let other = World::new(&[crate::world::run(0, 70)], true);
    let host = std::mem::replace(&mut world.host, other.host);
    let end = world.migrate(&Wiring::clean());
    assert!(matches!(end.report.error, Some(SourceError::Refused(_))));
    world.host = host;
    world.retry("refused for its memory");
}

#[test]
fn too_many_streams_are_refused() {
    let mut world = World::small(true);
    world.options.streams = 9;
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "9 streams");
    assert!(matches!(end.report.error, Some(SourceError::Refused(_))));
}

#[test]
fn blockers_are_told_before_anything_is_sent() {
    let mut world = World::small(true);
    world.machine.blockers = vec!["gpu0 cannot be moved".to_owned()];
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "blocked");
    match &end.report.error {
        Some(SourceError::Blocked(found)) => assert_eq!(found.len(), 1),
        other => panic!("{other:?}"),
    }
    world.retry("blocked");
}

#[test]
fn whatever_fails_before_the_commit_leaves_the_machine_running() {
    let steps = [
        Step::Skeleton,
        Step::Pause,
        Step::Save,
        Step::Release,
        Step::Restore,
        Step::Claim,
    ];
    for lockable in [true, false] {
        for step in steps {
            let what = format!("{step:?} fails, lockable={lockable}");
            let mut world = World::small(lockable);
            world.failures.add(step);
            let end = world.migrate(&Wiring::clean());
            world.check(&end, &what);
            let resumed = matches!(end.report.outcome, Outcome::Resumed(_));
            assert!(resumed, "{what}: {:?}", end.report.outcome);
            assert!(end.took < Duration::from_secs(3), "{what}");
            world.retry(&what);
        }
    }
}

#[test]
fn the_source_hears_why_a_restore_failed() {
    let mut world = World::small(true);
    world.failures.add(Step::Restore);
    let end = world.migrate(&Wiring::clean());
    let outcome = Outcome::Resumed(Reason::Peer(Cause::RestoreFailed));
    assert_eq!(end.report.outcome, outcome);
    let words = end.report.error.unwrap().to_string();
    assert!(words.contains("Restore fails by the test"), "{words}");
    assert!(matches!(end.received, Err(DestinationError::Restore(_))));
}

#[test]
fn the_source_hears_why_a_claim_failed() {
    let mut world = World::small(true);
    world.failures.add(Step::Claim);
    let end = world.migrate(&Wiring::clean());
    let words = end.report.error.unwrap().to_string();
    assert!(words.contains("Claim fails by the test"), "{words}");
    assert!(matches!(end.received, Err(DestinationError::Claim(_))));
}

#[test]
fn both_sides_hear_why_the_disks_were_not_let_go() {
    for also_fails in [None, Some(Step::Resume)] {
        let mut world = World::small(true);
        world.failures.add(Step::Release);
        also_fails.iter().for_each(|step| world.failures.add(*step));
        let end = world.migrate(&Wiring::clean());
        let error = end.report.error.unwrap();
        assert!(matches!(error, SourceError::Release(_)), "{error:?}");
        let expected = "the hand-off failed: fake machine: Release fails by the test";
        assert_eq!(chain(&error), expected);
        // Where the machine cannot be resumed, the connection just ends.
        match (end.received, also_fails) {
            (Err(DestinationError::Peer(words)), None) => {
                assert_eq!(words, "fake machine: Release fails by the test");
            }
            (Err(_), Some(_)) => {}
            (other, _) => panic!("{:?}", other.err()),
        }
    }
}

/// What an operator reads.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<_> = causes.map(ToString::to_string).collect();
    texts.join(": ")
}

#[test]
fn a_machine_that_cannot_be_started_is_the_destinations_all_the_same() {
    let mut world = World::small(true);
    world.failures.add(Step::Start);
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "start fails");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    let received = end.received.unwrap();
    assert!(received.start_error.is_some());
    assert!(!world.copies.runs(Side::Destination));
    assert!(!world.copies.runs(Side::Source));
}

#[test]
fn a_machine_that_cannot_be_resumed_is_kept() {
    for step in [Step::Save, Step::Restore] {
        let mut world = World::small(true);
        world.failures.add(step);
        world.failures.add(Step::Resume);
        let end = world.migrate(&Wiring::clean());
        let outcome = end.report.outcome;
        let kept = matches!(outcome, Outcome::InDoubt(Doubt::ResumeFailed(_)));
        assert!(kept, "{step:?}: {outcome:?}");
        assert!(end.received.is_err());
        assert_eq!(world.disk.holder(), Some(Side::Source));
        assert!(!world.guest().tracker.is_logging());
    }
}

#[test]
fn a_log_that_cannot_be_started_ends_it_before_a_page_is_sent() {
    let mut world = World::small(true);
    world.guest().tracker.set_start_fails(true);
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "tracker.start");
    assert!(matches!(end.report.error, Some(SourceError::Port(_))));
    assert_eq!(end.report.pages.total(), 0);
    world.retry("tracker.start");
}
