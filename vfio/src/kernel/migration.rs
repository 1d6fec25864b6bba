//! A device's migration interface (include/uapi/linux/vfio.h, `VFIO_DEVICE_FEATURE_MIGRATION` and what
//! follows).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use parking_lot::Mutex;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIGRATION, VFIO_MIGRATION_P2P,
    VFIO_MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY,
};

use super::ioctl;
use crate::backend::BackendError;
use crate::migration::{MigrationFeatures, MigrationState, PreCopyInfo, VfioMigration};

/// The interface of a device that has one.
pub(super) struct KernelMigration {
    device: File,
    features: MigrationFeatures,
    /// Through which data flows in those states that have any.
    session: Mutex<Option<File>>,
}

impl KernelMigration {
    /// `None`: the device has none, or does not tell: it can be assigned all the same.
    pub(super) fn query(device: BorrowedFd<'_>) -> Option<Self> {
        let asked = Self::ask(device);
        asked.unwrap_or_else(|error| {
            log::warn!(error:%; "a device does not tell whether it can be moved");
            None
        })
    }

    fn ask(device: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        const GET: u32 = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIGRATION;
        let flags = match ioctl::feature(device, GET, 0) {
            Ok(flags) => flags,
            // Devices without it answer ENOTTY, and kernels without any of this EINVAL.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let has = |flag: u32| flags & u64::from(flag) != 0;
        if !has(VFIO_MIGRATION_STOP_COPY) {
            return Ok(None);
        }
        Ok(Some(Self {
            device: device.try_clone_to_owned()?.into(),
            features: MigrationFeatures {
                p2p: has(VFIO_MIGRATION_P2P),
                pre_copy: has(VFIO_MIGRATION_PRE_COPY),
            },
            session: Mutex::new(None),
        }))
    }

    /// A reset ends it.
    pub(super) fn end_session(&self) {
        *self.session.lock() = None;
    }
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> BackendError {
    move |source| BackendError::Refused { what, source }
}

const NO_SESSION: BackendError = BackendError::Absent("migration data in this state");

impl VfioMigration for KernelMigration {
    fn features(&self) -> MigrationFeatures {
        self.features
    }

    fn state(&self) -> Result<MigrationState, BackendError> {
        const GET: u32 = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
        let state = ioctl::feature(self.device.as_fd(), GET, 0);
        let state = state.map_err(refused("tell its migration state"))?;
        // The other half is a descriptor, which is only returned where a state is set.
        let [a, b, c, d, ..] = state.to_le_bytes();
        let number = u32::from_le_bytes([a, b, c, d]);
        MigrationState::of_number(number)
            .ok_or(BackendError::Absent("migration state of that number"))
    }

    fn take_arc(&self, to: MigrationState) -> Result<(), BackendError> {
        let mut session = self.session.lock();
        let set = ioctl::set_migration_state(self.device.as_fd(), to.number());
        match set.map_err(refused("take an arc of its migration states"))? {
            Some(file) => *session = Some(file.into()),
            // From a state that is read while the device runs the same session goes on.
            None if to.has_data() => {}
            None => *session = None,
        }
        Ok(())
    }

    fn data_size(&self) -> Result<u64, BackendError> {
        const GET: u32 = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE;
        let size = ioctl::feature(self.device.as_fd(), GET, 0);
        size.map_err(refused("tell how large its state is"))
    }

    fn pre_copy_info(&self) -> Result<PreCopyInfo, BackendError> {
        let session = self.session.lock();
        let file = session.as_ref().ok_or(NO_SESSION)?;
        let info = ioctl::precopy_info(file.as_fd());
        let info = info.map_err(refused("tell how much of its state is left"))?;
        Ok(PreCopyInfo {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
        })
    }

    fn read_data(&self, buf: &mut [u8]) -> Result<usize, BackendError> {
        let session = self.session.lock();
        let mut file = session.as_ref().ok_or(NO_SESSION)?;
        loop {
            return match file.read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // There is no more until the device is stopped, or has changed something.
                Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => Ok(0),
                read => read.map_err(refused("give its state")),
            };
        }
    }

    fn write_data(&self, data: &[u8]) -> Result<(), BackendError> {
        let session = self.session.lock();
        let mut file = session.as_ref().ok_or(NO_SESSION)?;
        file.write_all(data).map_err(refused("take a state"))
    }
}
