//! Whether another round is worth it: a pure function of what the last ones showed.

use std::time::Duration;

use crate::progress::RoundReport;

/// Rounds with fewer pages say little about the speed of the link.
const MEANINGFUL_PAGES: u64 = 256;

/// A round has to leave less than this share of what the one before left, or it did not help.
const PROGRESS_PERCENT: u128 = 90;

/// Rounds without progress before the guest is slowed down.
const PATIENCE_ROUNDS: usize = 2;

/// A round that leaves as much as it sent did not help at all.
const HOPELESS_PERCENT: u128 = 100;

/// Rounds spent on making a blackout shorter that is short enough already.
const POLISH_ROUNDS: usize = 6;

/// Below this, another round costs more than it saves.
const POLISHED: Duration = Duration::from_micros(500);

/// Speeds that the guest is slowed down to, step by step, in percent.
pub const THROTTLE_STEPS: [u8; 6] = [100, 75, 50, 30, 15, 5];

/// What the blackout may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long the VM may stand still.
    pub max_downtime: Duration,
    /// What stopping, saving, restoring and handing over take, whatever is dirty.
    pub fixed: Duration,
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send what has changed, the VM running.
    Continue,
    /// Stop the VM and send the rest.
    Switchover,
    /// Slow the vCPUs down to so many percent, then go on.
    Throttle(u8),
    /// The guest writes faster than the link carries, and cannot be slowed down further.
    Diverges,
}

/// Time that sending one page takes, from the last round that was long enough to tell.
fn page_time(rounds: &[RoundReport]) -> Duration {
    let telling = rounds
        .iter()
        .rev()
        .find(|round| round.pages.total() >= MEANINGFUL_PAGES);
    let Some(round) = telling.or(rounds.first()) else {
        return Duration::ZERO;
    };
    // Where devices' states were sent, too, they have taken their share.
    let page_bytes = round.wire_bytes.saturating_sub(round.device_bytes);
    let nanos = u128::from(round.duration_us) * 1000 / u128::from(round.pages.total().max(1));
    let nanos = match round.device_bytes {
        0 => nanos,
        _ => nanos * u128::from(page_bytes) / u128::from(round.wire_bytes.max(1)),
    };
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// How long the VM would stand still if it were stopped now.
#[must_use]
pub fn predicted_blackout(rounds: &[RoundReport], fixed: Duration) -> Duration {
    let dirty = rounds.last().map_or(0, |round| round.dirty_pages);
    let dirty = u32::try_from(dirty).unwrap_or(u32::MAX);
    page_time(rounds)
        .saturating_mul(dirty)
        .saturating_add(fixed)
}

/// Decides after a round; `rounds` are all so far, the last one finished and harvested.
#[must_use]
pub fn decide(rounds: &[RoundReport], limits: &Limits) -> Decision {
    let predicted = predicted_blackout(rounds, limits.fixed);
    let Some((last, earlier)) = rounds.split_last() else {
        return Decision::Continue;
    };
    if last.dirty_pages == 0 {
        // No round makes the rest shorter, whatever it takes.
        return Decision::Switchover;
    }
    if predicted <= limits.max_downtime {
        let variable = predicted.saturating_sub(limits.fixed);
        let fits = |round: &RoundReport| {
            let time = page_time(rounds)
                .saturating_mul(u32::try_from(round.dirty_pages).unwrap_or(u32::MAX));
            time.saturating_add(limits.fixed) <= limits.max_downtime
        };
        let polished = earlier.iter().rev().take_while(|round| fits(round)).count();
        let worth_it = variable > POLISHED
            && polished < POLISH_ROUNDS
            && earlier.last().is_none_or(|round| has_progress(round, last));
        return match worth_it {
            true => Decision::Continue,
            false => Decision::Switchover,
        };
    }
    if last.device_bytes > last.wire_bytes / 2 {
        // It was not the guest that has made the round long.
        return Decision::Continue;
    }
    let idle = rounds_without_progress(rounds, last.cpu_percent);
    if idle < PATIENCE_ROUNDS && !is_hopeless(rounds) {
        return Decision::Continue;
    }
    slower(last).map_or(Decision::Diverges, Decision::Throttle)
}

/// Whether the guest changes nearly as much as is sent, for a whole round at its present speed:
/// waiting does not help. The first round of all says nothing, it is longer than any other.
fn is_hopeless(rounds: &[RoundReport]) -> bool {
    match rounds {
        [_, .., before, last] => {
            before.cpu_percent == last.cpu_percent
                && u128::from(last.dirty_pages) * 100
                    >= u128::from(last.pages.total()) * HOPELESS_PERCENT
        }
        _ => false,
    }
}

/// The next speed: at which the guest changes clearly less than is sent, if there is one.
fn slower(last: &RoundReport) -> Option<u8> {
    let (sent, dirty) = (last.pages.total(), last.dirty_pages.max(1));
    let wanted = u64::from(last.cpu_percent) * sent * 85 / (dirty * 100);
    let steps = THROTTLE_STEPS.into_iter();
    let mut slower = steps.filter(|percent| *percent < last.cpu_percent);
    let first = slower.next()?;
    let fitting = slower.find(|percent| u64::from(*percent) <= wanted);
    let smallest = THROTTLE_STEPS.into_iter().last();
    match u64::from(first) <= wanted {
        true => Some(first),
        false => fitting.or(smallest.filter(|percent| *percent < last.cpu_percent)),
    }
}

/// Rounds at this speed, the last ones, since one left clearly less than all before. What goes up
/// and down makes no progress.
fn rounds_without_progress(rounds: &[RoundReport], cpu_percent: u8) -> usize {
    let at_this_speed = |round: &&RoundReport| round.cpu_percent == cpu_percent;
    let count = rounds.iter().rev().take_while(at_this_speed).count();
    let mut at_this_speed = rounds.iter().skip(rounds.len() - count);
    let Some(mut best) = at_this_speed.next() else {
        return 0;
    };
    let mut idle = 0;
    for round in at_this_speed {
        if has_progress(best, round) {
            (best, idle) = (round, 0);
        } else {
            idle += 1;
        }
    }
    idle
}

fn has_progress(before: &RoundReport, after: &RoundReport) -> bool {
    u128::from(after.dirty_pages) * 100 < u128::from(before.dirty_pages) * PROGRESS_PERCENT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::PageMix;

    /// A round of `sent` pages at 100,000 pages a second.
    fn round(sent: u64, dirty: u64, cpu_percent: u8) -> RoundReport {
        RoundReport {
            pages: PageMix {
                raw: sent,
                ..PageMix::default()
            },
            duration_us: sent * 10,
            dirty_pages: dirty,
            cpu_percent,
            ..RoundReport::default()
        }
    }

    const LIMITS: Limits = Limits {
        max_downtime: Duration::from_millis(20),
        fixed: Duration::from_millis(2),
    };

    fn decided(rounds: &[(u64, u64)]) -> Decision {
        let rounds: Vec<_> = rounds
            .iter()
            .map(|(sent, dirty)| round(*sent, *dirty, 100))
            .collect();
        decide(&rounds, &LIMITS)
    }

    #[test]
    fn what_converges_goes_on_until_it_fits_and_no_longer_shrinks() {
        let table: [(&[(u64, u64)], Decision); 7] = [
            (&[], Decision::Continue),
            (&[(100_000, 0)], Decision::Switchover),
            // 18 ms are left for pages: 1800 of them.
            (&[(100_000, 1801)], Decision::Continue),
            (&[(100_000, 1000)], Decision::Continue),
            (&[(100_000, 1000), (1000, 990)], Decision::Switchover),
            (&[(100_000, 1000), (1000, 300)], Decision::Continue),
            (
                &[(100_000, 1000), (1000, 300), (300, 40)],
                Decision::Switchover,
            ),
        ];
        for (rounds, expected) in table {
            assert_eq!(decided(rounds), expected, "{rounds:?}");
        }
    }

    #[test]
    fn what_does_not_converge_is_slowed_down_step_by_step() {
        let stuck = [(100_000, 5000), (5000, 5000), (5000, 4900)];
        assert_eq!(decided(&stuck), Decision::Throttle(75));
        assert_eq!(decided(&stuck[..2]), Decision::Continue);
        assert_eq!(
            decided(&[stuck[0], stuck[1], (5000, 3900)]),
            Decision::Continue
        );
        // Each step is given a whole round.
        let mut rounds = vec![round(100_000, 5000, 100), round(5000, 5000, 75)];
        assert_eq!(decide(&rounds, &LIMITS), Decision::Continue);
        rounds.push(round(5000, 5000, 75));
        assert_eq!(decide(&rounds, &LIMITS), Decision::Throttle(50));
        // What helps a little is given one more.
        let mut rounds = vec![round(100_000, 5000, 100), round(9000, 5000, 75)];
        rounds.push(round(9000, 5000, 75));
        assert_eq!(decide(&rounds, &LIMITS), Decision::Continue);
        rounds.push(round(9000, 5000, 75));
        assert_eq!(decide(&rounds, &LIMITS), Decision::Throttle(50));
        let slowest = vec![round(5000, 5000, 5); 3];
        assert_eq!(decide(&slowest, &LIMITS), Decision::Diverges);
    }

    #[test]
    fn what_goes_up_and_down_makes_no_progress() {
        let bursts = [(100_000, 5000), (5000, 8000), (8000, 5000), (5000, 8000)];
        assert_eq!(decided(&bursts[..2]), Decision::Continue);
        assert_eq!(decided(&bursts[..3]), Decision::Throttle(75));
        assert_eq!(decided(&bursts), Decision::Throttle(50));
    }

    #[test]
    fn with_nothing_left_no_limit_is_too_low() {
        let limits = Limits {
            max_downtime: Duration::ZERO,
            ..LIMITS
        };
        let decided = |dirty| decide(&[round(100_000, dirty, 100)], &limits);
        assert_eq!(decided(0), Decision::Switchover);
        assert_eq!(decided(1), Decision::Continue);
    }

    /// A round of 1000 pages and as many bytes of theirs, and these of devices.
    fn with_devices(device_bytes: u64, dirty: u64) -> RoundReport {
        RoundReport {
            wire_bytes: 1_000_000 + device_bytes,
            device_bytes,
            duration_us: 10_000 + device_bytes / 100,
            ..round(1000, dirty, 100)
        }
    }

    #[test]
    fn devices_states_do_not_make_pages_look_slow() {
        for device_bytes in [0, 500_000, 99_000_000] {
            let rounds = [with_devices(device_bytes, 100)];
            let predicted = predicted_blackout(&rounds, Duration::ZERO);
            assert_eq!(predicted, Duration::from_millis(1), "{device_bytes}");
        }
    }

    #[test]
    fn guest_is_not_slowed_down_for_rounds_that_devices_made_long() {
        let decided = |device_bytes| decide(&[with_devices(device_bytes, 5000); 3], &LIMITS);
        assert_eq!(decided(500_000), Decision::Throttle(15));
        assert_eq!(decided(2_000_000), Decision::Continue);
    }

    #[test]
    fn a_short_round_does_not_set_the_speed() {
        let mut slow = round(10, 100, 100);
        slow.duration_us = 1_000_000;
        let rounds = [round(100_000, 10, 100), slow];
        let predicted = predicted_blackout(&rounds, Duration::ZERO);
        assert_eq!(predicted, Duration::from_millis(1));
    }
}
