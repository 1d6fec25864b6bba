//! Giving a PCI function to vfio-pci, and back to the host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::sysfs::Folder;
use crate::Bdf;

const VFIO_PCI: &str = "vfio-pci";

/// A function cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// There is no such function.
    #[error("there is no PCI function {0}: `lspci -D` lists them")]
    NoDevice(Bdf),
    /// It is a bridge.
    #[error("{0} is a bridge: assign the functions behind it, not the bridge")]
    Bridge(Bdf),
    /// The host has no such driver.
    #[error("{0} cannot be bound to vfio-pci, which the host does not have: `modprobe vfio-pci`")]
    NoDriver(Bdf),
    /// A file of the kernel does not take what was written.
    #[error("{device}: cannot write to {}", .file.display())]
    Write {
        /// The function.
        device: Bdf,
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The driver did not take the function; it is with the host again.
    #[error("vfio-pci does not take {0}: the kernel's log says why")]
    NotTaken(Bdf),
}

/// Takes a function from the driver that has it and binds it to vfio-pci. What it had is told:
/// `None` when it had no driver. One that vfio-pci has stays as it is.
///
/// # Errors
/// [`BindError`].
pub fn bind_vfio(sysfs: &Path, device: Bdf) -> Result<Option<String>, BindError> {
    let (path, folder) = function(sysfs, device)?;
    let had = folder.driver();
    if had.as_deref() == Some(VFIO_PCI) {
        return Ok(had);
    }
    if folder.is_bridge() {
        return Err(BindError::Bridge(device));
    }
    if !sysfs.join("bus/pci/drivers").join(VFIO_PCI).is_dir() {
        return Err(BindError::NoDriver(device));
    }
    let bound = rebind(sysfs, device, &path, VFIO_PCI);
    if bound.is_ok() && folder.driver().as_deref() == Some(VFIO_PCI) {
        return Ok(had);
    }
    if let Err(error) = rebind(sysfs, device, &path, "") {
        log::warn!(device:%, error:%; "a PCI function is left without its driver");
    }
    bound.and(Err(BindError::NotTaken(device)))
}

/// Gives a function back to the host, whose drivers may take it. The one that does is told.
///
/// # Errors
/// [`BindError`].
pub fn release_vfio(sysfs: &Path, device: Bdf) -> Result<Option<String>, BindError> {
    let (path, folder) = function(sysfs, device)?;
    rebind(sysfs, device, &path, "")?;
    Ok(folder.driver())
}

fn function(sysfs: &Path, device: Bdf) -> Result<(PathBuf, Folder), BindError> {
    let path = sysfs.join("bus/pci/devices").join(device.to_string());
    let folder = Folder::find(&path).ok_or(BindError::NoDevice(device))?;
    Ok((path, folder))
}

/// Lets only `driver` take a function, or any driver of the host when there is no name
/// (Documentation/ABI/testing/sysfs-bus-pci, `driver_override`).
fn rebind(sysfs: &Path, device: Bdf, path: &Path, driver: &str) -> Result<(), BindError> {
    let write = |file: PathBuf, text: &str| {
        // In one piece, and no new file where there is none.
        let written = fs::OpenOptions::new().write(true).open(&file);
        let written = written
            .and_then(|mut file| io::Write::write_all(&mut file, format!("{text}\n").as_bytes()));
        written.map_err(|source| BindError::Write {
            device,
            file,
            source,
        })
    };
    write(path.join("driver_override"), driver)?;
    let address = device.to_string();
    if path.join("driver").exists() {
        write(path.join("driver/unbind"), &address)?;
    }
    write(sysfs.join("bus/pci/drivers_probe"), &address)
}
