//! The state of a device, as a snapshot has it.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use migration::ports::{DeviceSink, PortError};
use migration::snapshot::DeviceRecord;

/// Bytes that are read at once.
const PART_BYTES: usize = 1 << 20;

/// A device's state cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceReadError {
    /// Its file cannot be read.
    #[error("{} cannot be read", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It was changed.
    #[error(
        "{} has check sum {found:#010x} instead of {expected:#010x}: it is damaged",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its check sum.
        found: u32,
        /// What the manifest says.
        expected: u32,
    },
    /// The device.
    #[error(transparent)]
    Device(#[from] PortError),
}

/// The state of a device in its file.
pub(crate) struct SnapshotDevice {
    file: File,
    path: PathBuf,
    record: DeviceRecord,
}

impl SnapshotDevice {
    pub(super) fn new(file: File, path: PathBuf, record: DeviceRecord) -> Self {
        Self { file, path, record }
    }

    /// Its name within the VM.
    pub(crate) fn id(&self) -> &str {
        &self.record.id
    }

    /// Gives it to a device, which has taken it over when this returns.
    ///
    /// # Errors
    /// [`DeviceReadError`]; what the device has taken is no state, and it can be reset only.
    pub(crate) fn give(mut self, sink: &dyn DeviceSink) -> Result<(), DeviceReadError> {
        let mut buffer = vec![0; PART_BYTES];
        let mut check = crc32fast::Hasher::new();
        loop {
            let part = match self.file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => buffer.get(..count).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    let path = self.path;
                    return Err(DeviceReadError::Host { path, source });
                }
            };
            check.update(part);
            sink.write(part)?;
        }
        let (found, expected) = (check.finalize(), self.record.check);
        if found != expected {
            return Err(DeviceReadError::Damaged {
                path: self.path,
                found,
                expected,
            });
        }
        Ok(sink.finish()?)
    }
}
