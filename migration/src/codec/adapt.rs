//! Which encoding suits link and CPU: pure, fed with what each batch took.
//!
//! A connection that has room wants pages fast: they go as they are. One that is full leaves time
//! to make pages smaller, so then they are compressed; that alone keeps link and CPU both busy.
//! But a full connection may also mean a destination that cannot keep up, on a host that this one
//! shares its CPUs with, where compressing takes away what is missing. So both ways are measured
//! now and then, and the one that moves more memory per second is kept.

use std::time::Duration;

use super::encoder::Encoding;

/// Memory after which a way is judged.
const SPAN_BYTES: u64 = 1 << 20;

/// Memory at the beginning of which nothing is known yet: a slow connection, too, takes the first
/// of it at once, into its buffers.
const EARLY_BYTES: u64 = 16 << 20;

/// Memory per second of one connection below which keeping versions costs nothing that counts:
/// some microseconds of every page's time.
const SLOW_BYTES_PER_S: f64 = 150e6;

/// Memory per second of one connection above which it is worth finding out soon whether pages
/// that go as they are go faster.
const FAST_BYTES_PER_S: f64 = 200e6;

/// Spans until the other way is tried: at first, where pages do not go fast, and at least and most
/// later on. A slow connection pays most for a trial, and gains by it only when CPUs are slower
/// still.
const FIRST_INTERVAL: u32 = 2;
const SLOW_INTERVAL: u32 = 64;
const MIN_INTERVAL: u32 = 256;
const MAX_INTERVAL: u32 = 4096;

/// The same after a change on a slow connection: it may have been the hosts' other work that made
/// one way look better, and there the wrong one may be many times slower.
const CONFIRM_INTERVAL: u32 = 16;

/// Spans that a way is tried for.
const TRIAL_SPANS: u32 = 2;

/// How many times longer the next wait is after a failure.
const BACK_OFF: u32 = 4;

/// Spans after a change that still fill, or empty, what the connection holds.
const SETTLE_SPANS: u32 = 2;

/// The other way must be better by this factor.
const MARGIN: f64 = 1.05;

/// Share of a new measurement in a rate.
const WEIGHT: f64 = 0.5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Never compress.
    Plain,
    /// Compress when the connection is full.
    Balanced,
}

impl Way {
    fn other(self) -> Self {
        match self {
            Self::Plain => Self::Balanced,
            Self::Balanced => Self::Plain,
        }
    }
}

/// What a batch took.
#[derive(Clone, Copy, Debug)]
pub struct BatchFacts {
    /// Pages that are not zero, in bytes.
    pub bytes: u64,
    /// Of these, pages sent as changes.
    pub delta_bytes: u64,
    /// From reading the pages to the last write.
    pub elapsed: Duration,
}

/// Chooses encodings for one connection.
#[derive(Clone, Debug)]
pub struct Adaptive {
    way: Way,
    /// Whether the connection was ever full: until then nothing can be gained.
    was_full: bool,
    /// Memory so far.
    seen_bytes: u64,
    /// Spans for which `way` is still being tried, 0 when it is not.
    trial_spans: u32,
    /// Whether a span of this round has been judged.
    was_judged: bool,
    /// Memory per second, plain and balanced.
    rates: [Option<f64>; 2],
    span: BatchFacts,
    /// Whether much of the last span were changes.
    is_delta_rich: bool,
    /// Spans until the other way is tried, and how many it is after a failure.
    left: u32,
    interval: u32,
    /// Spans that are not judged.
    settle: u32,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            way: Way::Balanced,
            was_full: false,
            seen_bytes: 0,
            trial_spans: 0,
            was_judged: false,
            rates: [None; 2],
            span: EMPTY,
            is_delta_rich: false,
            left: FIRST_INTERVAL,
            interval: MIN_INTERVAL,
            settle: SETTLE_SPANS,
        }
    }
}

const EMPTY: BatchFacts = BatchFacts {
    bytes: 0,
    delta_bytes: 0,
    elapsed: Duration::ZERO,
};

impl Adaptive {
    /// How the next batch travels; `is_full` tells whether the connection has no room, `is_known`
    /// whether the destination has older versions of its pages.
    pub fn choose(&mut self, is_full: bool, is_known: bool) -> Encoding {
        self.was_full |= is_full;
        match self.way {
            // Changes are few bytes: on a link that may be slow, better than to fill it.
            Way::Balanced if is_full || (is_known && self.keeps()) => Encoding::Delta,
            Way::Balanced | Way::Plain => Encoding::Raw,
        }
    }

    /// Whether versions of pages are worth keeping that go as they are now: the connection may
    /// be a slow one, for which changes will be wanted.
    #[must_use]
    pub fn keeps(&self) -> bool {
        if !self.was_full {
            return self.seen_bytes < EARLY_BYTES;
        }
        let [plain, balanced] = self.rates;
        // Not measured yet, plain is not judged by what keeping would cost it.
        let rate = plain.or(balanced);
        self.is_delta_rich || rate.is_none_or(|rate| rate < SLOW_BYTES_PER_S)
    }

    /// A new round: what it sends was sent before, and changes may do, whatever was best so far.
    pub fn begin_round(&mut self) {
        *self = Self {
            was_full: self.was_full,
            seen_bytes: self.seen_bytes,
            ..Self::default()
        };
    }

    /// Takes in what the batch took.
    pub fn note(&mut self, batch: &BatchFacts) {
        self.seen_bytes = self.seen_bytes.saturating_add(batch.bytes);
        if !self.was_full {
            return;
        }
        self.span.bytes += batch.bytes;
        self.span.delta_bytes += batch.delta_bytes;
        self.span.elapsed += batch.elapsed;
        if self.span.bytes >= SPAN_BYTES {
            let span = std::mem::replace(&mut self.span, EMPTY);
            self.judge(&span);
        }
    }

    fn rate(&mut self, way: Way) -> &mut Option<f64> {
        let [plain, balanced] = &mut self.rates;
        match way {
            Way::Plain => plain,
            Way::Balanced => balanced,
        }
    }

    fn judge(&mut self, span: &BatchFacts) {
        self.is_delta_rich = span.delta_bytes * 4 > span.bytes;
        if self.settle > 0 {
            self.settle -= 1;
            return;
        }
        let way = self.way;
        let seconds = span.elapsed.as_secs_f64().max(1e-9);
        let measured = span.bytes as f64 / seconds;
        let rate = self.rate(way);
        let mixed = rate.map_or(measured, |old| old + (measured - old) * WEIGHT);
        *rate = Some(mixed);
        if !self.was_judged {
            self.was_judged = true;
            if measured < FAST_BYTES_PER_S {
                self.left = SLOW_INTERVAL;
            }
        }
        if self.trial_spans > 0 {
            self.trial_spans -= 1;
            if self.trial_spans > 0 {
                return;
            }
            let before = (*self.rate(way.other())).unwrap_or(0.0);
            if mixed > before * MARGIN {
                self.interval = match mixed < FAST_BYTES_PER_S {
                    true => CONFIRM_INTERVAL,
                    false => MIN_INTERVAL,
                };
            } else {
                self.way = way.other();
                self.settle = SETTLE_SPANS;
                self.interval = (self.interval * BACK_OFF).min(MAX_INTERVAL);
            }
            self.left = self.interval;
            return;
        }
        // Pages sent as they are lose their old versions: what is gained by those is not risked.
        if self.is_delta_rich {
            return;
        }
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            self.trial_spans = TRIAL_SPANS;
            self.way = way.other();
            self.settle = SETTLE_SPANS;
            // A rate from long ago says little.
            *self.rate(way.other()) = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link and a CPU, in bytes per second; `shared`: the destination needs the same CPU.
    struct Model {
        link: f64,
        plain: f64,
        packed: f64,
        ratio: f64,
        shared: Option<(f64, f64)>,
    }

    const BATCH: f64 = 262_144.0;

    impl Model {
        /// Seconds that a batch takes here, on the link, and at the destination.
        fn costs(&self, packed: bool) -> (f64, f64) {
            let (cpu, bytes) = match packed {
                true => (BATCH / self.packed, BATCH * self.ratio),
                false => (BATCH / self.plain, BATCH),
            };
            let there = self.shared.map_or(0.0, |(plain, unpacked)| match packed {
                true => BATCH / unpacked,
                false => BATCH / plain,
            });
            // One CPU for both sides: their work adds up.
            (cpu + there, bytes / self.link)
        }

        /// Seconds for 4 GiB when every batch goes the same way.
        fn fixed(&self, packed: bool) -> f64 {
            let (cpu, link) = self.costs(packed);
            cpu.max(link) * 16_384.0
        }

        fn adaptive(&self) -> f64 {
            let (mut now, mut backlog) = (0.0_f64, 0.0_f64);
            let mut adaptive = Adaptive::default();
            for _ in 0..16_384 {
                // A connection is full long before it holds all that it can, 2 batches; or when
                // the destination starves.
                let is_full = backlog > BATCH / 16.0 / self.link || self.shared.is_some();
                let packed = adaptive.choose(is_full, false) == Encoding::Delta;
                let (cpu, link) = self.costs(packed);
                let room = 2.0 * BATCH / self.link;
                let wait = (backlog + link - room).max(0.0).max(cpu);
                backlog = (backlog + link - wait).max(0.0);
                now += wait;
                adaptive.note(&BatchFacts {
                    bytes: 262_144,
                    delta_bytes: 0,
                    elapsed: Duration::from_secs_f64(wait),
                });
            }
            now + backlog
        }
    }

    #[test]
    fn it_is_never_slower_than_the_better_way_by_more_than_a_twentieth() {
        let mut table = Vec::new();
        for link in [0.125e9, 1.25e9, 3.1e9, 12e9] {
            for (packed, ratio) in [(0.7e9, 0.4), (0.7e9, 0.9), (2.5e9, 0.2), (0.3e9, 0.5)] {
                for shared in [None, Some((3e9, 1.5e9))] {
                    table.push(Model {
                        link,
                        plain: 3e9,
                        packed,
                        ratio,
                        shared,
                    });
                }
            }
        }
        for model in table {
            let best = model.fixed(true).min(model.fixed(false));
            let found = model.adaptive();
            assert!(
                found <= best * 1.05,
                "{found:.2} s instead of {best:.2} s at link {:e}, packed {:e}, ratio {}, shared {:?}",
                model.link,
                model.packed,
                model.ratio,
                model.shared
            );
        }
    }

    #[test]
    fn a_link_with_room_gets_pages_as_they_are() {
        let mut adaptive = Adaptive::default();
        for _ in 0..10_000 {
            assert_eq!(adaptive.choose(false, false), Encoding::Raw);
            assert_eq!(adaptive.keeps(), adaptive.seen_bytes < EARLY_BYTES);
            adaptive.note(&BatchFacts {
                bytes: 262_144,
                delta_bytes: 0,
                elapsed: Duration::from_micros(80),
            });
        }
    }

    fn noted(adaptive: &mut Adaptive, bytes_per_s: f64) -> Encoding {
        let encoding = adaptive.choose(true, false);
        adaptive.note(&BatchFacts {
            bytes: 262_144,
            delta_bytes: 0,
            elapsed: Duration::from_secs_f64(262_144.0 / bytes_per_s),
        });
        encoding
    }

    /// Other work on the hosts slows the compressed way down for a while, right before the other is
    /// tried.
    #[test]
    fn what_looked_better_by_chance_is_soon_given_up() {
        let mut adaptive = Adaptive::default();
        let (mut plain_bytes, mut was_plain) = (0, false);
        for _ in 0..16_384 {
            was_plain |= adaptive.way == Way::Plain;
            let rate = match (adaptive.way, was_plain) {
                (Way::Plain, _) => 125e6,
                (Way::Balanced, false) => 90e6,
                (Way::Balanced, true) => 300e6,
            };
            if noted(&mut adaptive, rate) == Encoding::Raw {
                plain_bytes += 262_144;
            }
        }
        assert!(was_plain && adaptive.way == Way::Balanced);
        assert!(plain_bytes < 64 << 20, "{plain_bytes} bytes");
    }

    #[test]
    fn a_slow_link_keeps_versions_whatever_is_tried() {
        let (mut slow, mut fast) = (Adaptive::default(), Adaptive::default());
        let mut tried = false;
        for step in 0..10_000_u32 {
            let noise = f64::from(step * 7919 % 40) / 100.0;
            tried |= noted(&mut slow, 60e6 * (1.0 + noise)) == Encoding::Raw;
            assert!(slow.keeps());
            // Plain is twice as fast.
            let factor = if fast.way == Way::Plain { 2.0 } else { 1.0 };
            noted(&mut fast, 900e6 * factor);
        }
        assert!(tried && fast.way == Way::Plain && !fast.keeps());
        fast.begin_round();
        assert_eq!(noted(&mut fast, 900e6), Encoding::Delta);
    }

    #[test]
    fn changes_go_to_a_link_that_may_be_slow_also_when_it_has_room() {
        let mut adaptive = Adaptive::default();
        assert_eq!(adaptive.choose(false, true), Encoding::Delta);
        for _ in 0..1000 {
            noted(&mut adaptive, 60e6);
        }
        adaptive.begin_round();
        assert_eq!(adaptive.choose(false, true), Encoding::Delta);
        assert_eq!(adaptive.choose(false, false), Encoding::Raw);
        // Until it has shown that it is fast.
        while adaptive.keeps() {
            noted(&mut adaptive, 900e6);
        }
        assert_eq!(adaptive.choose(false, true), Encoding::Raw);
    }

    #[test]
    fn what_goes_as_changes_is_not_risked() {
        let mut adaptive = Adaptive::default();
        for _ in 0..10_000 {
            assert_eq!(adaptive.choose(true, false), Encoding::Delta);
            assert!(adaptive.keeps(), "a moment of room loses no versions");
            adaptive.note(&BatchFacts {
                bytes: 262_144,
                delta_bytes: 262_144,
                elapsed: Duration::from_micros(300),
            });
        }
    }
}
