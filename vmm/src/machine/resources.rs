//! What the configuration names on the host, opened before anything is built.
//!
//! Resources outlive a reset of the machine: disks stay locked, terminals stay connected.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::DeviceId;
use devices::events::EventSink;

use super::controller::Terminals;
use super::peripherals::{self, DiskLocks, PeripheralError, Peripherals};
use crate::boot::{BootImage, KernelSource};
use crate::config::VmConfig;
use crate::host::chardev::{Endpoint, EndpointError};

/// A resource could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// A kernel or initrd.
    #[error("{what} {} cannot be opened", path.display())]
    BootFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// There is nothing to boot.
    #[error("no kernel is given: use --kernel FILE, or [boot] kernel in the configuration file")]
    NoKernel,
    /// The serial port's host end.
    #[error("serial")]
    Serial(#[source] EndpointError),
    /// A device of the configuration.
    #[error("{device}")]
    Peripheral {
        /// The device.
        device: DeviceId,
        /// Why not.
        #[source]
        source: PeripheralError,
    },
}

/// Everything opened.
pub struct Resources {
    /// Kernel, initrd, command line.
    pub boot: BootImage,
    /// Host end of the serial port.
    pub serial: Endpoint,
    /// Devices over their open host ends.
    pub(super) peripherals: Peripherals,
}

impl Resources {
    /// Opens what `config` names. `builtin` is booted when the configuration names no kernel;
    /// devices report to `events`.
    ///
    /// # Errors
    /// [`ResourceError`] names the resource and the host's answer.
    pub(super) fn open(
        config: &VmConfig,
        builtin: Option<&'static [u8]>,
        locks: DiskLocks,
        events: Arc<dyn EventSink>,
    ) -> Result<Self, ResourceError> {
        let opened = Self::open_all(config, builtin, locks, events);
        opened.map_err(|mut errors| errors.remove(0))
    }

    /// Opens everything.
    ///
    /// # Errors
    /// All that cannot be opened, at least one; nothing stays open.
    pub(super) fn open_all(
        config: &VmConfig,
        builtin: Option<&'static [u8]>,
        locks: DiskLocks,
        events: Arc<dyn EventSink>,
    ) -> Result<Self, Vec<ResourceError>> {
        let boot = Self::open_boot(config, builtin);
        let serial = Endpoint::open(&config.serial).map_err(ResourceError::Serial);
        let peripherals = peripherals::open(config, locks, events);
        match (boot, serial, peripherals) {
            (Ok(boot), Ok(serial), Ok(peripherals)) => Ok(Self {
                boot,
                serial,
                peripherals,
            }),
            (boot, serial, peripherals) => {
                let mut errors: Vec<_> = boot.err().into_iter().chain(serial.err()).collect();
                let peripherals = peripherals.err().into_iter().flatten();
                errors.extend(
                    peripherals
                        .map(|(device, source)| ResourceError::Peripheral { device, source }),
                );
                Err(errors)
            }
        }
    }

    fn open_boot(
        config: &VmConfig,
        builtin: Option<&'static [u8]>,
    ) -> Result<BootImage, ResourceError> {
        let kernel = match (&config.boot.kernel, builtin) {
            (Some(path), _) => KernelSource::File {
                file: open_boot_file("kernel", path)?,
                path: path.clone(),
            },
            (None, Some(bytes)) => KernelSource::Builtin(bytes),
            (None, None) => return Err(ResourceError::NoKernel),
        };
        let initrd = config.boot.initrd.as_deref();
        Ok(BootImage {
            kernel,
            initrd: initrd
                .map(|path| open_boot_file("initrd", path))
                .transpose()?,
            command_line: config.boot.cmdline.clone(),
        })
    }

    /// What others open to reach the guest.
    pub(super) fn terminals(&self) -> Terminals {
        let path = |endpoint: &Endpoint| {
            // Whoever asks may be in another folder.
            let path = std::path::absolute(endpoint.path()?).ok()?;
            Some(path.display().to_string())
        };
        let console = self.peripherals.console.as_ref();
        Terminals {
            serial: path(&self.serial),
            console: console.and_then(|console| path(&console.endpoint)),
        }
    }
}

fn open_boot_file(what: &'static str, path: &Path) -> Result<File, ResourceError> {
    let open = || {
        let mut options = File::options();
        // Opening a FIFO would wait for a writer.
        let file = options
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("not a regular file"));
        }
        Ok(file)
    };
    open().map_err(|source| ResourceError::BootFile {
        what,
        path: path.to_owned(),
        source,
    })
}
