//! A post-copy whose connection is cut goes on over a new one.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use migration::handoff::{Doubt, Outcome};
use migration::progress::Phase;
use migration::testing::{FakeChannel, Fault, FaultKind, Side, Wire, pair};
use migration::wire::Message;
use migration::wire::message::{Attach, CONTROL_INDEX};

use crate::postcopy::{LINES, Line, frames, wire_of};
use crate::world::{End, Wiring, World};

const PATIENCE: Duration = Duration::from_millis(300);
const RETRY: Duration = Duration::from_millis(5);
const LIMIT: Duration = Duration::from_secs(8);

/// The connections of the second link: control, two for pages, one for pages that are needed at once.
const SECOND: usize = 3;

fn world(lockable: bool) -> World {
    let mut world = crate::postcopy::world(lockable);
    world.set_patience(PATIENCE);
    world.options.retry = RETRY;
    world
}

fn fault(frame: u32, offset: usize, kind: FaultKind, came: &Arc<AtomicBool>) -> Wire {
    let came = Arc::clone(came);
    Wire {
        fault: Some(Fault {
            frame,
            offset,
            kind,
        }),
        on_fault: Some(Arc::new(move || came.store(true, Ordering::SeqCst))),
        ..Wire::default()
    }
}

/// Pages that are pushed over the two connections from `first` on come long after those that the guest
/// asks for.
fn slow(wiring: &mut Wiring, first: usize) {
    for (there, _) in &mut wiring.data[first..first + 2] {
        there.capacity = 3000;
        there.latency = Duration::from_millis(10);
    }
}

/// A migration whose operator does nothing, unless the destination is no more: then the source's
/// cancels.
fn migrate(world: &mut World, wiring: &Wiring) -> End {
    let (postcopy, handle) = (Arc::clone(&world.host.postcopy), Arc::clone(&world.handle));
    let ended = Arc::clone(&world.destination_ended);
    let (done, begin) = (AtomicBool::new(false), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let is_unlinked = handle.progress().phase == Phase::Unlinked;
                if is_unlinked && ended.load(Ordering::SeqCst) {
                    handle.cancel();
                }
                if begin.elapsed() > LIMIT {
                    // It has failed; it shall not stand still, too.
                    handle.abandon();
                    postcopy.ended.store(true, Ordering::SeqCst);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let end = world.migrate(wiring);
        done.store(true, Ordering::SeqCst);
        if let Some(lazy) = &*postcopy.lazy.lock().expect("no test thread panicked") {
            if end.received.is_ok() {
                assert!(lazy.wait_touched(LIMIT), "the guest still waits for a page");
            }
            lazy.undo();
        }
        end
    })
}

/// What both sides owe when nobody gives up: one whole machine. Returns how often the link was made
/// again.
fn check(world: &World, end: &End, what: &str) -> u32 {
    let (outcome, error) = (end.report.outcome, &end.report.error);
    let refusal = end.received.as_ref().err();
    let what = format!("{what}: {outcome:?} ({error:?}), destination {refusal:?}");
    assert!(!world.copies.were_both_running(), "both ran: {what}");
    assert!(end.took < LIMIT, "{what}: took {:?}", end.took);
    let again = end.report.postcopy.map_or(0, |report| report.reconnections);
    match outcome {
        Outcome::Surrendered => {
            assert!(!world.copies.runs(Side::Source), "{what}");
            assert!(end.received.is_ok(), "{what}");
            assert!(world.copies.runs(Side::Destination), "{what}");
            world.check_arrived(&what);
        }
        Outcome::Resumed(_) => {
            assert!(world.copies.runs(Side::Source), "{what}");
            assert!(end.received.is_err() && again == 0, "{what}");
        }
        Outcome::InDoubt(doubt) => {
            // Commit was lost: nobody has it, and without locks nobody can tell.
            assert!(end.received.is_err() && again == 0, "{what}");
            assert!(
                !world.lockable && matches!(doubt, Doubt::PeerMayRun(_)),
                "{what}"
            );
        }
    }
    again
}

/// A fault at every frame of every connection of the first link.
fn sweep(offset: usize, kind: FaultKind) {
    let (mut again, mut resumed) = (0, 0);
    for lockable in [true, false] {
        for line in LINES {
            for frame in frames() {
                let what = format!("{line:?} frame {frame} {kind:?} lockable={lockable}");
                let mut world = world(lockable);
                let came = Arc::new(AtomicBool::new(false));
                let mut wiring = Wiring::clean();
                *wire_of(&mut wiring, line) = fault(frame, offset, kind, &came);
                let end = migrate(&mut world, &wiring);
                again += check(&world, &end, &what);
                resumed += u32::from(matches!(end.report.outcome, Outcome::Resumed(_)));
                if !came.load(Ordering::SeqCst) {
                    break;
                }
            }
        }
    }
    assert!(again >= 10 && resumed >= 20, "{again} {resumed}");
}

#[test]
fn a_post_copy_survives_a_cut_at_every_frame() {
    sweep(0, FaultKind::Cut);
}

#[test]
fn a_post_copy_survives_a_cut_within_every_payload() {
    sweep(21, FaultKind::Cut);
}

#[test]
fn a_post_copy_survives_a_bit_that_turns_in_every_header() {
    sweep(3, FaultKind::Flip);
}

/// The first link is cut while pages are missing, the second has a fault at every frame.
fn sweep_second(offset: usize, kind: FaultKind) {
    let (mut most, mut cut, mut all) = (0, 0, 0);
    for index in SECOND..SECOND + 4 {
        for there in [true, false] {
            for frame in frames() {
                let what = format!("connection {index} there={there} frame {frame} {kind:?}");
                let mut world = world(frame % 2 == 0);
                let (first, came) = (Arc::default(), Arc::new(AtomicBool::new(false)));
                let mut wiring = Wiring::clean();
                wiring.data.resize(SECOND + 4, Default::default());
                slow(&mut wiring, 0);
                wiring.data[2].0 = fault(3, 0, FaultKind::Cut, &first);
                let line = Line::Data(index, there);
                *wire_of(&mut wiring, line) = fault(frame, offset, kind, &came);
                let end = migrate(&mut world, &wiring);
                let again = check(&world, &end, &what);
                let (outcome, error) = (end.report.outcome, &end.report.error);
                assert_eq!(outcome, Outcome::Surrendered, "{what}: {error:?}");
                // On a busy host the pushed pages may all come before the first cut does.
                cut += u32::from(again >= 1);
                all += 1;
                most = most.max(again);
                if !came.load(Ordering::SeqCst) {
                    break;
                }
            }
        }
    }
    assert!(most >= 2 && 2 * cut > all, "{most}: {cut} of {all}");
}

#[test]
fn a_second_cut_at_every_frame_of_the_new_link() {
    sweep_second(0, FaultKind::Cut);
}

#[test]
fn a_cut_within_every_payload_of_the_new_link() {
    sweep_second(21, FaultKind::Cut);
}

#[test]
fn silence_at_every_frame_of_the_new_link() {
    sweep_second(0, FaultKind::Stall);
}

#[test]
fn links_that_are_cut_again_and_again() {
    let mut world = world(true);
    let cuts = Arc::new(AtomicU32::new(0));
    let mut wiring = Wiring::clean();
    wiring.data.resize(4 * 6, Default::default());
    // The connection for pages that are needed at once, of each link.
    for link in 0..6 {
        let cuts = Arc::clone(&cuts);
        wiring.data[2 + 4 * link].0 = Wire {
            fault: Some(Fault {
                frame: 2,
                offset: 0,
                kind: FaultKind::Cut,
            }),
            on_fault: Some(Arc::new(move || {
                cuts.fetch_add(1, Ordering::SeqCst);
            })),
            ..Wire::default()
        };
        // Nothing else brings pages any sooner.
        slow(&mut wiring, 4 * link);
    }
    let end = migrate(&mut world, &wiring);
    let again = check(&world, &end, "again and again");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(again >= 3, "{again}");
    assert!(cuts.load(Ordering::SeqCst) >= 3);
    // The machine stands still once for each link that it ran on.
    let holds = world.host.postcopy.holds.load(Ordering::SeqCst);
    assert!((1..=again).contains(&holds), "{holds} of {again}");
}

/// Connections that are nobody's, kept open.
fn strangers() -> Vec<(FakeChannel, FakeChannel)> {
    let attach = |token: &[u8], index| {
        let token = token.to_vec();
        Message::Attach(Attach { token, index })
            .encode()
            .expect("short")
    };
    let mut header = attach(b"a token", CONTROL_INDEX);
    // A payload of 16 MiB is announced, and does not come; the header's check sum is not right, either.
    header[..4].copy_from_slice(&(16_u32 << 20).to_le_bytes());
    let section = Message::Section(migration::Section {
        id: "x".to_owned(),
        kind: "y".to_owned(),
        version: 0,
        bytes: vec![0; 100_000],
    });
    let words: [Vec<u8>; 7] = [
        Vec::new(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        attach(b"a tokem", CONTROL_INDEX),
        attach(b"", CONTROL_INDEX),
        attach(b"a token, and more", 0),
        header,
        section.encode().expect("short"),
    ];
    let say = |words: &Vec<u8>| {
        let (mut ours, theirs) = pair(Wire::default(), Wire::default());
        ours.write_all(words).expect("room");
        (ours, theirs)
    };
    words.iter().cycle().take(70).map(say).collect()
}

#[test]
fn strangers_do_not_hold_the_source_up() {
    let mut world = world(true);
    // The strangers come first.
    world.options.retry = Duration::from_millis(100);
    let came = Arc::new(AtomicBool::new(false));
    let mut wiring = Wiring::clean();
    slow(&mut wiring, 0);
    wiring.data[2].0 = fault(3, 0, FaultKind::Cut, &came);
    let (entrance, handle) = (Arc::clone(&world.entrance), Arc::clone(&world.handle));
    let kept = std::thread::spawn(move || {
        let mut kept = Vec::new();
        while handle.progress().phase != Phase::Unlinked {
            std::thread::sleep(Duration::from_millis(1));
        }
        let entrance = entrance.lock().expect("no panic").clone().expect("open");
        for (ours, theirs) in strangers() {
            entrance.send(theirs).expect("the destination waits");
            kept.push(ours);
        }
        kept
    });
    let end = migrate(&mut world, &wiring);
    assert_eq!(check(&world, &end, "strangers"), 1);
    assert!(end.took < Duration::from_secs(2), "{:?}", end.took);
    drop(kept.join().expect("no panic"));
}

#[test]
fn a_stranger_that_names_a_data_connection_or_is_early_changes_nothing() {
    let mut world = world(true);
    world.options.retry = Duration::from_millis(50);
    let came = Arc::new(AtomicBool::new(false));
    let mut wiring = Wiring::clean();
    slow(&mut wiring, 0);
    wiring.data[2].0 = fault(3, 0, FaultKind::Cut, &came);
    let (entrance, handle) = (Arc::clone(&world.entrance), Arc::clone(&world.handle));
    let kept = std::thread::spawn(move || {
        while handle.progress().phase != Phase::Unlinked {
            std::thread::sleep(Duration::from_millis(1));
        }
        let entrance = entrance.lock().expect("no panic").clone().expect("open");
        // Late connections of an attempt that is over: they show the token, and stay silent.
        let late = [0, 1, 2, 7, CONTROL_INDEX].map(|index| {
            let (mut ours, theirs) = pair(Wire::default(), Wire::default());
            let token = b"a token".to_vec();
            let attach = Message::Attach(Attach { token, index });
            attach.send(&mut ours).expect("room");
            entrance.send(theirs).expect("the destination waits");
            ours
        });
        late.into_iter().collect::<Vec<_>>()
    });
    let end = migrate(&mut world, &wiring);
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(check(&world, &end, "late connections") >= 1);
    drop(kept.join().expect("no panic"));
}
