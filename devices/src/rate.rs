//! I/O rate limits: token buckets over operations and bytes.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A limit on one quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Units per second, at least 1.
    pub per_second: u64,
    /// Units that may be used at once after a quiet time; one second's worth when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
}

/// Limits of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Bytes, both directions together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Rate>,
    /// Operations or packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<Rate>,
}

/// A bucket that fills at a constant rate. It may go into debt: an operation larger than the
/// burst passes and the next ones wait until it is paid for.
#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// Units available, negative in debt, in billionths: nanoseconds times rate stay exact.
    nano_units: i128,
    filled_at: Instant,
}

const NANO: i128 = 1_000_000_000;

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        let mut bucket = Self {
            rate,
            nano_units: 0,
            filled_at: now,
        };
        bucket.nano_units = bucket.capacity();
        bucket
    }

    fn capacity(&self) -> i128 {
        i128::from(self.rate.burst.unwrap_or(self.rate.per_second).max(1)) * NANO
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at).as_nanos();
        let gained = i128::try_from(elapsed)
            .unwrap_or(i128::MAX)
            .saturating_mul(i128::from(self.rate.per_second.max(1)));
        self.nano_units = self.nano_units.saturating_add(gained).min(self.capacity());
        self.filled_at = now;
    }

    /// How long until the bucket is out of debt.
    fn wait(&self) -> Option<Duration> {
        let debt = -self.nano_units;
        let nanos = debt / i128::from(self.rate.per_second.max(1)) + 1;
        (debt >= 0).then(|| Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

/// Decides when the next operation may begin.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    ops: Option<Bucket>,
}

impl RateLimiter {
    /// A limiter with full buckets.
    #[must_use]
    pub fn new(limits: RateLimits, now: Instant) -> Self {
        Self {
            bytes: limits.bytes.map(|rate| Bucket::new(rate, now)),
            ops: limits.ops.map(|rate| Bucket::new(rate, now)),
        }
    }

    /// Whether there is anything to limit.
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.ops.is_none()
    }

    /// `None` when an operation may begin now, else how long it has to wait.
    pub fn delay(&mut self, now: Instant) -> Option<Duration> {
        let buckets = [&mut self.bytes, &mut self.ops];
        let waits = buckets.into_iter().flatten().filter_map(|bucket| {
            bucket.fill(now);
            bucket.wait()
        });
        waits.max()
    }

    /// Pays for an operation of `bytes` bytes.
    pub fn charge(&mut self, bytes: u64) {
        for (bucket, units) in [(&mut self.bytes, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.nano_units -= i128::from(units) * NANO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(bytes: Option<u64>, ops: Option<u64>) -> RateLimits {
        let rate = |per_second| Rate {
            per_second,
            burst: None,
        };
        RateLimits {
            bytes: bytes.map(rate),
            ops: ops.map(rate),
        }
    }

    /// Operations of `size` bytes that begin within `seconds`.
    fn run(limiter: &mut RateLimiter, start: Instant, seconds: u64, size: u64) -> u64 {
        let mut now = start;
        let mut count = 0;
        while now < start + Duration::from_secs(seconds) {
            match limiter.delay(now) {
                Some(wait) => now += wait,
                None => {
                    limiter.charge(size);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn long_run_rate_is_the_limit_plus_one_burst() {
        let start = Instant::now();
        let mut ops = RateLimiter::new(limits(None, Some(100)), start);
        assert_eq!(run(&mut ops, start, 10, 4096), 1100);
        let mut bytes = RateLimiter::new(limits(Some(1 << 20), None), start);
        let done = run(&mut bytes, start, 10, 4096) * 4096;
        assert!((11 << 20..=(11 << 20) + 8192).contains(&done), "{done}");
    }

    #[test]
    fn operation_larger_than_the_burst_passes_once_and_is_paid_for() {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(limits(Some(1000), None), start);
        assert_eq!(limiter.delay(start), None);
        limiter.charge(5000);
        let wait = limiter.delay(start).unwrap();
        assert!(
            wait >= Duration::from_secs(4) && wait < Duration::from_millis(4001),
            "{wait:?}"
        );
        assert_eq!(limiter.delay(start + wait), None);
    }

    #[test]
    fn tighter_of_two_limits_holds() {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(limits(Some(4096 * 10), Some(100)), start);
        assert_eq!(run(&mut limiter, start, 10, 4096), 110);
        assert!(RateLimiter::new(RateLimits::default(), start).is_unlimited());
    }

    #[test]
    fn absurd_limits_do_not_overflow() {
        let start = Instant::now();
        for per_second in [0, 1, u64::MAX] {
            let mut limiter = RateLimiter::new(limits(Some(per_second), Some(per_second)), start);
            for _ in 0..3 {
                limiter.charge(u64::MAX);
                limiter.delay(start + Duration::from_secs(1 << 30));
            }
        }
    }
}
