//! The time is up in the middle of a round.

use std::sync::Arc;
use std::time::Duration;

use migration::PageIndex;
use migration::handoff::Outcome;
use migration::source::{EncodingChoice, OnTimeout, SourceError};

use crate::good::beside_a_guest;
use crate::postcopy;
use crate::world::{End, Wiring, World, fill, new_handle, run};

const TIMEOUT: Duration = Duration::from_millis(400);

/// Two regions of several chunks each, of which every other page is a hole, and a round that takes
/// ten seconds. Only that one: when it has ended, the link is as fast as it can be.
fn slow_round(on_timeout: OnTimeout) -> (World, Vec<u64>) {
    let mut world = World::new(&[run(0, 6000), run(10_000, 6000)], true);
    world.options.encoding = EncodingChoice::Raw;
    world.options.on_timeout = on_timeout;
    world.options.timeout = TIMEOUT;
    world.handle = new_handle(Duration::from_micros(10));
    let half = (0..6000).chain(10_000..16_000).filter(|page| page % 2 == 1);
    let pages: Vec<u64> = half.collect();
    let guest = world.guest();
    for page in &pages {
        guest.write(PageIndex(*page), |bytes| fill(bytes, *page));
    }
    world
        .handle
        .retune(|tuning| tuning.bandwidth_bytes_per_s = Some(24_576_000 / 10));
    guest.tracker.before_harvest({
        let (guest, handle) = (guest.clone(), Arc::clone(&world.handle));
        move || {
            // Of these, some were sent in the round and some were not.
            for page in (1..6000).chain(10_001..16_000).step_by(100) {
                guest.write(PageIndex(page), |bytes| bytes.fill(0x5a));
            }
            handle.retune(|tuning| tuning.bandwidth_bytes_per_s = None);
        }
    });
    (world, pages)
}

fn check(end: &End, pages: &[u64]) {
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    let rounds = &end.report.rounds;
    assert_eq!(rounds.len(), 1, "{rounds:?}");
    let (sent, left) = (rounds[0].pages.total(), rounds[0].dirty_pages);
    let all = pages.len() as u64;
    assert!(sent > 0 && sent < all / 2, "{rounds:?}");
    // Each page but those that the guest has written to meanwhile once; no hole.
    assert!(left >= all - sent && left <= all, "{rounds:?}");
    let limits = TIMEOUT..Duration::from_secs(3);
    assert!(limits.contains(&end.took), "{:?}", end.took);
}

#[test]
fn a_round_is_cut_short_where_the_switchover_is_forced() {
    let (mut world, pages) = slow_round(OnTimeout::Force);
    let guest = world.guest();
    let end = beside_a_guest(&guest, &pages, Duration::from_millis(2), || {
        world.migrate(&Wiring::clean())
    });
    world.check(&end, "forced within a round");
    check(&end, &pages);
}

#[test]
fn a_round_is_cut_short_where_the_rest_comes_later() {
    let (mut world, pages) = slow_round(OnTimeout::Postcopy);
    let guest = world.guest();
    let end = beside_a_guest(&guest, &pages, Duration::from_millis(2), || {
        postcopy::migrate(&mut world, &Wiring::clean())
    });
    assert!(!postcopy::check(&world, &end, "post-copy within a round"));
    check(&end, &pages);
    let later = end.report.postcopy.expect("a post-copy").pages;
    assert!(later >= end.report.rounds[0].dirty_pages, "{later}");
    assert!(later <= pages.len() as u64, "{later}");
}

#[test]
fn a_first_round_that_takes_too_long_is_not_the_guests_fault() {
    let (mut world, pages) = slow_round(OnTimeout::Cancel);
    world.options.timeout = Duration::from_millis(450);
    let guest = world.guest();
    let end = beside_a_guest(&guest, &pages, Duration::from_millis(2), || {
        world.migrate(&Wiring::clean())
    });
    world.check(&end, "late within the first round");
    let error = end.report.error.expect("it was given up");
    let SourceError::FirstRound { pace, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(pace.memory_bytes, 12_000 * 4096);
    assert!(pace.done_bytes < pace.memory_bytes / 2, "{pace:?}");
    assert!(pace.wire_bytes > 0, "{pace:?}");
    let words = error.to_string();
    let start = "memory could not be sent once within 0.45 s: ";
    assert!(words.starts_with(start), "{words}");
    for text in [" of 47 MiB went in ", " MiB/s over the connections; "] {
        assert!(words.contains(text), "{words}");
    }
    assert!(!words.contains("guest"), "{words}");
}
