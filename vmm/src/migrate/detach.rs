//! A move without the assigned devices: the guest lets them go before, and gets those of the
//! destination afterwards.

use std::time::{Duration, Instant};

use migration::progress::MigrationHandle;

use crate::config::DeviceConfig;
use crate::control::errors::chain;
use crate::machine::{CommandError, MachineLink, MigrationMachineError};

/// How long the guest may take to let a device go.
const LET_GO: Duration = Duration::from_secs(30);

/// Between two looks whether it has.
const LOOK: Duration = Duration::from_millis(20);

/// Devices stay where they are.
#[derive(Debug, thiserror::Error)]
pub(super) enum DetachError {
    /// The guest keeps one.
    #[error("{id}: the guest has not let it go within {} s; it may still do so, or not know how", LET_GO.as_secs())]
    Kept {
        /// The device.
        id: String,
    },
    /// One cannot be asked for.
    #[error("{id}")]
    Refused {
        /// The device.
        id: String,
        /// Why not.
        #[source]
        source: Box<CommandError>,
    },
    /// Somebody asked for it.
    #[error("it was cancelled")]
    Cancelled,
    /// The VM.
    #[error(transparent)]
    Machine(#[from] MigrationMachineError),
}

/// Devices that the guest has let go.
pub(super) struct Detached {
    link: MachineLink,
    devices: Vec<DeviceConfig>,
}

impl Detached {
    /// Has the guest let all assigned devices go, one by one. Those that it has let go are told
    /// also where it keeps others.
    pub(super) fn take_out(
        link: &MachineLink,
        handle: &MigrationHandle,
    ) -> (Self, Result<(), DetachError>) {
        let mut detached = Self {
            link: link.clone(),
            devices: Vec::new(),
        };
        let result = detached.take_all(handle);
        (detached, result)
    }

    fn take_all(&mut self, handle: &MigrationHandle) -> Result<(), DetachError> {
        for device in self.link.call(|controller| controller.assigned_configs())? {
            let id = device.id.clone().unwrap_or_default();
            self.take(&id, handle)?;
            log::info!(device = id.as_str(); "the guest has let a device go, so that it can move");
            self.devices.push(device);
        }
        let ids = self.ids();
        self.link
            .call(move |controller| controller.note_detached(ids))?;
        Ok(())
    }

    fn take(&self, id: &str, handle: &MigrationHandle) -> Result<(), DetachError> {
        let name = id.to_owned();
        let asked = self
            .link
            .call(move |controller| controller.ask_back(&name))?;
        asked.map_err(|source| DetachError::Refused {
            id: id.to_owned(),
            source: Box::new(source),
        })?;
        let deadline = Instant::now() + LET_GO;
        loop {
            let name = id.to_owned();
            if self
                .link
                .call(move |controller| !controller.has_assigned(&name))?
            {
                return Ok(());
            }
            if handle.is_cancelled() {
                return Err(DetachError::Cancelled);
            }
            if Instant::now() > deadline {
                return Err(DetachError::Kept { id: id.to_owned() });
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Their names.
    pub(super) fn ids(&self) -> Vec<String> {
        let ids = self.devices.iter().filter_map(|device| device.id.clone());
        ids.collect()
    }

    /// Gives the guest all of them again: the names of those that it has, and why it has not others.
    pub(super) fn put_back(self) -> (Vec<String>, Vec<String>) {
        let (mut back, mut lost) = (Vec::new(), Vec::new());
        for device in self.devices {
            let id = device.id.clone().unwrap_or_default();
            match self.link.plug_in(device) {
                Ok(()) => back.push(id),
                Err(error) => {
                    let error = chain(&error);
                    log::error!(device = id.as_str(), error = error.as_str(); "a device that was taken out of the guest to be moved cannot be put back");
                    lost.push(format!("{id} could not be put back: {error}"));
                }
            }
        }
        (back, lost)
    }
}
