//! What a migration would be like: its rounds, played through with what was measured before.

use std::time::Duration;

use crate::PAGE_BYTES;
use crate::convergence::{Decision, Limits, decide, predicted_blackout};
use crate::progress::{PageMix, RoundReport};

/// Rounds at most; each takes a while, and what has not converged by then does not.
const MAX_ROUNDS: usize = 64;

/// The shortest round: threads have to be woken, and the log to be read.
const SHORTEST_ROUND: Duration = Duration::from_millis(2);

/// How a migration would come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prospect {
    /// The VM is stopped as soon as the rest is little enough.
    Converges,
    /// The guest writes faster than pages can be sent, however slow it is made.
    Diverges,
    /// The time is up before memory was sent once.
    FirstRound,
    /// The time is up later.
    Late,
}

/// What a migration would be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// How it would come to its end.
    pub prospect: Prospect,
    /// From the first page to the last; up to where it does not go on when it does not converge.
    pub total: Duration,
    /// How long the VM would stand still.
    pub blackout: Duration,
    /// Rounds of pre-copy.
    pub rounds: u32,
    /// The least that vCPUs that write would be slowed down to, in percent.
    pub cpu_percent: u8,
}

/// How many pages of a guest's memory have been written after a while: a line through what was
/// seen, and on with its last slope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Growth {
    /// Ascending.
    points: Vec<(Duration, u64)>,
}

impl Growth {
    /// So many pages in all were written by then.
    pub(super) fn note(&mut self, after: Duration, pages: u64) {
        self.points.push((after, pages));
    }

    /// Pages that were written within `time`.
    fn within(&self, time: Duration) -> u64 {
        let (mut from, mut to) = ((Duration::ZERO, 0), (Duration::ZERO, 0));
        for point in &self.points {
            (from, to) = (to, *point);
            if to.0 >= time {
                break;
            }
        }
        let span = (to.0.saturating_sub(from.0)).as_nanos().max(1);
        let more = u128::from(to.1.saturating_sub(from.1));
        let part = more * time.saturating_sub(from.0).as_nanos() / span;
        from.1
            .saturating_add(u64::try_from(part).unwrap_or(u64::MAX))
    }

    /// Bytes of pages that were written per second, in the long run.
    pub(super) fn bytes_per_s(&self) -> u64 {
        let Some((time, pages)) = self.points.last() else {
            return 0;
        };
        let bytes = u128::from(*pages) * u128::from(PAGE_BYTES) * 1_000_000;
        u64::try_from(bytes / time.as_micros().max(1)).unwrap_or(u64::MAX)
    }
}

/// A machine, and how fast it can be sent.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// Pages that hold data.
    pub(super) pages: u64,
    /// All pages.
    pub(super) memory_pages: u64,
    /// Time that sending one takes.
    pub(super) page_time: Duration,
    /// What the guest writes.
    pub(super) growth: Growth,
    /// How long memory may be copied.
    pub(super) timeout: Duration,
}

impl Load {
    /// Bytes of pages that can be sent per second.
    pub(super) fn page_bytes_per_s(&self) -> u64 {
        let nanos = self.page_time.as_nanos().max(1);
        u64::try_from(u128::from(PAGE_BYTES) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
    }
}

/// Plays the rounds through. Pages that changed are taken to be as long on the wire as they were
/// the first time: as deltas they are shorter.
pub(super) fn forecast(load: &Load, limits: &Limits) -> Forecast {
    // Handing over alone may take longer than the VM may stand still; what it would be like is
    // worth knowing all the same.
    let within = Limits {
        max_downtime: match limits.fixed < limits.max_downtime {
            true => limits.max_downtime,
            false => limits.fixed.saturating_add(limits.max_downtime),
        },
        ..*limits
    };
    let mut rounds: Vec<RoundReport> = Vec::new();
    let (mut pages, mut total) = (load.pages, Duration::ZERO);
    let (mut percent, mut slowest) = (100, 100);
    let prospect = loop {
        let sending = times(load.page_time, pages).max(SHORTEST_ROUND);
        total = total.saturating_add(sending);
        // Slowed down, it writes the same, later.
        let written = load.growth.within(sending * u32::from(percent) / 100);
        let dirty_pages = written.min(load.memory_pages);
        rounds.push(RoundReport {
            pages: PageMix {
                raw: pages,
                ..PageMix::default()
            },
            duration_us: u64::try_from(sending.as_micros()).unwrap_or(u64::MAX),
            dirty_pages,
            cpu_percent: percent,
            ..RoundReport::default()
        });
        if total > load.timeout {
            break match rounds.len() {
                1 => Prospect::FirstRound,
                _ => Prospect::Late,
            };
        }
        match decide(&rounds, &within) {
            Decision::Switchover => break Prospect::Converges,
            Decision::Diverges => break Prospect::Diverges,
            Decision::Throttle(to) => (percent, slowest) = (to, to.min(slowest)),
            Decision::Continue => {}
        }
        if rounds.len() >= MAX_ROUNDS {
            break Prospect::Late;
        }
        pages = dirty_pages;
    };
    let blackout = predicted_blackout(&rounds, limits.fixed);
    Forecast {
        prospect,
        total: total.saturating_add(blackout),
        blackout,
        rounds: u32::try_from(rounds.len()).unwrap_or(u32::MAX),
        cpu_percent: slowest,
    }
}

/// So many pages, one after the other.
pub(super) fn times(page_time: Duration, pages: u64) -> Duration {
    let nanos = page_time.as_nanos().saturating_mul(u128::from(pages));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        max_downtime: Duration::from_millis(20),
        fixed: Duration::from_millis(2),
    };

    /// 100,000 pages at 10 us each, while so many are written in a tenth and in the whole of a
    /// second.
    fn load(tenth: u64, second: u64) -> Load {
        let mut growth = Growth::default();
        growth.note(Duration::from_millis(100), tenth);
        growth.note(Duration::from_secs(1), second);
        Load {
            pages: 100_000,
            memory_pages: 100_000,
            page_time: Duration::from_micros(10),
            growth,
            timeout: Duration::from_secs(60),
        }
    }

    #[test]
    fn growth_goes_through_what_was_seen_and_on() {
        let growth = load(1000, 1900).growth;
        let within = |millis| growth.within(Duration::from_millis(millis));
        assert_eq!([within(0), within(50), within(100)], [0, 500, 1000]);
        assert_eq!([within(550), within(1000)], [1450, 1900]);
        assert_eq!(within(2000), 2900);
        assert_eq!(growth.bytes_per_s(), 1900 * 4096);
        assert_eq!(Growth::default().within(Duration::from_secs(1)), 0);
    }

    #[test]
    fn idle_guest_takes_one_round_and_stands_still_for_handing_over() {
        let found = forecast(&load(0, 0), &LIMITS);
        assert_eq!(found.prospect, Prospect::Converges);
        assert_eq!((found.rounds, found.cpu_percent), (1, 100));
        assert_eq!(found.blackout, LIMITS.fixed);
        assert_eq!(found.total, Duration::from_millis(1002));
    }

    #[test]
    fn guest_that_writes_less_than_is_sent_converges() {
        // A tenth of what can be sent.
        let found = forecast(&load(1000, 10_000), &LIMITS);
        assert_eq!(found.prospect, Prospect::Converges);
        assert!(found.rounds > 2 && found.cpu_percent == 100, "{found:?}");
        assert!(found.blackout < LIMITS.max_downtime, "{found:?}");
        assert!(found.total > Duration::from_millis(1100), "{found:?}");
    }

    #[test]
    fn guest_that_writes_more_is_slowed_down_or_does_not_converge() {
        let slowed = forecast(&load(15_000, 150_000), &LIMITS);
        assert_eq!(slowed.prospect, Prospect::Converges, "{slowed:?}");
        assert!(slowed.cpu_percent < 100, "{slowed:?}");
        let never = forecast(&load(99_000, 990_000), &LIMITS);
        let hot = Load {
            growth: {
                let mut growth = Growth::default();
                // All of it, again and again.
                growth.note(Duration::from_millis(2), 100_000);
                growth
            },
            ..load(0, 0)
        };
        assert_eq!(forecast(&hot, &LIMITS).prospect, Prospect::Diverges);
        assert!(never.cpu_percent <= slowed.cpu_percent, "{never:?}");
        // The same few pages again and again: a guest that is slowed down writes them, too.
        let mut growth = Growth::default();
        growth.note(Duration::from_millis(40), 2000);
        growth.note(Duration::from_millis(300), 2000);
        let narrow = Load {
            pages: 2000,
            page_time: Duration::from_micros(390),
            growth,
            ..load(0, 0)
        };
        assert_eq!(forecast(&narrow, &LIMITS).prospect, Prospect::Diverges);
    }

    #[test]
    fn too_little_time_is_told_from_too_much_writing() {
        let short = |millis| {
            let timeout = Duration::from_millis(millis);
            let load = Load {
                timeout,
                ..load(1000, 10_000)
            };
            forecast(&load, &LIMITS).prospect
        };
        assert_eq!(short(999), Prospect::FirstRound);
        assert_eq!(short(1001), Prospect::Late);
        assert_eq!(short(5000), Prospect::Converges);
    }

    #[test]
    fn what_handing_over_takes_is_told_even_where_it_is_too_long() {
        let far = Limits {
            fixed: Duration::from_millis(100),
            ..LIMITS
        };
        let found = forecast(&load(1000, 10_000), &far);
        assert_eq!(found.prospect, Prospect::Converges);
        assert!(found.blackout >= far.fixed, "{found:?}");
    }
}
