//! The device's own state: a stream of bytes that is taken from one device and given to another.
//!
//! | the machine | the source's device | the destination's |
//! |---|---|---|
//! | runs | RUNNING, then PRE_COPY where it has that | RUNNING, then RESUMING |
//! | is paused, first half | RUNNING_P2P, or PRE_COPY_P2P | |
//! | is paused, second half | STOP, unless it is in PRE_COPY | |
//! | stands still | STOP_COPY | RESUMING, then STOP |
//! | is started, first half | RUNNING_P2P, if it did not move | RUNNING_P2P |
//! | is started, second half | RUNNING | RUNNING |

use super::AssignedFunction;
use crate::backend::BackendError;
use crate::function::HostNotice;
use crate::migration::{MigrationState, PreCopyInfo, TransitionError, VfioMigration, go_to};

/// What whoever asks for the device's migration state, or changes it, must know of those before.
#[derive(Default)]
pub(super) struct Turn {
    /// Its state was begun to be read while it ran.
    has_begun: bool,
}

/// A device's state could not be taken or given.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The device has no such interface.
    #[error("the device's driver cannot save its state")]
    Absent,
    /// It does not change its state.
    #[error(transparent)]
    Transition(#[from] TransitionError),
    /// A part of its state was read, and what comes now is not the rest.
    #[error("the device was reset while its state was read")]
    Reset,
    /// It was read or written.
    #[error("the device's state")]
    Data(#[from] BackendError),
}

impl AssignedFunction {
    /// What the device can, if its state can be taken at all.
    fn migration(&self) -> Result<&dyn VfioMigration, MoveError> {
        self.backend.migration().ok_or(MoveError::Absent)
    }

    /// Takes it from state to state, if it has any.
    fn go(&self, goal: MigrationState) -> Result<(), MoveError> {
        let _turn = self.turn.lock();
        Ok(go_to(self.migration()?, goal)?)
    }

    /// Takes the device to RUNNING. One that does not go there does not keep its machine from
    /// running: whoever listens is told that it has failed.
    pub(super) fn run(&self) {
        let Err(error) = self.go(MigrationState::Running) else {
            return;
        };
        if matches!(error, MoveError::Absent) {
            return;
        }
        self.has_failed(&chain(&error));
    }

    /// Whoever listens is told.
    fn has_failed(&self, why: &str) {
        log::error!(device:% = self.id, error = why; "an assigned device does not run: reset it or the VM");
        if let Some(hook) = &self.hook {
            hook(HostNotice::Error);
        }
    }

    /// It answers others again, and starts nothing of its own yet: the first half of a start.
    pub(super) fn wake(&self) {
        use MigrationState::{RunningP2p, Stop};
        self.go_if(|state, has_p2p| (has_p2p && state == Stop).then_some(RunningP2p));
    }

    /// It starts nothing of its own any more, but still answers: the first half of a pause.
    pub(super) fn calm(&self) {
        use MigrationState::{PreCopy, PreCopyP2p, Running, RunningP2p};
        self.go_if(|state, has_p2p| match state {
            PreCopy if has_p2p => Some(PreCopyP2p),
            Running if has_p2p => Some(RunningP2p),
            _ => None,
        });
    }

    /// It does nothing any more, unless its state is being read: [`stop_and_copy`] stops it then.
    ///
    /// [`stop_and_copy`]: Self::stop_and_copy
    pub(super) fn halt(&self) {
        use MigrationState::{Running, RunningP2p, Stop};
        self.go_if(|state, _| matches!(state, Running | RunningP2p).then_some(Stop));
    }

    /// A device that does not follow stays as it is, as those do that have no such states.
    fn go_if(&self, goal: impl FnOnce(MigrationState, bool) -> Option<MigrationState>) {
        let Some(device) = self.backend.migration() else {
            return;
        };
        let _turn = self.turn.lock();
        let state = device.state().map_err(TransitionError::State);
        let stopped = state.and_then(|state| match goal(state, device.features().p2p) {
            Some(goal) => go_to(device, goal),
            None => Ok(()),
        });
        if let Err(error) = stopped {
            let error = chain(&error);
            log::warn!(device:% = self.id, error = error.as_str(); "an assigned device does not follow its machine");
        }
    }

    /// Whether it must be alone to be moved: it could still be written to by another device, or write
    /// to one, when it is stopped.
    #[must_use]
    pub fn must_be_alone(&self) -> bool {
        let migration = self.backend.migration();
        migration.is_some_and(|device| device.reaches_peers() && !device.features().p2p)
    }

    /// Begins to read its state while it runs; `false` where that cannot be, or the machine stands
    /// still.
    ///
    /// # Errors
    /// [`MoveError`].
    pub fn begin_copy(&self) -> Result<bool, MoveError> {
        let mut turn = self.turn.lock();
        let device = self.migration()?;
        // What is left of a state that nobody wanted any more.
        close_session(device)?;
        let state = device.state().map_err(TransitionError::State)?;
        turn.has_begun = state == MigrationState::Running && device.features().pre_copy;
        if turn.has_begun {
            go_to(device, MigrationState::PreCopy)?;
        }
        Ok(turn.has_begun)
    }

    /// What is left to be read before it should be stopped, where it runs and tells.
    ///
    /// # Errors
    /// [`MoveError`].
    pub fn left_before_stop(&self) -> Result<PreCopyInfo, MoveError> {
        use MigrationState::{PreCopy, PreCopyP2p};
        let _turn = self.turn.lock();
        let device = self.migration()?;
        let state = device.state().map_err(TransitionError::State)?;
        if !matches!(state, PreCopy | PreCopyP2p) {
            return Ok(PreCopyInfo::default());
        }
        match device.pre_copy_info() {
            // It does not tell.
            Err(BackendError::Absent(_)) => Ok(PreCopyInfo::default()),
            info => Ok(info?),
        }
    }

    /// Bytes that would be left if it were stopped now; an estimate, 0 where it cannot tell.
    ///
    /// # Errors
    /// [`MoveError`].
    pub fn left_at_stop(&self) -> Result<u64, MoveError> {
        let _turn = self.turn.lock();
        match self.migration()?.data_size() {
            Err(BackendError::Absent(_) | BackendError::Refused { .. }) => Ok(0),
            size => Ok(size?),
        }
    }

    /// Stops it, and has the rest of its state ready. The machine is paused.
    ///
    /// # Errors
    /// [`MoveError`].
    pub fn stop_and_copy(&self) -> Result<(), MoveError> {
        self.stop_reading()?;
        // Between the device and the line an interrupt would be lost: vCPUs are saved next.
        self.lock().interrupts.settle();
        Ok(())
    }

    /// A device that was reset since has a state of which nothing was read.
    fn stop_reading(&self) -> Result<(), MoveError> {
        use MigrationState::{PreCopy, PreCopyP2p, StopCopy};
        let turn = self.turn.lock();
        let device = self.migration()?;
        let state = device.state().map_err(TransitionError::State)?;
        if turn.has_begun && !matches!(state, PreCopy | PreCopyP2p) {
            return Err(MoveError::Reset);
        }
        Ok(go_to(device, StopCopy)?)
    }

    /// Reads the next part of its state. 0: nothing at present while it runs, the end when it is
    /// stopped.
    ///
    /// # Errors
    /// [`MoveError`].
    pub fn read_state(&self, buf: &mut [u8]) -> Result<usize, MoveError> {
        let _turn = self.turn.lock();
        Ok(self.migration()?.read_data(buf)?)
    }

    /// Its state is not read any more. It runs where it ran, and stands still where it stood still; of one
    /// that has failed meanwhile, whoever listens is told.
    ///
    /// # Errors
    /// [`MoveError`].
    pub fn end_copy(&self) -> Result<(), MoveError> {
        let mut turn = self.turn.lock();
        turn.has_begun = false;
        let device = self.migration()?;
        close_session(device)?;
        let state = device.state().map_err(TransitionError::State)?;
        drop(turn);
        // Its machine may run on without having been paused: nobody else would say so.
        if state == MigrationState::Error {
            self.has_failed("it is in ERROR");
        }
        Ok(())
    }

    /// Gives it the next part of another's state. The machine has not run yet.
    ///
    /// # Errors
    /// [`MoveError`]; it is to be reset then.
    pub fn write_state(&self, data: &[u8]) -> Result<(), MoveError> {
        let _turn = self.turn.lock();
        let device = self.migration()?;
        // As long as it resumes, that costs a call.
        go_to(device, MigrationState::Resuming)?;
        Ok(device.write_data(data)?)
    }

    /// That was all: the device takes it over, and stands still.
    ///
    /// # Errors
    /// [`MoveError`]; it is to be reset then.
    pub fn finish_state(&self) -> Result<(), MoveError> {
        self.go(MigrationState::Resuming)?;
        self.go(MigrationState::Stop)
    }
}

/// The device's state is not read any more: it runs where it ran, and else stands still.
fn close_session(device: &dyn VfioMigration) -> Result<(), TransitionError> {
    use MigrationState::{PreCopy, PreCopyP2p, Running, Stop, StopCopy};
    match device.state().map_err(TransitionError::State)? {
        PreCopy => go_to(device, Running),
        PreCopyP2p | StopCopy => go_to(device, Stop),
        _ => Ok(()),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let causes: Vec<_> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}
