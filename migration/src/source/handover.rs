//! What handing over takes, whatever is dirty.

use std::time::Duration;

use super::options::SourceError;
use crate::convergence::Limits;

/// What stopping and handing over take on a link without delay, whatever the machine.
const FIXED: Duration = Duration::from_micros(1000);

/// The destination is asked whether it is ready, and told to go on; the VM stands still until it
/// has answered.
const ROUND_TRIPS: u32 = 2;

/// Answers that take less say more of how busy the hosts are at that moment than of the way.
const NEAR: Duration = Duration::from_millis(5);

/// The part of a blackout that no round makes shorter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handover {
    /// The shortest time that an answer has taken.
    round_trip: Duration,
    /// What saving and restoring the machine's state takes.
    state_time: Duration,
}

impl Handover {
    /// Over a link with this delay, there and back, of a machine whose state takes so long.
    pub(super) fn over(round_trip: Duration, state_time: Duration) -> Self {
        Self {
            round_trip,
            state_time,
        }
    }

    /// What the blackout may be.
    pub(super) fn limits(self, max_downtime: Duration) -> Limits {
        Limits {
            max_downtime,
            fixed: FIXED
                .saturating_add(self.state_time)
                .saturating_add(self.travel()),
        }
    }

    /// Whether the answers or the state alone take longer than that: then slowing the guest down
    /// does not help.
    pub(super) fn is_beyond(self, max_downtime: Duration) -> bool {
        let here = FIXED.saturating_add(self.state_time);
        self.is_far(max_downtime) || here > max_downtime
    }

    fn is_far(self, max_downtime: Duration) -> bool {
        self.round_trip > NEAR && self.travel() > max_downtime
    }

    /// What to say to somebody who has asked for that.
    pub(super) fn refusal(self, max_downtime: Duration) -> SourceError {
        if self.is_far(max_downtime) {
            return SourceError::Distance {
                max_downtime,
                round_trip: self.round_trip,
            };
        }
        SourceError::State {
            max_downtime,
            needed: FIXED.saturating_add(self.state_time),
        }
    }

    fn travel(self) -> Duration {
        self.round_trip.saturating_mul(ROUND_TRIPS)
    }
}
