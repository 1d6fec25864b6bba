//! The migration interface of the model: bytes that are taken from one and given to another.

use std::io;

use parking_lot::Mutex;

use crate::backend::BackendError;
use crate::migration::{MigrationFeatures, MigrationState, PreCopyInfo, VfioMigration};

/// Takes single arcs only, and says which.
pub struct ModelMigration {
    features: MigrationFeatures,
    inner: Mutex<Inner>,
}

struct Inner {
    state: MigrationState,
    /// What is taken and given.
    bytes: Vec<u8>,
    /// How much of it was read.
    read: usize,
    /// What was given so far.
    given: Vec<u8>,
    /// States it was in since it was last asked.
    visited: Vec<MigrationState>,
    /// The arc into this state fails, and leaves it in `Error`.
    broken: Option<MigrationState>,
}

impl ModelMigration {
    /// Of a device that holds `bytes`.
    pub(super) fn new(features: MigrationFeatures, bytes: &[u8]) -> Self {
        Self {
            features,
            inner: Mutex::new(Inner {
                state: MigrationState::Running,
                bytes: bytes.to_vec(),
                read: 0,
                given: Vec::new(),
                visited: Vec::new(),
                broken: None,
            }),
        }
    }

    /// What the device holds.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.inner.lock().bytes.clone()
    }

    /// The states that it has come to since the last call.
    #[must_use]
    pub fn visited(&self) -> Vec<MigrationState> {
        std::mem::take(&mut self.inner.lock().visited)
    }

    /// From now on it does not come to `state`.
    pub fn break_at(&self, state: MigrationState) {
        self.inner.lock().broken = Some(state);
    }

    pub(super) fn reset(&self) {
        let mut inner = self.inner.lock();
        inner.state = MigrationState::Running;
        inner.given.clear();
    }
}

fn refused(what: &'static str) -> BackendError {
    let source = io::ErrorKind::InvalidInput.into();
    BackendError::Refused { what, source }
}

impl VfioMigration for ModelMigration {
    fn features(&self) -> MigrationFeatures {
        self.features
    }

    fn state(&self) -> Result<MigrationState, BackendError> {
        Ok(self.inner.lock().state)
    }

    fn take_arc(&self, to: MigrationState) -> Result<(), BackendError> {
        let mut inner = self.inner.lock();
        let way = inner.state.way_to(to, self.features);
        if way.is_none_or(|way| way.len() != 1) {
            return Err(refused("take what is no arc"));
        }
        if inner.broken == Some(to) {
            inner.state = MigrationState::Error;
            return Err(refused("take an arc"));
        }
        match (inner.state, to) {
            (MigrationState::Resuming, _) => {
                let given = std::mem::take(&mut inner.given);
                if given.len() != inner.bytes.len() {
                    inner.state = MigrationState::Error;
                    return Err(refused("take a state over that is not whole"));
                }
                inner.bytes = given;
            }
            (MigrationState::Running, MigrationState::PreCopy)
            | (MigrationState::Stop, MigrationState::StopCopy) => inner.read = 0,
            _ => {}
        }
        inner.state = to;
        inner.visited.push(to);
        Ok(())
    }

    fn data_size(&self) -> Result<u64, BackendError> {
        Ok(self.inner.lock().bytes.len() as u64)
    }

    fn pre_copy_info(&self) -> Result<PreCopyInfo, BackendError> {
        let inner = self.inner.lock();
        let half = inner.bytes.len() / 2;
        Ok(PreCopyInfo {
            initial_bytes: half.saturating_sub(inner.read) as u64,
            dirty_bytes: 0,
        })
    }

    fn read_data(&self, buf: &mut [u8]) -> Result<usize, BackendError> {
        let mut inner = self.inner.lock();
        let end = match inner.state {
            MigrationState::StopCopy => inner.bytes.len(),
            MigrationState::PreCopy | MigrationState::PreCopyP2p => inner.bytes.len() / 2,
            _ => return Err(refused("give its state")),
        };
        let read = inner.read;
        let part = inner.bytes.get(read..end).unwrap_or_default();
        let count = part.len().min(buf.len());
        buf[..count].copy_from_slice(&part[..count]);
        inner.read += count;
        Ok(count)
    }

    fn write_data(&self, data: &[u8]) -> Result<(), BackendError> {
        let mut inner = self.inner.lock();
        if inner.state != MigrationState::Resuming {
            return Err(refused("take a state"));
        }
        inner.given.extend_from_slice(data);
        Ok(())
    }
}
