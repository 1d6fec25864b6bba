//! How many units are due at a requested rate.

/// Hands out units (pages, packets) at a steady rate over a tick counter.
///
/// A gap longer than [`Pacer::MAX_GAP_MS`], such as a paused or migrating machine, is not made up for:
/// afterwards the rate is as before, without a burst.
#[derive(Clone, Debug)]
pub struct Pacer {
    units_per_second: u64,
    ticks_per_second: u64,
    last: u64,
    /// Units owed, times `ticks_per_second`.
    credit: u128,
}

impl Pacer {
    /// Longest gap that is made up for, milliseconds.
    pub const MAX_GAP_MS: u64 = 20;

    /// Starts at tick `now`. A rate of 0 is no limit.
    #[must_use]
    pub fn new(units_per_second: u64, ticks_per_second: u64, now: u64) -> Self {
        Self {
            units_per_second,
            ticks_per_second,
            last: now,
            credit: 0,
        }
    }

    /// Units to do now, at most `limit`; what is returned counts as done.
    pub fn due(&mut self, now: u64, limit: u64) -> u64 {
        if self.units_per_second == 0 {
            return limit;
        }
        // A clock that stepped back (the machine moved) adds nothing.
        let gap_limit = self.ticks_per_second * Self::MAX_GAP_MS / 1000;
        let elapsed = now.saturating_sub(self.last).min(gap_limit);
        self.last = now;
        self.credit += u128::from(elapsed) * u128::from(self.units_per_second);
        let per_unit = u128::from(self.ticks_per_second.max(1));
        let units = u64::try_from(self.credit / per_unit)
            .unwrap_or(u64::MAX)
            .min(limit);
        self.credit -= u128::from(units) * per_unit;
        // Work that cannot keep up does not pile up a debt either.
        self.credit = self
            .credit
            .min(u128::from(gap_limit) * u128::from(self.units_per_second));
        units
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_kept_without_rounding_loss() {
        let mut pacer = Pacer::new(333, 1_000_000, 0);
        let done: u64 = (1..=10_000)
            .map(|step| pacer.due(step * 1000, u64::MAX))
            .sum();
        assert_eq!(done, 3330);
    }

    #[test]
    fn long_gap_is_forgotten() {
        let mut pacer = Pacer::new(1_000_000, 1_000_000_000, 0);
        assert_eq!(pacer.due(5_000_000_000, u64::MAX), 20_000);
        assert_eq!(pacer.due(5_001_000_000, u64::MAX), 1_000);
    }

    #[test]
    fn clock_that_steps_back_adds_nothing_and_goes_on() {
        let mut pacer = Pacer::new(1000, 1000, 1_000_000);
        assert_eq!(pacer.due(5, 100), 0);
        assert_eq!(pacer.due(15, 100), 10);
    }

    #[test]
    fn limit_defers_but_does_not_pile_up() {
        let mut pacer = Pacer::new(1000, 1000, 0);
        for step in 1..=100 {
            assert_eq!(pacer.due(step * 10, 1), 1);
        }
        assert!(pacer.due(1000, u64::MAX) <= 20);
    }

    #[test]
    fn rate_zero_is_unlimited() {
        assert_eq!(Pacer::new(0, 1000, 0).due(0, 64), 64);
    }
}
