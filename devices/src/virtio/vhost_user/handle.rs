//! What others do with a device besides its transport: a migration, above all.

use std::fs::File;
use std::sync::Arc;

use parking_lot::Mutex;

use super::peer::{PeerError, VhostUserPeer};
use super::state::{self, VhostUserStateV1};
use super::watch::Shared;
use crate::device::DeviceId;
use crate::state::RestoreError;

/// The peer as device and handles share it. Taken after the transport's lock, with no other after
/// it, and held for the time of one exchange.
pub(super) type SharedPeer = Arc<Mutex<Box<dyn VhostUserPeer>>>;

/// Shared memory in which a peer marks pages of guest memory that it has written: one bit for 4 KiB
/// from guest-physical address 0 on, the least significant of each byte first.
#[derive(Clone, Debug)]
pub struct PeerLog {
    /// The memory, for the peer to map.
    pub file: Arc<File>,
    /// Its size; no page of guest memory lies beyond.
    pub bytes: u64,
}

/// A vhost-user device beside its transport.
#[derive(Clone)]
pub struct VhostUserHandle {
    pub(super) peer: SharedPeer,
    pub(super) shared: Arc<Shared>,
}

impl VhostUserHandle {
    /// The device's name.
    #[must_use]
    pub fn device(&self) -> &DeviceId {
        self.shared.reporter.device()
    }

    /// Has the peer mark in `log` what it writes from now on, also after it was stopped, started or
    /// connected again; or, with `None`, no longer.
    ///
    /// # Errors
    /// [`PeerError`]; what the peer marks is not known then, until it is told again.
    pub fn set_log(&self, log: Option<&PeerLog>) -> Result<(), PeerError> {
        self.peer.lock().set_log(log)
    }

    /// The state that is to be saved, as far as it is known while the device runs.
    #[must_use]
    pub fn state(&self) -> VhostUserStateV1 {
        self.shared.profile.lock().clone()
    }

    /// Whether the device could go on as `state`, which is not trusted.
    ///
    /// # Errors
    /// [`RestoreError`] names what differs.
    pub fn check(&self, state: &VhostUserStateV1) -> Result<(), RestoreError> {
        state::check(&self.shared.profile.lock(), state)
    }
}
