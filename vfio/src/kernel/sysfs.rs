//! A device's folder in `/sys`, and the nodes that lead to the device.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Bytes of an attribute that are read: the kernel's have one page.
const TEXT_MAX: u64 = 4096;

/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 65_536;

/// Where this process finds the host.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) dev: PathBuf,
    pub(super) proc: PathBuf,
}

impl Host {
    /// The host below `root`: `/`, or a recorded one.
    pub(super) fn below(root: &Path) -> Self {
        Self {
            dev: root.join("dev"),
            proc: root.join("proc"),
        }
    }
}

/// A device's folder: `/sys/bus/pci/devices/BDF` or `/sys/bus/mdev/devices/UUID`.
#[derive(Clone, Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    /// The device's own folder, whichever way leads to it; `None` when there is none.
    pub(super) fn find(path: &Path) -> Option<Self> {
        let path = fs::canonicalize(path).ok()?;
        path.is_dir().then_some(Self(path))
    }

    /// The device's name: its address or its UUID.
    pub(super) fn name(&self) -> String {
        let name = self.0.file_name().unwrap_or_default();
        printable(&name.to_string_lossy())
    }

    /// What an attribute says.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        text(&self.0.join(name))
    }

    /// The names in a folder of it, sorted.
    pub(super) fn names(&self, name: &str) -> Vec<String> {
        names(&self.0.join(name))
    }

    /// The last name of what a link leads to.
    pub(super) fn link(&self, name: &str) -> Option<String> {
        let target = fs::read_link(self.0.join(name)).ok()?;
        Some(printable(target.file_name()?.to_str()?))
    }

    pub(super) fn driver(&self) -> Option<String> {
        self.link("driver")
    }

    /// The number of its IOMMU group.
    pub(super) fn group(&self) -> Option<u32> {
        self.link("iommu_group")?.parse().ok()
    }

    /// What its group is called: VFIO's groups without an IOMMU have a name.
    pub(super) fn group_name(&self) -> Option<String> {
        self.text("iommu_group/name")
    }

    /// The other devices of its group, with their drivers.
    pub(super) fn neighbours(&self) -> Vec<(String, Option<String>)> {
        let devices = self.names("iommu_group/devices").into_iter();
        let others = devices.filter(|name| *name != self.name());
        let with_driver = |name: String| {
            let driver = self.link(&format!("iommu_group/devices/{name}/driver"));
            (name, driver)
        };
        others.map(with_driver).collect()
    }

    /// The name of its own node, `vfio3`, where VFIO's driver has made one.
    pub(super) fn cdev(&self) -> Option<String> {
        let names = self.names("vfio-dev").into_iter();
        let is_number = |name: &str| {
            let digits = name.strip_prefix("vfio").unwrap_or_default();
            !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit())
        };
        names.into_iter().find(|name| is_number(name))
    }

    /// Whether it is a bridge between buses: it has another header, and no driver of VFIO takes it
    /// (PCI Code and ID Assignment Specification, base class 06h).
    pub(super) fn is_bridge(&self) -> bool {
        let class = self.text("class").unwrap_or_default();
        ["0x0604", "0x0607", "0x0609"]
            .iter()
            .any(|bridge| class.starts_with(bridge))
    }
}

/// Whether a driver makes VFIO devices, by its name: vfio-pci, mlx5_vfio_pci, xe-vfio-pci...
pub(super) fn is_vfio_driver(driver: &str) -> bool {
    driver.contains("vfio")
}

/// Whether a driver may stay bound in a group whose devices are assigned: those that never start
/// DMA for the host (`driver_managed_dma` in the kernel).
pub(crate) fn is_harmless(driver: &str) -> bool {
    is_vfio_driver(driver) || ["pci-stub", "pcieport", "shpchp"].contains(&driver)
}

/// An attribute's text, without white space around it.
pub(super) fn text(path: &Path) -> Option<String> {
    let read = || -> io::Result<Vec<u8>> {
        if !path.metadata()?.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut bytes = Vec::new();
        let file = fs::File::open(path)?;
        file.take(TEXT_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().ok()?;
    Some(printable(String::from_utf8_lossy(&bytes).trim()))
}

/// The names in a folder, sorted; none when there is no such folder.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let entries = entries.take(ENTRIES_MAX);
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names
        .filter(|name| !name.contains(char::is_control))
        .collect();
    names.sort_unstable();
    names
}

/// Without what could steer a terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).collect()
}
