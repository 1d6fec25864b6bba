//! Data connections that break while the guest runs are opened again, and nothing is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use migration::PageIndex;
use migration::handoff::Outcome;
use migration::source::{EncodingChoice, OnTimeout};
use migration::testing::{Fault, FaultKind, Wire};

use crate::good::beside_a_guest;
use crate::world::{Wiring, World, assert_holes, fill, run};

/// Connections opened at first; a wiring has wires for as many again.
const STREAMS: usize = 2;

/// A wire with a fault that counts.
fn broken(frame: u32, offset: usize, kind: FaultKind, faults: &Arc<AtomicU32>) -> Wire {
    let faults = Arc::clone(faults);
    Wire {
        fault: Some(Fault {
            frame,
            offset,
            kind,
        }),
        on_fault: Some(Arc::new(move || {
            faults.fetch_add(1, Ordering::SeqCst);
        })),
        capacity: 20_000,
        ..Wire::default()
    }
}

/// Some pages of each chunk; what is a multiple of 5 stays a hole.
fn pages() -> Vec<u64> {
    let all = (0..3000).chain(8000..8100);
    all.filter(|page| page % 5 != 0).collect()
}

fn world(encoding: EncodingChoice) -> World {
    let mut world = World::new(&[run(0, 3000), run(8000, 100)], true);
    world.options.encoding = encoding;
    let guest = world.guest();
    for page in pages() {
        guest.write(PageIndex(page), |bytes| fill(bytes, page));
    }
    world
}

#[test]
fn a_cut_in_the_first_round_costs_some_pages_and_nothing_else() {
    for encoding in [
        EncodingChoice::Raw,
        EncodingChoice::Lz4,
        EncodingChoice::Delta,
        EncodingChoice::Auto,
    ] {
        for (frame, offset) in [(1, 0), (2, 3), (9, 40), (15, 0)] {
            let what = format!("{encoding:?}, frame {frame}, byte {offset}");
            let mut world = world(encoding);
            let (mut wiring, faults) = (Wiring::clean(), Arc::default());
            wiring.data[0].0 = broken(frame, offset, FaultKind::Cut, &faults);
            let all = pages();
            let guest = world.guest();
            let end = beside_a_guest(&guest, &all, Duration::from_micros(50), || {
                world.migrate(&wiring)
            });
            assert_eq!(faults.load(Ordering::SeqCst), 1, "{what}");
            world.check(&end, &what);
            let error = &end.report.error;
            assert_eq!(
                end.report.outcome,
                Outcome::Surrendered,
                "{what}: {error:?}"
            );
            assert_holes(&world, |page| page.0 % 5 != 0);
        }
    }
}

/// One in each of the connections that take the others' place, too.
#[test]
fn several_cuts_are_survived() {
    for seed in 0..30 {
        let what = format!("seed {seed}");
        let mut world = world(EncodingChoice::Delta);
        let (mut wiring, faults) = (Wiring::clean(), Arc::default());
        let wires = wiring.data.iter_mut().zip([3, 5, 7, 11]);
        for (wire, factor) in wires.take(STREAMS + 1) {
            let frame = 1 + (seed * factor) % 13;
            wire.0 = broken(frame, 17, FaultKind::Cut, &faults);
        }
        let all = pages();
        let guest = world.guest();
        let end = beside_a_guest(&guest, &all, Duration::from_micros(50), || {
            world.migrate(&wiring)
        });
        assert_eq!(faults.load(Ordering::SeqCst), 3, "{what}");
        world.check(&end, &what);
        let error = &end.report.error;
        assert_eq!(
            end.report.outcome,
            Outcome::Surrendered,
            "{what}: {error:?}"
        );
        assert_holes(&world, |page| page.0 % 5 != 0);
    }
}

/// What was sent before the cut has turned into zeroes, and into a hole, when it is sent again.
#[test]
fn pages_that_are_zeroes_by_then_arrive_as_such() {
    let mut world = world(EncodingChoice::Raw);
    let (mut wiring, faults) = (Wiring::clean(), Arc::default());
    wiring.data[0].0 = broken(15, 0, FaultKind::Cut, &faults);
    let guest = world.guest();
    let changed = world.guest();
    guest.tracker.before_harvest(move || {
        for page in (1..300).step_by(10) {
            changed.write(PageIndex(page), |bytes| bytes.fill(0));
            changed.discard(PageIndex(page + 1));
        }
    });
    let end = world.migrate(&wiring);
    assert_eq!(faults.load(Ordering::SeqCst), 1);
    world.check(&end, "zeroes");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(end.report.pages.zero > 0);
}

#[test]
fn a_connection_that_carries_nothing_any_more_is_replaced() {
    let mut world = world(EncodingChoice::Raw);
    // Longer than the source takes between two signs of life.
    world.set_patience(Duration::from_millis(2500));
    let (mut wiring, faults) = (Wiring::clean(), Arc::default());
    wiring.data[1].0 = broken(5, 0, FaultKind::Stall, &faults);
    let end = world.migrate(&wiring);
    assert_eq!(faults.load(Ordering::SeqCst), 1);
    world.check(&end, "silence");
    let error = &end.report.error;
    assert_eq!(end.report.outcome, Outcome::Surrendered, "{error:?}");
}

/// The time is up when the source gives up a connection that the destination takes for a good one:
/// the new one comes when the guest stands still already.
#[test]
fn a_connection_that_is_replaced_right_before_a_forced_switchover_is_let_in() {
    let mut world = world(EncodingChoice::Raw);
    world.set_patience(Duration::from_millis(2500));
    world.options.on_timeout = OnTimeout::Force;
    world.options.timeout = Duration::from_millis(500);
    let (mut wiring, faults) = (Wiring::clean(), Arc::default());
    wiring.data[1].0 = broken(5, 0, FaultKind::Stall, &faults);
    wiring.data[STREAMS].0.capacity = 20_000;
    let end = world.migrate(&wiring);
    assert_eq!(faults.load(Ordering::SeqCst), 1);
    world.check(&end, "forced");
    let error = &end.report.error;
    assert_eq!(end.report.outcome, Outcome::Surrendered, "{error:?}");
}

/// It is the guest's blackout that a new connection would cost then.
#[test]
fn a_cut_among_the_last_pages_leaves_the_machine_running() {
    let mut world = World::small(true);
    world.write_at_first_harvest();
    let (mut wiring, faults) = (Wiring::clean(), Arc::default());
    // Attach, the pages of the first round, then the last ones.
    wiring.data[0].0 = broken(3, 0, FaultKind::Cut, &faults);
    let end = world.migrate(&wiring);
    assert_eq!(faults.load(Ordering::SeqCst), 1);
    world.check(&end, "last pages");
    assert!(matches!(end.report.outcome, Outcome::Resumed(_)));
    world.retry("last pages");
}

/// The encoder has grown with the batch that broke the connection.
#[test]
fn memory_of_a_broken_connection_is_counted_as_given_back() {
    for frame in [2, 9, 15] {
        let mut world = world(EncodingChoice::Delta);
        world.options.streams = 1;
        let (mut wiring, faults) = (Wiring::clean(), Arc::default());
        wiring.data[0].0 = broken(frame, 17, FaultKind::Cut, &faults);
        let end = world.migrate(&wiring);
        assert_eq!(end.report.outcome, Outcome::Surrendered);
        assert_eq!(faults.load(Ordering::SeqCst), 1);
        let (most, limit) = (end.report.cache_bytes, world.options.cache_bytes);
        assert!((1..=limit).contains(&most), "{most} of {limit}");
    }
}
