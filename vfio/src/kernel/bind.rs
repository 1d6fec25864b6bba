//! Giving a PCI function to vfio-pci, and back to the host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::NO_IOMMU;
use super::holders::{self, Holder, Holders};
use super::sysfs::{Folder, is_vfio_driver};
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
    /// No IOMMU translates for it: nobody could open it.
    #[error("{0} {NO_IOMMU}")]
    NoIommu(Bdf),
    /// It has virtual functions or mediated devices, which would go.
    #[error(
        "{device} has parts, which others may have: {functions}; give those, or have none made of it"
    )]
    Divided {
        /// The function.
        device: Bdf,
        /// Its virtual functions and mediated devices.
        functions: String,
    },
    /// A process has it open.
    #[error("{device} is in use: it is open in {holders}")]
    InUse {
        /// The function.
        device: Bdf,
        /// By whom.
        holders: Holders,
    },
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
/// `None` when it had no driver. One that any driver of VFIO has stays as it is: those of vendors know
/// more of their devices. So does one that has virtual functions, or is open.
///
/// # Errors
/// [`BindError`].
pub fn bind_vfio(sysfs: &Path, device: Bdf) -> Result<Option<String>, BindError> {
    let (path, folder) = function(sysfs, device)?;
    let had = folder.driver();
    // Drivers of VFIO show a node of the device, whatever they are called.
    if had.as_deref().is_some_and(is_vfio_driver) || (had.is_some() && folder.cdev().is_some()) {
        return Ok(had);
    }
    if folder.is_bridge() {
        return Err(BindError::Bridge(device));
    }
    // Found out only afterwards, it would have lost its driver for nothing.
    if folder.group().is_none() {
        return Err(BindError::NoIommu(device));
    }
    check_unused(sysfs, device, &folder)?;
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

/// Nobody is to lose it, or a part of it.
fn check_unused(sysfs: &Path, device: Bdf, folder: &Folder) -> Result<(), BindError> {
    let names = folder.names("").into_iter();
    let functions: Vec<_> = names
        .filter(|name| name.starts_with("virtfn"))
        .map(|name| folder.link(&name).unwrap_or(name))
        .collect();
    let functions = [functions, mediated(folder)].concat();
    if !functions.is_empty() {
        let functions = functions.join(", ");
        return Err(BindError::Divided { device, functions });
    }
    // Beside this host's /sys, or a recorded one, are its processes.
    let proc = sysfs.parent().unwrap_or(Path::new("/")).join("proc");
    let group = folder.group().map(|group| format!("/dev/vfio/{group}"));
    let holders = match group {
        Some(node) => holders::find(&proc, &[node]),
        None => Holders::default(),
    };
    // A VM that has one function of the group may have another.
    let is_other = |holder: &Holder| holder.pid != std::process::id();
    let holders = Holders(holders.0.into_iter().filter(is_other).collect());
    match holders.0.is_empty() {
        true => Ok(()),
        false => Err(BindError::InUse { device, holders }),
    }
}

/// The mediated devices that a function's driver has made of it.
fn mediated(folder: &Folder) -> Vec<String> {
    let kinds = folder.names("mdev_supported_types").into_iter();
    let devices =
        kinds.flat_map(|kind| folder.names(&format!("mdev_supported_types/{kind}/devices")));
    devices.collect()
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
