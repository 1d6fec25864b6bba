//! Somebody changes their mind, at any moment.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migration::PageIndex;
use migration::destination::DestinationError;
use migration::handoff::Outcome;
use migration::source::SourceError;
use migration::testing::{Fault, FaultKind};
use proptest::prelude::*;

use crate::world::{PATIENCE, Wiring, World, fill};

/// A migration of some milliseconds.
fn slow(lockable: bool) -> (World, Wiring) {
    let world = World::small(lockable);
    world.write_at_first_harvest();
    for page in 0..70 {
        let guest = world.guest();
        guest.write(PageIndex(page), |bytes| fill(bytes, page * 4));
    }
    let mut wiring = Wiring::clean();
    wiring.control.0.latency = Duration::from_millis(1);
    wiring.control.1.latency = Duration::from_millis(1);
    for wire in &mut wiring.data {
        wire.0.latency = Duration::from_millis(1);
    }
    (world, wiring)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_cancelled_migration_moves_all_or_nothing(
        micros in 0_u64..30_000,
        lockable: bool,
        at_source: bool,
    ) {
        let (mut world, wiring) = slow(lockable);
        let handle = Arc::clone(&world.handle);
        let destination = Arc::clone(&world.destination_cancelled);
        let end = std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_micros(micros));
                match at_source {
                    true => handle.cancel(),
                    false => destination.store(true, Ordering::SeqCst),
                }
            });
            world.migrate(&wiring)
        });
        let what = format!("cancelled after {micros} us");
        world.check(&end, &what);
        prop_assert!(!matches!(end.report.outcome, Outcome::InDoubt(_)), "{}", what);
        prop_assert!(end.took < Duration::from_secs(3), "{}: {:?}", what, end.took);
        if let Outcome::Resumed(_) = end.report.outcome {
            world.retry(&what);
        }
    }
}

#[test]
fn a_cancel_before_the_first_byte_ends_it() {
    let mut world = World::small(true);
    world.handle.cancel();
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "cancelled at once");
    assert!(matches!(end.report.error, Some(SourceError::Cancelled)));
    world.retry("cancelled at once");
}

#[test]
fn a_destination_that_is_cancelled_says_so() {
    let mut world = World::small(true);
    world.destination_cancelled.store(true, Ordering::SeqCst);
    let mut wiring = Wiring::clean();
    wiring.control.0.latency = Duration::from_millis(50);
    let end = world.migrate(&wiring);
    world.check(&end, "cancelled there");
    assert!(matches!(end.received, Err(DestinationError::Cancelled)));
    assert!(matches!(end.report.error, Some(SourceError::Peer(_))));
}

/// Its connection is closed when the source says its first word; why can still be read.
#[test]
fn a_destination_that_was_cancelled_before_has_said_so() {
    let mut world = World::small(true);
    world.destination_cancelled.store(true, Ordering::SeqCst);
    world.source_is_late = true;
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "cancelled there");
    let error = end.report.error;
    assert!(matches!(error, Some(SourceError::Peer(_))), "{error:?}");
}

/// A stream that waits for room is woken up.
#[test]
fn a_cancel_does_not_wait_for_a_full_connection() {
    let (mut world, mut wiring) = slow(true);
    wiring.data[0].0.capacity = 1000;
    wiring.data[0].0.latency = Duration::from_millis(200);
    let handle = Arc::clone(&world.handle);
    let end = std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            handle.cancel();
        });
        world.migrate(&wiring)
    });
    world.check(&end, "cancelled while full");
    assert!(matches!(end.report.error, Some(SourceError::Cancelled)));
    assert!(end.took < Duration::from_secs(2), "{:?}", end.took);
}

/// A migration that is cancelled when this connection begins to open, which would take longer than
/// anybody's patience.
fn cancelled_at_dial(connection: u16, mut wiring: Wiring) {
    let mut world = World::small(true);
    let (handle, begun) = (Arc::clone(&world.handle), Arc::new(Mutex::new(None)));
    let noted = Arc::clone(&begun);
    wiring.on_dial = Some(Arc::new(move |number| {
        if number == connection {
            *noted.lock().expect("no panic") = Some(Instant::now());
            handle.cancel();
        }
    }));
    let end = world.migrate(&wiring);
    let begun = begun.lock().expect("no panic").expect("it was dialled");
    let (took, error) = (begun.elapsed(), &end.report.error);
    world.check(&end, "cancelled while it connects");
    assert!(matches!(error, Some(SourceError::Cancelled)), "{error:?}");
    assert!(took < wiring.pause / 2, "{took:?}");
}

#[test]
fn a_cancel_does_not_wait_for_a_connection_that_is_being_made() {
    let mut wiring = Wiring::clean();
    wiring.pause = PATIENCE;
    cancelled_at_dial(0, wiring);
}

/// The same for one that is opened again.
#[test]
fn a_cancel_does_not_wait_for_a_connection_that_takes_the_place_of_another() {
    let mut wiring = Wiring::clean();
    wiring.pause = Duration::from_secs(1);
    // More than one write takes of the only round's pages, which come after Attach.
    wiring.data[0].0.capacity = 20_000;
    wiring.data[0].0.fault = Some(Fault {
        frame: 1,
        offset: 0,
        kind: FaultKind::Cut,
    });
    cancelled_at_dial(2, wiring);
}

#[test]
fn a_destination_that_waits_for_data_connections_can_be_cancelled() {
    let mut world = World::small(true);
    let mut wiring = Wiring::clean();
    wiring.pause = Duration::from_millis(600);
    let cancelled = Arc::clone(&world.destination_cancelled);
    let end = std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            cancelled.store(true, Ordering::SeqCst);
        });
        world.migrate(&wiring)
    });
    world.check(&end, "cancelled while it attaches");
    assert!(matches!(end.received, Err(DestinationError::Cancelled)));
    let took = end.destination_took;
    assert!(took < Duration::from_millis(500), "{took:?}");
}
