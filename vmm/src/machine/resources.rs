//! What the configuration names on the host, opened before anything is built.
//!
//! Resources outlive a reset of the machine: disks stay locked, terminals stay connected.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::boot::{BootImage, KernelSource};
use crate::config::{CharTarget, VmConfig};
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
    /// A host end of a byte stream.
    #[error("{device}")]
    Endpoint {
        /// The device.
        device: &'static str,
        /// Why not.
        #[source]
        source: EndpointError,
    },
}

/// Everything opened.
pub struct Resources {
    /// Kernel, initrd, command line.
    pub boot: BootImage,
    /// Host end of the serial port.
    pub serial: Endpoint,
}

impl Resources {
    /// Opens what `config` names. `builtin` is booted when the configuration names no kernel.
    ///
    /// # Errors
    /// [`ResourceError`] names the resource and the host's answer.
    pub fn open(config: &VmConfig, builtin: Option<&'static [u8]>) -> Result<Self, ResourceError> {
        let kernel = match (&config.boot.kernel, builtin) {
            (Some(path), _) => KernelSource::File(open_boot_file("kernel", path)?),
            (None, Some(bytes)) => KernelSource::Builtin(bytes),
            (None, None) => return Err(ResourceError::NoKernel),
        };
        let initrd = config.boot.initrd.as_deref();
        let boot = BootImage {
            kernel,
            initrd: initrd
                .map(|path| open_boot_file("initrd", path))
                .transpose()?,
            command_line: config.boot.cmdline.clone(),
        };
        let serial = endpoint("serial", &config.serial)?;
        Ok(Self { boot, serial })
    }
}

fn open_boot_file(what: &'static str, path: &Path) -> Result<File, ResourceError> {
    File::open(path).map_err(|source| ResourceError::BootFile {
        what,
        path: path.to_owned(),
        source,
    })
}

fn endpoint(device: &'static str, target: &CharTarget) -> Result<Endpoint, ResourceError> {
    Endpoint::open(target).map_err(|source| ResourceError::Endpoint { device, source })
}
