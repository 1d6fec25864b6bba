//! The lifecycle that every device has.

use std::fmt;

use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};

/// Name of a device within its VM, stable over save and restore: `disk0`, `net1`, `serial`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(String);

impl DeviceId {
    /// Longest accepted name, in bytes.
    pub const MAX_LEN: usize = 32;

    /// Checks a name: 1 to 32 characters of `a-z`, `0-9`, `-`, `_`, starting with a letter.
    ///
    /// # Errors
    /// [`InvalidDeviceId`] with the offending name.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidDeviceId> {
        let name = name.into();
        let starts_well = name.starts_with(|c: char| c.is_ascii_lowercase());
        let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if starts_well && name.len() <= Self::MAX_LEN && name.chars().all(known) {
            Ok(Self(name))
        } else {
            Err(InvalidDeviceId(name))
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A device name that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "device id {0:?} is not usable: 1 to 32 characters of a-z, 0-9, '-' and '_', a letter first"
)]
pub struct InvalidDeviceId(String);

/// Whether a device's state can move to another process, asked before a migration connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Migratability {
    /// The state can be saved and restored elsewhere.
    Supported,
    /// It cannot; the reason is shown to the user.
    Blocked(String),
}

/// A device could not follow a lifecycle request.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The host refused something that the device needs to run (a thread, a descriptor).
    #[error("{id}: {what}")]
    Host {
        /// The device.
        id: DeviceId,
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// The device's own helper failed, an interrupt route or a peer process.
    #[error("{id}: {what}")]
    Internal {
        /// The device.
        id: DeviceId,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A device of the virtual machine.
///
/// The controller thread calls these; vCPUs reach the device through [`crate::IoHandler`] or
/// [`crate::pci::PciFunction`]. Implementations guard their state with one lock of their own.
///
/// Lifecycle: created or restored -> `wake` -> `start` -> (`calm` -> `pause` -> `wake` -> `start`)* -> dropped. `save` is called
/// only while paused and `restore` only before the first `start`.
pub trait Device: Send + Sync {
    /// The device's name.
    fn id(&self) -> &DeviceId;

    /// Begins or continues to work: device threads run, guest memory may be accessed.
    ///
    /// # Errors
    /// [`DeviceError`] when the host refuses a resource. The device stays paused.
    fn start(&self) -> Result<(), DeviceError>;

    /// Answers others again, but begins no work of its own yet: the first half of a start, which all
    /// devices go through before the first does the second.
    fn wake(&self) {}

    /// Begins no work of its own any more, but still answers others: the first half of a pause, which
    /// all devices go through before the first does the second. For devices that reach each other
    /// without the machine.
    fn calm(&self) {}

    /// Stops work. On return no I/O is in flight and no guest memory will be written.
    ///
    /// # Errors
    /// [`DeviceError`] when in-flight work cannot be completed.
    fn pause(&self) -> Result<(), DeviceError>;

    /// Returns to the power-on state. Called while paused.
    ///
    /// # Errors
    /// [`DeviceError`] when the host refuses a resource.
    fn reset(&self) -> Result<(), DeviceError>;

    /// Whether [`Device::save`] can work. Asked at any time, also while running.
    fn migratability(&self) -> Migratability;

    /// What [`Device::save`] writes and [`Device::restore`] reads: its own format, then those of
    /// states within its own. Told at any time, also while running: a peer is asked whether it
    /// reads them before anything else is sent.
    fn state_formats(&self) -> Vec<StateFormat>;

    /// The state that a guest or its driver can observe. Pure: changes neither the device nor
    /// guest memory.
    ///
    /// # Errors
    /// [`SaveError::Blocked`] when the device cannot be saved.
    fn save(&self) -> Result<DeviceState, SaveError>;

    /// Takes over a saved state. The state is untrusted: every field is checked.
    ///
    /// # Errors
    /// [`RestoreError`] names the field and the value that is out of range.
    fn restore(&self, state: &DeviceState) -> Result<(), RestoreError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_id_accepts_plain_names_only() {
        for good in ["disk0", "net-1", "a", "x_y"] {
            assert_eq!(DeviceId::new(good).unwrap().as_str(), good);
        }
        let long = "a".repeat(33);
        for bad in ["", "0disk", "Disk", "a/b", "a b", "\u{e9}", long.as_str()] {
            assert!(DeviceId::new(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
