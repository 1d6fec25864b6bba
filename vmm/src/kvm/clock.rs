//! The paravirtual clock's state on the wire.

use devices::state::{DeviceState, RestoreError, SaveError, StateFormat};
use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use serde::{Deserialize, Serialize};

const KIND: &str = "kvm-clock";

/// The clock's state, as written and read here.
pub const CLOCK_FORMAT: StateFormat = StateFormat::first(KIND);

/// The paravirtual clock of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockState {
    /// Nanoseconds since the VM's clock began.
    pub nanos: u64,
    /// The host's real time at that instant, in nanoseconds since 1970, if KVM tells.
    pub realtime_nanos: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct ClockStateV1 {
    nanos: u64,
    /// Not added to the guest's time, see `tsc`: two hosts' clocks need not agree.
    realtime_nanos: Option<u64>,
}

impl ClockState {
    pub(super) fn of(data: &kvm_clock_data) -> Self {
        let has_realtime = data.flags & KVM_CLOCK_REALTIME != 0;
        Self {
            nanos: data.clock,
            realtime_nanos: has_realtime.then_some(data.realtime),
        }
    }

    /// For the wire.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn save(&self) -> Result<DeviceState, SaveError> {
        let wire = ClockStateV1 {
            nanos: self.nanos,
            realtime_nanos: self.realtime_nanos,
        };
        CLOCK_FORMAT.encode(&wire)
    }

    /// From the wire.
    ///
    /// # Errors
    /// [`RestoreError`] for another kind of state, or a time that no clock reaches.
    pub fn restore(state: &DeviceState) -> Result<Self, RestoreError> {
        let wire: ClockStateV1 = CLOCK_FORMAT.decode(state)?;
        if i64::try_from(wire.nanos).is_err() {
            let why = "later than any clock goes";
            return Err(RestoreError::field(KIND, "nanos", wire.nanos, why));
        }
        Ok(Self {
            nanos: wire.nanos,
            realtime_nanos: wire.realtime_nanos,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_versions, golden_states};
    use super::*;

    #[test]
    fn clock_state_round_trips_and_impossible_times_are_refused() {
        let mut clock = ClockState {
            nanos: 5,
            realtime_nanos: Some(7),
        };
        let state = clock.save().unwrap();
        assert_eq!(ClockState::restore(&state).unwrap(), clock);
        for len in 0..state.bytes.len() {
            let mut cut = state.clone();
            cut.bytes.truncate(len);
            assert!(ClockState::restore(&cut).is_err(), "{len} bytes");
        }
        clock.nanos = 1 << 63;
        let refused = ClockState::restore(&clock.save().unwrap()).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "state of kind \"kvm-clock\": nanos is 9223372036854775808: later than any clock goes"
        );
    }

    #[test]
    fn golden_states_of_clocks_are_read_and_written_as_they_were() {
        let clock = ClockState {
            nanos: 123_456_789_012,
            realtime_nanos: Some(1_700_000_000_123_456_789),
        };
        let states = golden_states("clock", || clock.save().ok());
        check_versions(&states, CLOCK_FORMAT);
        for state in states {
            let read = ClockState::restore(&state).unwrap();
            assert_eq!(read, clock);
            if state.version == CLOCK_FORMAT.newest {
                assert_eq!(read.save().unwrap(), state);
            }
        }
    }
}
