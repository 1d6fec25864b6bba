//! What comes after a round.

use std::time::{Duration, Instant};

use super::control::{Control, TICK};
use super::devices::Left;
use super::options::{OnTimeout, SourceError};
use super::pace::Pace;
use super::rounds::Rounds;
use crate::convergence::{Decision, decide, predicted_blackout};
use crate::handoff::Mode;

/// A round has to leave less than this share of a device's state, or it did not help.
const PROGRESS_PERCENT: u128 = 90;

/// Rounds without progress before devices' states are taken as they are.
const PATIENCE_ROUNDS: u32 = 2;

/// The shortest time between two looks at devices that the machine's stop waits for.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What devices whose state comes as a stream mean for the machine's stop.
#[derive(Clone, Debug, Default)]
pub(super) enum Hold {
    /// Nothing: it can be stopped as far as they are concerned.
    #[default]
    None,
    /// One is not ready for that: bytes of its state should be sent first.
    NotReady(Left),
    /// They take too long, but may be less after another round, or the connections faster; with
    /// the bytes per second that these carry.
    MayShrink(Left, u64),
    /// They take too long, and there is no point in waiting.
    TooLarge(Left, u64),
}

/// How devices' states have changed from round to round.
#[derive(Default)]
pub(super) struct Trend {
    least: Option<u64>,
    /// Rounds since it was clearly less than before.
    idle: u32,
}

impl Trend {
    fn note(&mut self, bytes: u64) {
        let is_less = |least: u64| u128::from(bytes) * 100 < u128::from(least) * PROGRESS_PERCENT;
        if self.least.is_none_or(is_less) {
            (self.least, self.idle) = (Some(bytes), 0);
        } else {
            self.idle += 1;
        }
    }
}

/// How long so many bytes take.
pub(super) fn time_of(bytes: u64, bytes_per_s: u64) -> Duration {
    let micros = u128::from(bytes) * 1_000_000 / u128::from(bytes_per_s.max(1));
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
}

impl Rounds<'_> {
    /// How the machine is to be stopped, if it is time for that.
    pub(super) fn after_round(&mut self) -> Result<Option<Mode>, SourceError> {
        let max_downtime = self.handle.tuning().max_downtime;
        let left = self.shared.devices.left();
        let rate = self.bytes_per_s();
        let device_time = match (&left, rate) {
            (Some(left), Some(rate)) => time_of(left.total.at_stop, rate),
            _ => Duration::ZERO,
        };
        let mut limits = self.handover.limits(max_downtime);
        limits.fixed = limits.fixed.saturating_add(device_time);
        let judged = self.reports.get(self.judged_from..).unwrap_or_default();
        let predicted = predicted_blackout(judged, limits.fixed);
        let mut decision = decide(judged, &limits);
        self.predicted = Some(predicted);
        self.publish(predicted);
        let is_beyond = self.handover.is_beyond(max_downtime);
        if is_beyond && matches!(decision, Decision::Throttle(_)) {
            decision = Decision::Diverges;
        }
        let is_long = !is_beyond && !device_time.is_zero() && limits.fixed > max_downtime;
        self.hold = left.map_or(Hold::None, |left| self.hold(left, is_long, rate));
        // Slowing the guest down does not make these less.
        decision = match (&self.hold, decision) {
            (Hold::None, decision) => decision,
            (Hold::TooLarge(..), _) => Decision::Diverges,
            (Hold::MayShrink(..), _) | (Hold::NotReady(_), Decision::Switchover) => {
                Decision::Continue
            }
            (Hold::NotReady(_), decision) => decision,
        };
        let is_beyond = is_beyond || matches!(self.hold, Hold::TooLarge(..));
        match (decision, self.options.on_timeout) {
            (Decision::Switchover, _) => return Ok(Some(Mode::Precopy)),
            (_, OnTimeout::Force) if self.is_late() => return Ok(Some(Mode::Precopy)),
            (_, OnTimeout::Postcopy) if self.is_late() => return Ok(Some(Mode::Postcopy)),
            (Decision::Diverges, OnTimeout::Postcopy) => return Ok(Some(Mode::Postcopy)),
            // Rounds may be shorter than the time between two looks at the clock.
            (_, OnTimeout::Cancel) if self.is_late() => return Err(self.too_late()),
            (Decision::Diverges, OnTimeout::Cancel) if is_beyond => return Err(self.too_late()),
            (Decision::Continue | Decision::Diverges, _) => {}
            (Decision::Throttle(percent), _) => {
                log::info!(percent; "the guest is slowed down: it writes faster than the link carries");
                self.cpu_percent = percent;
            }
        }
        Ok(None)
    }

    fn hold(&mut self, left: Left, is_long: bool, rate: Option<u64>) -> Hold {
        self.trend.note(left.total.at_stop);
        match (is_long, rate) {
            (true, Some(rate)) if self.trend.idle < PATIENCE_ROUNDS => Hold::MayShrink(left, rate),
            (true, Some(rate)) => Hold::TooLarge(left, rate),
            _ if left.total.before_stop > 0 => Hold::NotReady(left),
            _ => Hold::None,
        }
    }

    /// What the connections carry together: as found when they were last at work for long, or the
    /// limit that they are to keep. `None`: nothing is known.
    fn bytes_per_s(&self) -> Option<u64> {
        match (self.link_rate, self.handle.tuning().bandwidth_bytes_per_s) {
            (Some(found), Some(limit)) => Some(found.min(limit)),
            (found, limit) => found.or(limit),
        }
    }

    /// A device holds the machine's stop up, and there may be nothing else to do: waits a little,
    /// so that rounds do not follow each other for nothing.
    pub(super) fn wait_for_devices(
        &mut self,
        control: &mut Control,
        pages: u64,
    ) -> Result<(), SourceError> {
        let last = self.reports.last().map_or(0, |report| report.duration_us);
        if matches!(self.hold, Hold::None) {
            return Ok(());
        }
        let until = Instant::now() + LOOK_AGAIN.saturating_sub(Duration::from_micros(last));
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_late() {
                return Ok(());
            }
            std::thread::sleep(left.min(TICK));
            self.watch(control, pages)?;
        }
    }

    /// Why it did not come to a switchover.
    pub(super) fn too_late(&self) -> SourceError {
        let max_downtime = self.handle.tuning().max_downtime;
        let timeout = self.options.timeout;
        if self.handover.is_beyond(max_downtime) && !self.reports.is_empty() {
            return self.handover.refusal(max_downtime);
        }
        match &self.hold {
            Hold::TooLarge(left, bytes_per_s) | Hold::MayShrink(left, bytes_per_s) => {
                let (id, bytes) = left.largest.clone();
                SourceError::DeviceTooLarge {
                    max_downtime,
                    needed: time_of(left.total.at_stop, *bytes_per_s),
                    bytes_per_s: *bytes_per_s,
                    id,
                    bytes,
                }
            }
            Hold::NotReady(left) => {
                let (id, bytes) = left.holder.clone();
                SourceError::DeviceNotReady { timeout, id, bytes }
            }
            // The guest has not been asked for anything twice yet.
            Hold::None if self.number == 1 => SourceError::FirstRound {
                timeout,
                pace: Pace::since(self.began, self.shared),
            },
            Hold::None => SourceError::Timeout(timeout),
        }
    }
}
