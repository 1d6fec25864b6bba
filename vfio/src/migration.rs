//! How a device's state is taken and given: the state machine of VFIO migration, version 2
//! (`enum vfio_device_mig_state` of include/uapi/linux/vfio.h).
//!
//! A device goes from state to state by arcs. Drover asks for single arcs only, so that a failure says
//! which one it was; the kernel would also combine them.

use std::collections::VecDeque;
use std::fmt;

use crate::backend::BackendError;

/// What a device's migration interface can do (`VFIO_DEVICE_FEATURE_MIGRATION`). All can be stopped and
/// their state read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationFeatures {
    /// It has states in which it answers peers but starts nothing itself.
    pub p2p: bool,
    /// Its state can be read while it runs.
    pub pre_copy: bool,
}

/// A device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MigrationState {
    /// It has failed; only a reset helps, and it runs then.
    Error,
    /// It changes nothing, neither of its own nor of memory.
    Stop,
    /// It works.
    Running,
    /// It is stopped, and its state is read.
    StopCopy,
    /// It is stopped, and given a state.
    Resuming,
    /// It works, but starts no access to other devices.
    RunningP2p,
    /// It works, and its state is read meanwhile.
    PreCopy,
    /// It starts no access to other devices, and its state is read meanwhile.
    PreCopyP2p,
}

use MigrationState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

/// By their numbers.
const ALL: [MigrationState; 8] = [
    Error, Stop, Running, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p,
];

/// An arc, from and to.
type Arc = (MigrationState, MigrationState);

/// Of all devices.
const ARCS: [Arc; 5] = [
    (StopCopy, Stop),
    (Stop, StopCopy),
    (Stop, Resuming),
    (Resuming, Stop),
    (PreCopy, Running),
];

/// Of those that have the states for peers.
const ARCS_P2P: [Arc; 9] = [
    (Running, RunningP2p),
    (RunningP2p, Running),
    (RunningP2p, Stop),
    (Stop, RunningP2p),
    (PreCopy, PreCopyP2p),
    (PreCopyP2p, PreCopy),
    (RunningP2p, PreCopyP2p),
    (PreCopyP2p, RunningP2p),
    (PreCopyP2p, StopCopy),
];

/// Of those that have not.
const ARCS_ALONE: [Arc; 3] = [(Running, Stop), (Stop, Running), (PreCopy, StopCopy)];

/// Of all that have a state to be read while they run.
const ARC_PRE_COPY: Arc = (Running, PreCopy);

impl MigrationState {
    /// The state of a number; `None` for numbers that later kernels may have.
    #[must_use]
    pub fn of_number(number: u32) -> Option<Self> {
        ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Error => 0,
            Stop => 1,
            Running => 2,
            StopCopy => 3,
            Resuming => 4,
            RunningP2p => 5,
            PreCopy => 6,
            PreCopyP2p => 7,
        }
    }

    /// Whether devices with these features have it.
    #[must_use]
    pub fn is_of(self, features: MigrationFeatures) -> bool {
        match self {
            RunningP2p => features.p2p,
            PreCopy => features.pre_copy,
            PreCopyP2p => features.p2p && features.pre_copy,
            Error | Stop | Running | StopCopy | Resuming => true,
        }
    }

    /// Whether data flows in it: of the state that is read, or given.
    #[must_use]
    pub fn has_data(self) -> bool {
        matches!(self, StopCopy | Resuming | PreCopy | PreCopyP2p)
    }

    /// The states on the shortest way to another one, which is the last; none where it is that one
    /// already. `None` where there is no way: into and out of [`MigrationState::Error`], and to states
    /// that the device has not.
    #[must_use]
    pub fn way_to(self, goal: Self, features: MigrationFeatures) -> Option<Vec<Self>> {
        let mut ways = VecDeque::from([(self, Vec::new())]);
        let mut seen = vec![self];
        while let Some((state, way)) = ways.pop_front() {
            if state == goal {
                return Some(way);
            }
            for next in state.neighbours(features) {
                if !seen.contains(&next) {
                    seen.push(next);
                    ways.push_back((next, [&way[..], &[next]].concat()));
                }
            }
        }
        None
    }

    fn neighbours(self, features: MigrationFeatures) -> impl Iterator<Item = Self> {
        let of_peers = match features.p2p {
            true => &ARCS_P2P[..],
            false => &ARCS_ALONE[..],
        };
        let arcs = ARCS.iter().chain(of_peers).chain([&ARC_PRE_COPY]);
        let arcs = arcs.filter(move |(from, to)| *from == self && to.is_of(features));
        arcs.map(|(_, to)| *to)
    }
}

impl fmt::Display for MigrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Error => "ERROR",
            Stop => "STOP",
            Running => "RUNNING",
            StopCopy => "STOP_COPY",
            Resuming => "RESUMING",
            RunningP2p => "RUNNING_P2P",
            PreCopy => "PRE_COPY",
            PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

/// What is left to be read while a device runs (`struct vfio_precopy_info`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PreCopyInfo {
    /// Bytes that should be moved before it is stopped: they save time then.
    pub initial_bytes: u64,
    /// Bytes that it has changed since they were read.
    pub dirty_bytes: u64,
}

/// A device's state as a byte stream. Methods are called by one thread at a time.
pub trait VfioMigration: Sync {
    /// What the device can do.
    fn features(&self) -> MigrationFeatures;

    /// Whether it can reach other devices without the machine, so that all have to be calm before the
    /// first is stopped.
    fn reaches_peers(&self) -> bool {
        true
    }

    /// Where it is now; it may be left anywhere by whoever had it before.
    ///
    /// # Errors
    /// [`BackendError`].
    fn state(&self) -> Result<MigrationState, BackendError>;

    /// Takes one arc.
    ///
    /// # Errors
    /// [`BackendError`]; the device may then be where it was, or in [`MigrationState::Error`].
    fn take_arc(&self, to: MigrationState) -> Result<(), BackendError>;

    /// Bytes that the device would have to send if it were stopped now; an estimate.
    ///
    /// # Errors
    /// [`BackendError`].
    fn data_size(&self) -> Result<u64, BackendError>;

    /// What is left to be read in [`MigrationState::PreCopy`].
    ///
    /// # Errors
    /// [`BackendError`], in any other state.
    fn pre_copy_info(&self) -> Result<PreCopyInfo, BackendError>;

    /// Reads the next part of the state. 0: there is nothing more while the device runs, or, in
    /// [`MigrationState::StopCopy`], that was all.
    ///
    /// # Errors
    /// [`BackendError`]; the device must then be reset, unless it runs.
    fn read_data(&self, buf: &mut [u8]) -> Result<usize, BackendError>;

    /// Writes the next part of a saved state.
    ///
    /// # Errors
    /// [`BackendError`]; the device must then be reset, whatever it says afterwards.
    fn write_data(&self, data: &[u8]) -> Result<(), BackendError>;
}

/// A device is not in the state that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum TransitionError {
    /// There is no such way.
    #[error("a device does not go from {from} to {to}")]
    NoWay {
        /// Where it is.
        from: MigrationState,
        /// Where it should be.
        to: MigrationState,
    },
    /// The device has refused an arc.
    #[error("the device does not go from {from} to {to}, and is in {}", Known(*.now))]
    Arc {
        /// Where it was.
        from: MigrationState,
        /// The next state on its way.
        to: MigrationState,
        /// Where it is now, if it tells.
        now: Option<MigrationState>,
        /// Why.
        #[source]
        source: BackendError,
    },
    /// It does not say where it is.
    #[error("the device does not tell its migration state")]
    State(#[source] BackendError),
}

struct Known(Option<MigrationState>);

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(state) => state.fmt(f),
            None => f.write_str("a state that it does not tell"),
        }
    }
}

/// Takes a device to a state, arc by arc.
///
/// # Errors
/// [`TransitionError`] says where it is then.
pub fn go_to(device: &dyn VfioMigration, goal: MigrationState) -> Result<(), TransitionError> {
    let mut from = device.state().map_err(TransitionError::State)?;
    let way = from.way_to(goal, device.features());
    for to in way.ok_or(TransitionError::NoWay { from, to: goal })? {
        device.take_arc(to).map_err(|source| TransitionError::Arc {
            from,
            to,
            now: device.state().ok(),
            source,
        })?;
        from = to;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: MigrationFeatures = MigrationFeatures {
        p2p: false,
        pre_copy: false,
    };
    const FULL: MigrationFeatures = MigrationFeatures {
        p2p: true,
        pre_copy: true,
    };

    #[test]
    fn ways_are_the_kernels() {
        let full = |from: MigrationState, to| from.way_to(to, FULL);
        assert_eq!(full(Running, Running), Some(vec![]));
        assert_eq!(full(Running, PreCopy), Some(vec![PreCopy]));
        assert_eq!(full(PreCopy, StopCopy), Some(vec![PreCopyP2p, StopCopy]));
        assert_eq!(
            full(Running, Resuming),
            Some(vec![RunningP2p, Stop, Resuming])
        );
        assert_eq!(
            full(Resuming, Running),
            Some(vec![Stop, RunningP2p, Running])
        );
        assert_eq!(
            full(StopCopy, Running),
            Some(vec![Stop, RunningP2p, Running])
        );
        let alone = |from: MigrationState, to| from.way_to(to, ALONE);
        assert_eq!(alone(Running, StopCopy), Some(vec![Stop, StopCopy]));
        assert_eq!(alone(Resuming, Running), Some(vec![Stop, Running]));
        assert_eq!(alone(Running, PreCopy), None);
        assert_eq!(alone(Running, RunningP2p), None);
        let pre_copy = MigrationFeatures {
            pre_copy: true,
            ..ALONE
        };
        assert_eq!(PreCopy.way_to(StopCopy, pre_copy), Some(vec![StopCopy]));
        assert!(!PreCopyP2p.is_of(pre_copy));
    }

    #[test]
    fn nothing_leads_into_an_error_or_out_of_it_and_everything_else_everywhere() {
        for features in [(false, false), (false, true), (true, false), (true, true)] {
            let (p2p, pre_copy) = features;
            let features = MigrationFeatures { p2p, pre_copy };
            for from in ALL.into_iter().filter(|state| state.is_of(features)) {
                for to in ALL {
                    let is_possible =
                        from == to || (from != Error && to != Error && to.is_of(features));
                    let way = from.way_to(to, features);
                    assert_eq!(way.is_some(), is_possible, "{from} to {to}, {features:?}");
                }
            }
        }
    }

    #[test]
    fn states_have_their_numbers() {
        for (number, state) in (0..).zip(ALL) {
            assert_eq!(state.number(), number);
            assert_eq!(MigrationState::of_number(number), Some(state));
        }
        assert_eq!(MigrationState::of_number(8), None);
    }
}
