//! A histogram of durations with a bounded relative error and no allocation.
//!
//! Values below 32 have a bucket each; above, every power of two is split into 32 buckets, so a
//! percentile is at most 1/32 too high.

const SUB_BITS: u32 = 5;
const SUB_BUCKETS: usize = 1 << SUB_BITS;
const MAX_BITS: u32 = 40;
const BUCKETS: usize = SUB_BUCKETS * (MAX_BITS - SUB_BITS + 1) as usize;

/// Counts values up to 2^40; larger ones count as 2^40.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: [u32; BUCKETS],
    count: u64,
    sum: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [0; BUCKETS],
            count: 0,
            sum: 0,
            max: 0,
        }
    }
}

impl Histogram {
    /// Adds one value.
    pub fn record(&mut self, value: u64) {
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
        self.max = self.max.max(value);
        let slot = &mut self.buckets[bucket(value)];
        *slot = slot.saturating_add(1);
    }

    /// Number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Largest value.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// Arithmetic mean, 0 without values.
    #[must_use]
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count).unwrap_or(0)
    }

    /// The smallest bucket limit that at least `percent` of the values do not exceed; 0 without values.
    #[must_use]
    pub fn percentile(&self, percent: u64) -> u64 {
        let rank = (self.count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (index, &count) in self.buckets.iter().enumerate() {
            seen += u64::from(count);
            if seen >= rank {
                return upper_limit(index).min(self.max);
            }
        }
        self.max
    }
}

fn bucket(value: u64) -> usize {
    let value = value.min((1 << MAX_BITS) - 1);
    let bits = u64::BITS - value.leading_zeros();
    let shift = bits.saturating_sub(SUB_BITS + 1);
    (shift as usize) * SUB_BUCKETS + (value >> shift) as usize
}

fn upper_limit(index: usize) -> u64 {
    let shift = (index / SUB_BUCKETS).saturating_sub(1);
    let base = (index - shift * SUB_BUCKETS) as u64;
    ((base + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_within_a_thirty_second_of_its_bucket_limit() {
        let mut value = 0_u64;
        let mut last = 0;
        while value < 1 << MAX_BITS {
            let index = bucket(value);
            assert!(index >= last && index < BUCKETS, "{value}");
            let limit = upper_limit(index);
            assert!(
                limit >= value && limit <= value + value / 32,
                "{value} -> {limit}"
            );
            last = index;
            value += 1 + value / 97;
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn percentiles_of_a_known_set() {
        let mut histogram = Histogram::default();
        for value in 1..=1000 {
            histogram.record(value);
        }
        assert_eq!(
            (histogram.count(), histogram.mean(), histogram.max()),
            (1000, 500, 1000)
        );
        let (median, tail) = (histogram.percentile(50), histogram.percentile(99));
        assert!((500..=516).contains(&median), "{median}");
        assert!((990..=1000).contains(&tail), "{tail}");
        assert_eq!(histogram.percentile(100), 1000);
    }

    #[test]
    fn empty_histogram_is_all_zero() {
        let histogram = Histogram::default();
        assert_eq!(
            (histogram.mean(), histogram.percentile(50), histogram.max()),
            (0, 0, 0)
        );
    }
}
