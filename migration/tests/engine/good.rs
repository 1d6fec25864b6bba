//! Nothing goes wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use migration::PageIndex;
use migration::handoff::Outcome;
use migration::progress::Phase;
use migration::source::{EncodingChoice, OnTimeout};
use migration::testing::machine::Guest;
use migration::testing::{Side, Wire};

use crate::world::{Wiring, World, assert_holes, fill, new_handle, run};

const ENCODINGS: [EncodingChoice; 4] = [
    EncodingChoice::Auto,
    EncodingChoice::Raw,
    EncodingChoice::Lz4,
    EncodingChoice::Delta,
];

/// Runs `work` beside a guest that writes to pages below `pages` where they are not a multiple
/// of 5, as fast as `pause` lets it.
pub(crate) fn beside_a_guest<T>(
    guest: &Guest,
    pages: &[u64],
    pause: Duration,
    work: impl FnOnce() -> T,
) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _guest = scope.spawn(|| {
            let mut step = 1_u64;
            while !done.load(Ordering::SeqCst) {
                step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = usize::try_from(step >> 40).expect("24 bits") % pages.len();
                let page = PageIndex(pages[at]);
                match step >> 60 {
                    0 => guest.write(page, |bytes| bytes.fill(0)),
                    1 => guest.discard(page),
                    2 => guest.write(page, |bytes| fill(bytes, step)),
                    _ => guest.write(page, |bytes| bytes[(step >> 20) as usize % 4096] ^= 1),
                };
                if pause.is_zero() {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(pause);
                }
            }
        });
        let result = work();
        done.store(true, Ordering::SeqCst);
        result
    })
}

/// No harvest finds nothing.
pub(crate) fn write_at_every_harvest(guest: Guest) {
    let tracker = std::sync::Arc::clone(&guest.tracker);
    tracker.before_harvest(move || {
        guest.write(PageIndex(1), |bytes| bytes[0] ^= 1);
        write_at_every_harvest(guest);
    });
}

#[test]
fn memory_arrives_whatever_the_streams_and_the_encoding() {
    let regions = [run(3, 700), run(5000, 64), run(9000, 1), run(9001, 130)];
    let pages: Vec<u64> = regions
        .iter()
        .flat_map(|region| region.start.0..region.end().0)
        .filter(|page| page % 5 != 0)
        .collect();
    for streams in [1, 2, 4] {
        for encoding in ENCODINGS {
            let what = format!("{streams} streams, {encoding:?}");
            let mut world = World::new(&regions, true);
            world.options.streams = streams;
            world.options.encoding = encoding;
            world.options.cache_bytes = 1 << 20;
            let guest = world.guest();
            for page in &pages {
                guest.write(PageIndex(*page), |bytes| fill(bytes, *page));
            }
            let mut wiring = Wiring::clean();
            for (wire, index) in wiring.data.iter_mut().zip(0..) {
                // Streams overtake each other, and are congested now and then.
                wire.0.latency = Duration::from_millis(3 * index);
                wire.0.capacity = 20_000;
            }
            let end = beside_a_guest(&guest, &pages, Duration::from_micros(200), || {
                world.migrate(&wiring)
            });
            world.check(&end, &what);
            assert_eq!(end.report.outcome, Outcome::Surrendered, "{what}");
            assert!(end.received.unwrap().start_error.is_none());
            assert_holes(&world, |page| page.0 % 5 != 0);
            let pages = end.report.pages;
            let used = match encoding {
                EncodingChoice::Raw => pages.lz4 == 0 && pages.delta == 0,
                EncodingChoice::Lz4 => pages.lz4 > 0 && pages.delta == 0,
                EncodingChoice::Auto | EncodingChoice::Delta => true,
            };
            assert!(used, "{what}: {pages:?}");
            assert_eq!(world.handle.progress().phase, Phase::Ended);
        }
    }
}

#[test]
fn holes_are_neither_read_nor_made() {
    let mut world = World::small(true);
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "idle");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert_eq!(world.guest().memory.hole_reads(), 0);
    assert_holes(&world, |page| page.0 % 3 != 0);
    let zero_pages = |page: &PageIndex| {
        let memory = world.guest().memory.page(*page);
        memory.is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0))
    };
    let theirs = world.host.memory.as_ref().unwrap();
    assert!(
        !theirs.touched().iter().any(zero_pages),
        "zeroes were written"
    );
}

#[test]
fn a_machine_without_memory_contents_arrives() {
    let mut world = World::new(&[run(0, 1)], false);
    world.options.streams = 1;
    world.machine.sections.clear();
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "empty");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert_eq!(end.report.pages.total(), 0);
}

#[test]
fn what_changes_between_the_rounds_arrives() {
    let mut world = World::small(true);
    world.write_at_first_harvest();
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "changes");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(end.report.pages.delta > 0, "{:?}", end.report.pages);
}

/// The guest writes in each gap there is: between re-arming a page and reading it, and between
/// reading it and the next harvest. Its last writes come after the first harvest, when further
/// writes to a page go unmarked until it is re-armed: who reads before that loses one.
#[test]
fn what_is_written_between_rearm_read_and_harvest_arrives() {
    let mut world = World::small(true);
    world.options.streams = 1;
    // Rounds go on until nothing is left: a switchover takes longer.
    world.handle = new_handle(Duration::from_millis(1));
    let guest = world.guest();
    let (rearmed, read) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    guest.tracker.after_rearm({
        let (guest, rearmed) = (guest.clone(), Arc::clone(&rearmed));
        move |_| {
            let count = rearmed.fetch_add(1, Ordering::SeqCst) + 1;
            if count <= 6 {
                guest.write(PageIndex(1001), |bytes| bytes[7] = count.to_le_bytes()[0]);
            }
        }
    });
    guest.memory.after_read({
        let (guest, read) = (guest.clone(), Arc::clone(&read));
        move |run| {
            let is_theirs = run.start <= PageIndex(2) && PageIndex(2) < run.end();
            let count = read.fetch_add(u64::from(is_theirs), Ordering::SeqCst) + 1;
            if is_theirs && count <= 9 {
                guest.write(PageIndex(2), |bytes| bytes[9] = count.to_le_bytes()[0]);
            }
        }
    });
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "writes in each gap");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    let hooks = (rearmed.load(Ordering::SeqCst), read.load(Ordering::SeqCst));
    assert!(hooks.0 >= 6 && hooks.1 >= 9, "{hooks:?}");
    assert!(end.report.rounds.len() > 2, "{:?}", end.report.rounds);
}

#[test]
fn a_broken_log_means_that_all_pages_are_sent_again() {
    let mut world = World::small(true);
    let guest = world.guest();
    guest.tracker.before_harvest({
        let guest = guest.clone();
        move || {
            guest.tracker.set_broken(true);
            guest.write(PageIndex(7), |bytes| bytes.fill(0xaa));
        }
    });
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "broken log");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(end.report.pages.total() > 100, "{:?}", end.report.pages);
}

/// A guest that writes without a pause over a slow link: it is slowed down, and runs at full speed
/// where it stays.
#[test]
fn a_guest_that_is_too_fast_is_slowed_down_and_given_up_in_time() {
    let mut world = World::new(&[run(0, 600)], true);
    world.options.timeout = Duration::from_millis(400);
    world.handle = new_handle(Duration::from_millis(2));
    let guest = world.guest();
    let pages: Vec<u64> = (0..600).collect();
    let end = beside_a_guest(&guest, &pages, Duration::ZERO, || {
        world.migrate(&Wiring::clean())
    });
    world.check(&end, "too fast");
    if end.report.outcome != Outcome::Surrendered {
        assert!(end.took < Duration::from_secs(3), "{:?}", end.took);
        world.retry("too fast");
    }
}

#[test]
fn a_slow_commit_is_waited_for() {
    let mut world = World::small(true);
    let mut wiring = Wiring::clean();
    wiring.control.1 = Wire {
        latency: Duration::from_millis(30),
        ..Wire::default()
    };
    let end = world.migrate(&wiring);
    world.check(&end, "slow answers");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(world.copies.runs(Side::Destination));
}

/// What becomes zero is not kept any longer.
#[test]
fn the_report_has_the_most_memory_that_held_pages_sent_before() {
    let mut world = World::small(true);
    let guest = world.guest();
    let touched = guest.memory.touched();
    guest.tracker.before_harvest({
        let guest = guest.clone();
        move || {
            for page in touched {
                guest.write(page, |bytes| bytes.fill(0));
            }
        }
    });
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "zeroes");
    let sent = end.report.rounds[0].pages;
    let kept = (sent.total() - sent.zero) * migration::PAGE_BYTES;
    assert!(kept > 0, "{sent:?}");
    assert_eq!(end.report.cache_bytes, kept, "{sent:?}");
}

/// No round takes long enough for a watcher to be called in the middle of it.
#[test]
fn the_time_is_up_also_between_short_rounds() {
    let mut world = World::new(&[run(0, 8)], true);
    world.options.timeout = Duration::from_millis(100);
    // Less than a switchover takes with nothing to send.
    world.handle = new_handle(Duration::from_millis(1));
    let done = std::sync::Arc::clone(&world.handle);
    let end = std::thread::scope(|scope| {
        // Lest the test hangs: what is not in time is cancelled.
        scope.spawn(move || {
            std::thread::sleep(Duration::from_secs(2));
            done.cancel();
        });
        write_at_every_harvest(world.guest());
        world.migrate(&Wiring::clean())
    });
    world.check(&end, "short rounds");
    let error = end.report.error.unwrap();
    assert!(error.to_string().contains("converge"), "{error}");
    assert!(end.took < Duration::from_secs(1), "{:?}", end.took);
    let speeds = &world.machine.throttled;
    assert_eq!((speeds.first(), speeds.last()), (Some(&75), Some(&100)));
}

/// Nothing is left to send; no further round can make the switchover shorter.
#[test]
fn an_idle_guest_moves_whatever_the_limit() {
    let mut world = World::small(true);
    world.options.timeout = Duration::from_secs(1);
    world.handle = new_handle(Duration::ZERO);
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "idle, no downtime");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(world.machine.throttled.is_empty());
}

/// The last round takes longer than the peer's patience; bytes flow all the time.
#[test]
fn a_forced_switchover_may_take_longer_than_the_patience() {
    let mut world = World::new(&[run(0, 600)], true);
    world.options.encoding = EncodingChoice::Raw;
    world.options.streams = 2;
    world.options.on_timeout = OnTimeout::Force;
    world.options.timeout = Duration::ZERO;
    world.set_patience(Duration::from_millis(1300));
    world.handle = new_handle(Duration::ZERO);
    let guest = world.guest();
    guest.tracker.before_harvest({
        let (guest, handle) = (guest.clone(), std::sync::Arc::clone(&world.handle));
        move || {
            for page in 0..512 {
                guest.write(PageIndex(page), |bytes| bytes.fill(1));
            }
            // Two seconds for these, all of them on the first stream.
            handle.retune(|tuning| tuning.bandwidth_bytes_per_s = Some(1 << 20));
        }
    });
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "forced");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(end.took > Duration::from_millis(1500), "{:?}", end.took);
}
