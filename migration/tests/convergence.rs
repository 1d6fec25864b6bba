//! Whole pre-copies as figures: guests of several kinds, links of several speeds, no time passes.

use std::time::Duration;

use migration::convergence::{Decision, Limits, THROTTLE_STEPS, decide, predicted_blackout};
use migration::progress::{PageMix, RoundReport};
use proptest::prelude::*;

/// Pages of the machine: 4 GiB.
const MEMORY: u64 = 1 << 20;

/// What a round costs whatever it sends.
const ROUND: Duration = Duration::from_micros(300);

const LIMITS: Limits = Limits {
    max_downtime: Duration::from_millis(100),
    fixed: Duration::from_millis(2),
};

/// More rounds than any guest needs: each one that helps leaves less than nine tenths, and two per
/// speed may not help.
const MOST_ROUNDS: usize = 170;

/// How a guest writes.
#[derive(Clone, Copy, Debug)]
enum Guest {
    Idle,
    /// So many pages per second, all over its memory.
    Steady(u64),
    /// The same pages all the time.
    HotSet(u64),
    /// So many pages per second for a time, then nothing for as long, ...
    Bursts(u64, Duration),
    /// So many pages in one round, so many in the next.
    UpAndDown(u64, u64),
}

impl Guest {
    /// Pages that change during a round at this speed.
    #[expect(clippy::cast_possible_truncation, reason = "few and not negative")]
    fn dirties(self, round: usize, from: Duration, time: Duration, cpu_percent: u8) -> u64 {
        let share = f64::from(cpu_percent) / 100.0;
        let pages = match self {
            Self::Idle => 0.0,
            Self::Steady(rate) => rate as f64 * time.as_secs_f64() * share,
            // Each of them within a millisecond.
            Self::HotSet(pages) => pages as f64 * (time.as_secs_f64() * 1000.0 * share).min(1.0),
            Self::Bursts(rate, length) => {
                let busy = busy(from + time, length) - busy(from, length);
                rate as f64 * busy * share
            }
            Self::UpAndDown(one, _) if round.is_multiple_of(2) => one as f64 * share,
            Self::UpAndDown(_, other) => other as f64 * share,
        };
        MEMORY.min(pages as u64)
    }
}

/// Seconds of bursts until `at`.
fn busy(at: Duration, length: Duration) -> f64 {
    let (at, length) = (at.as_secs_f64(), length.as_secs_f64());
    let whole = (at / (2.0 * length)).floor();
    whole * length + (at - whole * 2.0 * length).min(length)
}

/// What came of a pre-copy.
#[derive(Debug)]
struct End {
    rounds: usize,
    last: Decision,
    cpu_percent: u8,
    predicted: Duration,
    dirty: u64,
}

/// Pre-copies over a link of so many pages per second.
fn precopy(guest: Guest, link: u64, limits: &Limits) -> End {
    let mut reports: Vec<RoundReport> = Vec::new();
    let (mut now, mut cpu_percent, mut to_send) = (Duration::ZERO, 100, MEMORY);
    loop {
        let time = Duration::from_secs_f64(to_send as f64 / link as f64) + ROUND;
        let dirty = guest.dirties(reports.len(), now, time, cpu_percent);
        now += time;
        reports.push(RoundReport {
            pages: PageMix {
                lz4: to_send,
                ..PageMix::default()
            },
            duration_us: u64::try_from(time.as_micros()).expect("less than an age"),
            dirty_pages: dirty,
            cpu_percent,
            ..RoundReport::default()
        });
        to_send = dirty;
        let last = decide(&reports, limits);
        match last {
            Decision::Continue => {}
            Decision::Throttle(percent) => {
                assert!(percent < cpu_percent, "{percent} after {cpu_percent}");
                cpu_percent = percent;
            }
            Decision::Switchover | Decision::Diverges => {
                return End {
                    rounds: reports.len(),
                    last,
                    cpu_percent,
                    predicted: predicted_blackout(&reports, limits.fixed),
                    dirty,
                };
            }
        }
        assert!(reports.len() <= MOST_ROUNDS, "{guest:?}, {link}: no end");
    }
}

/// 10 Gbit/s and 1 Gbit/s, in pages.
const FAST: u64 = 300_000;
const SLOW: u64 = 30_000;

#[test]
fn what_can_converge_does_at_full_speed_and_soon() {
    let table = [
        (Guest::Idle, FAST, 1),
        (Guest::Idle, SLOW, 1),
        (Guest::Steady(1000), FAST, 3),
        (Guest::Steady(FAST / 10), FAST, 6),
        (Guest::Steady(FAST / 2), FAST, 14),
        (Guest::Steady(FAST * 8 / 10), FAST, 32),
        (Guest::Steady(SLOW / 4), SLOW, 9),
        // They fit into the blackout at once, and never get fewer.
        (Guest::HotSet(20_000), FAST, 3),
        (Guest::HotSet(2000), SLOW, 3),
        (Guest::Bursts(FAST / 2, Duration::from_secs(1)), FAST, 16),
        (Guest::Bursts(FAST / 5, Duration::from_millis(50)), FAST, 8),
    ];
    for (guest, link, rounds) in table {
        let end = precopy(guest, link, &LIMITS);
        let what = format!("{guest:?} over {link}: {end:?}");
        assert_eq!(end.last, Decision::Switchover, "{what}");
        assert_eq!(end.cpu_percent, 100, "{what}");
        assert!(end.rounds <= rounds, "{what}");
        assert!(end.predicted <= LIMITS.max_downtime, "{what}");
    }
}

#[test]
fn what_writes_too_fast_is_slowed_down_as_far_as_it_takes() {
    let table = [
        (Guest::Steady(FAST * 11 / 10), FAST, 75),
        (Guest::Steady(FAST * 3 / 2), FAST, 50),
        (Guest::Steady(FAST * 5), FAST, 15),
        (Guest::Steady(SLOW * 2), SLOW, 30),
        (Guest::UpAndDown(50_000, 80_000), FAST, 30),
    ];
    for (guest, link, slowest) in table {
        let end = precopy(guest, link, &LIMITS);
        let what = format!("{guest:?} over {link}: {end:?}");
        assert_eq!(end.last, Decision::Switchover, "{what}");
        assert!((slowest..100).contains(&end.cpu_percent), "{what}");
        assert!(end.predicted <= LIMITS.max_downtime, "{what}");
        assert!(end.rounds < 60, "{what}");
    }
}

#[test]
fn what_never_fits_is_told_so_at_the_lowest_speed() {
    // Ten times what the blackout carries, all of it again within a millisecond.
    for (guest, link) in [
        (Guest::HotSet(300_000), FAST),
        (Guest::Steady(FAST * 50), FAST),
    ] {
        let end = precopy(guest, link, &LIMITS);
        assert_eq!(end.last, Decision::Diverges, "{guest:?}: {end:?}");
        assert_eq!(Some(&end.cpu_percent), THROTTLE_STEPS.last());
        assert!(end.rounds < 40, "{end:?}");
    }
}

fn guest() -> impl Strategy<Value = Guest> {
    prop_oneof![
        Just(Guest::Idle),
        (0_u64..2_000_000).prop_map(Guest::Steady),
        (0..MEMORY).prop_map(Guest::HotSet),
        (0..MEMORY, 0..MEMORY).prop_map(|(one, other)| Guest::UpAndDown(one, other)),
        (0_u64..2_000_000, 1_u64..5000)
            .prop_map(|(rate, ms)| Guest::Bursts(rate, Duration::from_millis(ms))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 3000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// In a bounded number of rounds (`precopy` asserts it), the speed only ever going down.
    #[test]
    fn every_precopy_ends(guest in guest(), link in 1000_u64..3_000_000, limit_ms in 0_u64..2000) {
        let limits = Limits {
            max_downtime: Duration::from_millis(limit_ms),
            ..LIMITS
        };
        let end = precopy(guest, link, &limits);
        match end.last {
            Decision::Switchover => {
                prop_assert!(end.predicted <= limits.max_downtime || end.dirty == 0, "{:?}", end);
            }
            _ => prop_assert_eq!(Some(&end.cpu_percent), THROTTLE_STEPS.last()),
        }
    }
}
