//! Connections that fail, at every frame and in every direction.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use migration::PageIndex;
use migration::handoff::Outcome;
use migration::testing::{Fault, FaultKind, Wire};

use crate::world::{Wiring, World, fill, run};

/// What "nothing hangs" means: some patiences, and a busy machine.
const LIMIT: Duration = Duration::from_millis(1500);

const PATIENCE: Duration = Duration::from_millis(100);

/// A direction of a connection.
#[derive(Clone, Copy, Debug)]
enum Line {
    ControlThere,
    ControlBack,
    DataThere(usize),
}

const LINES: [Line; 4] = [
    Line::ControlThere,
    Line::ControlBack,
    Line::DataThere(0),
    Line::DataThere(1),
];

/// A wiring with a fault, and whether it came.
fn wiring(line: Line, fault: Fault) -> (Wiring, Arc<AtomicBool>) {
    let mut wiring = Wiring::clean();
    let came = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&came);
    *wire_of(&mut wiring, line) = Wire {
        fault: Some(fault),
        on_fault: Some(Arc::new(move || noted.store(true, Ordering::SeqCst))),
        ..Wire::default()
    };
    (wiring, came)
}

fn wire_of(wiring: &mut Wiring, line: Line) -> &mut Wire {
    match line {
        Line::ControlThere => &mut wiring.control.0,
        Line::ControlBack => &mut wiring.control.1,
        Line::DataThere(index) => &mut wiring.data[index].0,
    }
}

/// One migration with one fault; whether the fault came.
fn disturb(line: Line, fault: Fault, lockable: bool) -> (bool, Outcome) {
    let what = format!("{line:?}, {fault:?}, lockable={lockable}");
    let mut world = World::small(lockable);
    world.set_patience(PATIENCE);
    world.write_at_first_harvest();
    let (wiring, came) = wiring(line, fault);
    let end = world.migrate(&wiring);
    world.check(&end, &what);
    assert!(end.took < LIMIT, "{what}: took {:?}", end.took);
    let outcome = end.report.outcome;
    if let Outcome::Resumed(_) = outcome {
        world.retry(&what);
    }
    (came.load(Ordering::SeqCst), outcome)
}

/// Every frame of every direction; returns how many faults there were.
fn sweep(offset: usize, kind: FaultKind) -> Vec<(bool, Outcome)> {
    let mut all = Vec::new();
    for lockable in [true, false] {
        for line in LINES {
            for frame in 0.. {
                let fault = Fault {
                    frame,
                    offset,
                    kind,
                };
                let (came, outcome) = disturb(line, fault, lockable);
                if !came {
                    break;
                }
                all.push((lockable, outcome));
            }
        }
    }
    // Hello to Commit, Welcome to Committed, and some pages on each stream.
    assert!(
        all.len() >= 2 * (7 + 4 + 2 * 3),
        "only {} faults",
        all.len()
    );
    all
}

fn count(all: &[(bool, Outcome)], is: impl Fn(&Outcome) -> bool) -> usize {
    all.iter().filter(|(_, outcome)| is(outcome)).count()
}

#[test]
fn a_cut_between_frames() {
    let all = sweep(0, FaultKind::Cut);
    // Cut before Commit, nothing is in doubt; cut after, only without locks.
    assert!(count(&all, |o| matches!(o, Outcome::Resumed(_))) > 20);
    assert!(count(&all, |o| matches!(o, Outcome::InDoubt(_))) <= 3);
}

#[test]
fn a_cut_within_a_header() {
    sweep(9, FaultKind::Cut);
}

#[test]
fn a_cut_within_a_payload() {
    sweep(21, FaultKind::Cut);
}

#[test]
fn a_bit_turns_in_a_header() {
    sweep(3, FaultKind::Flip);
}

#[test]
fn a_bit_turns_in_a_payload() {
    sweep(20, FaultKind::Flip);
}

#[test]
fn silence_between_frames() {
    let all = sweep(0, FaultKind::Stall);
    assert!(count(&all, |o| *o == Outcome::Surrendered) > 0);
}

#[test]
fn silence_within_a_frame() {
    sweep(18, FaultKind::Stall);
}

#[test]
fn a_delay_is_no_fault() {
    let all = sweep(0, FaultKind::Delay(Duration::from_millis(15)));
    assert!(count(&all, |o| *o == Outcome::Surrendered) > all.len() / 2);
}

/// Bits of raw pages, which are behind their frame.
#[test]
fn a_bit_turns_in_a_page() {
    for offset in [300, 5000, 20_000] {
        for frame in 1..3 {
            let fault = Fault {
                frame,
                offset,
                kind: FaultKind::Flip,
            };
            disturb(Line::DataThere(0), fault, true);
        }
    }
}

/// The source's process ends at every frame that it sends: what it had is gone, its lock, too.
#[test]
fn a_source_that_dies() {
    let mut started = 0;
    for line in [Line::ControlThere, Line::DataThere(0), Line::DataThere(1)] {
        for frame in 0.. {
            let what = format!("source dies at {line:?} {frame}");
            let fault = Fault {
                frame,
                offset: 0,
                kind: FaultKind::Cut,
            };
            let mut world = World::small(true);
            world.set_patience(PATIENCE);
            world.write_at_first_harvest();
            let (mut wiring, came) = wiring(line, fault);
            let (disk, breakers) = (world.disk.clone(), Arc::clone(&wiring.breakers));
            let noted = Arc::clone(&came);
            wire_of(&mut wiring, line).on_fault = Some(Arc::new(move || {
                noted.store(true, Ordering::SeqCst);
                disk.source_dies();
                for breaker in breakers.lock().unwrap().iter() {
                    breaker.break_off();
                }
            }));
            let end = world.migrate(&wiring);
            assert!(end.took < LIMIT, "{what}: took {:?}", end.took);
            if !came.load(Ordering::SeqCst) {
                break;
            }
            match end.received {
                Ok(_) => {
                    started += 1;
                    world.check_arrived(&what);
                }
                Err(_) => assert_eq!(world.disk.holder(), None, "{what}"),
            }
        }
    }
    // Every frame that the source sends is one that the destination needs.
    assert_eq!(started, 0);
}

/// As above, but right after the frame: with Commit, the destination has everything.
#[test]
fn a_source_that_dies_after_commit_is_survived() {
    let mut ends = Vec::new();
    for frame in 0.. {
        let mut world = World::small(true);
        world.set_patience(PATIENCE);
        // The destination's answer never arrives.
        let fault = Fault {
            frame,
            offset: 0,
            kind: FaultKind::Cut,
        };
        let (mut wiring, came) = wiring(Line::ControlBack, fault);
        let (disk, noted) = (world.disk.clone(), Arc::clone(&came));
        wire_of(&mut wiring, Line::ControlBack).on_fault = Some(Arc::new(move || {
            noted.store(true, Ordering::SeqCst);
            disk.source_dies();
        }));
        let end = world.migrate(&wiring);
        if !came.load(Ordering::SeqCst) {
            break;
        }
        if end.received.is_ok() {
            world.check_arrived("answer lost");
        }
        ends.push(end.received.is_ok());
    }
    assert_eq!(ends, [false, false, false, true]);
}

/// The stream breaks first, the destination's words follow.
#[test]
fn the_source_hears_what_arrived_damaged() {
    let (mut wiring, _) = wiring(
        Line::DataThere(0),
        Fault {
            frame: 1,
            offset: 40,
            kind: FaultKind::Flip,
        },
    );
    wiring.control.1.latency = Duration::from_millis(40);
    // The source is still sending when the destination notices.
    wiring.data[0].0.capacity = 3000;
    let mut world = World::new(&[run(0, 500)], true);
    for page in 0..500 {
        let guest = world.guest();
        guest.write(PageIndex(page), |bytes| fill(bytes, page));
    }
    let end = world.migrate(&wiring);
    world.check(&end, "damaged");
    let words = end.report.error.map(|error| error.to_string());
    assert!(
        words.as_ref().is_some_and(|w| w.contains("damaged")),
        "{words:?}"
    );
}
