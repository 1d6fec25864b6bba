//! Post-copy: the machine goes on before all of its memory is there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use migration::PageIndex;
use migration::handoff::{Doubt, Outcome};
use migration::progress::{Phase, Postcopy};
use migration::source::{OnTimeout, SourceError};
use migration::testing::{Fault, FaultKind, Side, Step, Wire};

use crate::world::{End, Wiring, World, fill, new_handle};

const PATIENCE: Duration = Duration::from_millis(150);
const LIMIT: Duration = Duration::from_secs(3);

/// A machine that never converges and whose time is up at once.
pub(crate) fn world(lockable: bool) -> World {
    let mut world = World::small(lockable);
    world.options.on_timeout = OnTimeout::Postcopy;
    world.options.timeout = Duration::ZERO;
    world.handle = new_handle(Duration::from_nanos(1));
    let guest = world.guest();
    world.machine.guest.tracker.before_harvest(move || {
        // The first harvest is dropped; what is written now is sent in the first round.
        for page in (0..70).chain(1000..1020) {
            guest.write(PageIndex(page), |bytes| fill(bytes, page + 7));
        }
        let later = guest.clone();
        guest.tracker.before_harvest(move || {
            for page in (0..60).chain(1000..1015) {
                later.write(PageIndex(page), |bytes| fill(bytes, page + 77));
            }
            later.write(PageIndex(4), |bytes| bytes.fill(0));
            later.discard(PageIndex(5));
        });
    });
    world
}

/// A migration whose operators give up on both sides when the connection is cut.
pub(crate) fn migrate(world: &mut World, wiring: &Wiring) -> End {
    let (postcopy, handle) = (Arc::clone(&world.host.postcopy), Arc::clone(&world.handle));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                if postcopy.held.load(Ordering::SeqCst) {
                    postcopy.ended.store(true, Ordering::SeqCst);
                }
                if handle.progress().phase == Phase::Unlinked {
                    handle.abandon();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let end = world.migrate(wiring);
        done.store(true, Ordering::SeqCst);
        if let Some(lazy) = &*postcopy.lazy.lock().expect("no test thread panicked") {
            lazy.undo();
        }
        end
    })
}

/// What both sides owe; whether the machine was lost because somebody gave its pages up.
pub(crate) fn check(world: &World, end: &End, what: &str) -> bool {
    let (outcome, error) = (end.report.outcome, &end.report.error);
    let refusal = end.received.as_ref().err();
    let what = format!("{what}: {outcome:?} ({error:?}), destination {refusal:?}");
    let held = world.host.postcopy.held.load(Ordering::SeqCst);
    assert!(!world.copies.were_both_running(), "both ran: {what}");
    if end.received.is_ok() {
        world.check_arrived(&what);
        assert!(!world.copies.runs(Side::Source), "{what}");
    }
    match outcome {
        Outcome::Resumed(_) => {
            assert!(world.copies.runs(Side::Source), "{what}");
            assert!(end.received.is_err() && !held, "{what}");
        }
        Outcome::Surrendered => {
            assert!(!world.copies.runs(Side::Source), "{what}");
            // Whole at the destination, or held there until its operator gave up.
            assert!(end.received.is_ok() || held, "{what}");
        }
        Outcome::InDoubt(doubt) => {
            assert!(!world.copies.runs(Side::Source), "{what}");
            let undecidable = !world.lockable && matches!(doubt, Doubt::PeerMayRun(_));
            assert!(undecidable, "{what}");
        }
    }
    held
}

#[test]
fn a_guest_that_never_converges_goes_on_there_and_finds_every_page() {
    for lockable in [true, false] {
        let mut world = world(lockable);
        let end = migrate(&mut world, &Wiring::clean());
        assert!(!check(&world, &end, "undisturbed"));
        assert_eq!(end.report.outcome, Outcome::Surrendered);
        assert!(end.received.is_ok());
        let report = end.report.postcopy.expect("a post-copy");
        assert!(report.pages >= 70, "{report:?}");
        assert_eq!(end.report.blackout.unwrap().pages, 0);
    }
}

/// It was asked for: whoever reads the report sees that nothing was left for it.
#[test]
fn a_post_copy_that_was_not_needed_is_told() {
    let mut world = World::small(true);
    world.options.on_timeout = OnTimeout::Postcopy;
    let end = migrate(&mut world, &Wiring::clean());
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert_eq!(end.report.postcopy, Some(Postcopy::default()));
    let mut world = World::small(true);
    let end = world.migrate(&Wiring::clean());
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert_eq!(end.report.postcopy, None);
}

#[test]
fn a_guest_waits_for_its_pages_while_the_others_are_slow() {
    let mut world = world(true);
    let mut wiring = Wiring::clean();
    for (there, _) in wiring.data.iter_mut().take(2) {
        there.latency = Duration::from_millis(100);
    }
    let end = migrate(&mut world, &wiring);
    check(&world, &end, "slow data connections");
    let report = end.report.postcopy.expect("a post-copy");
    assert!(report.faults > 10, "{report:?}");
    // The connection of its own is not behind the others.
    assert!(report.mean_fault_us < 60_000, "{report:?}");
}

#[test]
fn a_host_that_cannot_refuses_before_anything_moves() {
    let mut world = world(true);
    world.host.postcopy_obstacle = Some("no userfaultfd".to_owned());
    let end = migrate(&mut world, &Wiring::clean());
    match end.report.error {
        Some(SourceError::Refused(reasons)) => {
            assert_eq!(reasons, ["post-copy is not possible: no userfaultfd"]);
        }
        error => panic!("{error:?}"),
    }
    assert!(end.report.rounds.is_empty());
    // Nobody who does not ask for it is refused.
    world.options.on_timeout = OnTimeout::Force;
    world.handle = new_handle(Duration::from_millis(300));
    let end = world.migrate(&Wiring::clean());
    assert_eq!(end.report.outcome, Outcome::Surrendered);
}

#[test]
fn a_machine_whose_memory_cannot_be_made_lazy_stays() {
    let mut world = world(true);
    world.failures.add(Step::MakeLazy);
    let end = migrate(&mut world, &Wiring::clean());
    assert!(!check(&world, &end, "make lazy fails"));
    assert!(matches!(end.report.outcome, Outcome::Resumed(_)));
}

/// A direction of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Line {
    Control(bool),
    Data(usize, bool),
}

pub(crate) fn wire_of(wiring: &mut Wiring, line: Line) -> &mut Wire {
    let (pair, there) = match line {
        Line::Control(there) => (&mut wiring.control, there),
        Line::Data(index, there) => (&mut wiring.data[index], there),
    };
    if there { &mut pair.0 } else { &mut pair.1 }
}

/// The third data connection is the one for pages that are needed at once.
pub(crate) const LINES: [Line; 6] = [
    Line::Control(true),
    Line::Control(false),
    Line::Data(0, true),
    Line::Data(1, true),
    Line::Data(2, true),
    Line::Data(2, false),
];

/// Each of the first frames, and ever fewer of the many answers to requests for pages.
pub(crate) fn frames() -> impl Iterator<Item = u32> {
    std::iter::successors(Some(0), |frame| Some(frame + 1 + frame / 12))
}

/// A fault at every frame of every connection.
fn sweep(offset: usize, kind: FaultKind) {
    let (mut held, mut whole, mut resumed) = (0, 0, 0);
    for lockable in [true, false] {
        for line in LINES {
            for frame in frames() {
                let what = format!("{line:?} frame {frame} {kind:?} lockable={lockable}");
                let mut world = world(lockable);
                world.set_patience(PATIENCE);
                let mut wiring = Wiring::clean();
                let came = Arc::new(AtomicBool::new(false));
                let noted = Arc::clone(&came);
                *wire_of(&mut wiring, line) = Wire {
                    fault: Some(Fault {
                        frame,
                        offset,
                        kind,
                    }),
                    on_fault: Some(Arc::new(move || noted.store(true, Ordering::SeqCst))),
                    ..Wire::default()
                };
                let end = migrate(&mut world, &wiring);
                held += u32::from(check(&world, &end, &what));
                whole += u32::from(end.received.is_ok());
                resumed += u32::from(matches!(end.report.outcome, Outcome::Resumed(_)));
                assert!(end.took < LIMIT, "{what}: took {:?}", end.took);
                if !came.load(Ordering::SeqCst) {
                    break;
                }
            }
        }
    }
    assert!(
        held >= 4 && whole >= 4 && resumed >= 20,
        "{held} {whole} {resumed}"
    );
}

#[test]
fn a_cut_at_every_frame() {
    sweep(0, FaultKind::Cut);
}

#[test]
fn a_cut_within_every_payload() {
    sweep(21, FaultKind::Cut);
}

#[test]
fn a_bit_turns_in_every_header() {
    sweep(3, FaultKind::Flip);
}

#[test]
fn silence_at_every_frame() {
    sweep(0, FaultKind::Stall);
}
