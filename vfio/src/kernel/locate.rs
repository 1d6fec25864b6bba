//! What is looked at before a device is opened: that it is one, and that nothing of the host's is in
//! the way.

use std::path::Path;

use super::error::OpenError;
use super::sysfs::{Folder, Host, is_harmless, is_vfio_driver};

/// What VFIO calls groups that it makes without an IOMMU.
const NOIOMMU: &str = "vfio-noiommu";

/// The kernel shows a link's speed for PCI Express alone (drivers/pci/pci-sysfs.c); virtual functions have it, too.
const LINK_SPEED: &str = "max_link_speed";

/// A virtual function of NVIDIA's vGPU driver has this file, and a node of VFIO's once it has a type.
const VGPU_TYPE: &str = "nvidia/current_vgpu_type";

/// A device that can be opened, as far as `/sys` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Located {
    /// Its address or UUID.
    pub(super) name: String,
    /// Its group's number.
    pub(super) group: Option<u32>,
    /// Its own node's name.
    pub(super) cdev: Option<String>,
}

impl Located {
    /// One that somebody else has opened.
    pub(super) fn handed_over(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            group: None,
            cdev: None,
        }
    }

    /// Its group's node, below `/dev`.
    pub(super) fn group_node(&self) -> Option<String> {
        self.group.map(|group| format!("vfio/{group}"))
    }

    /// Its own node, below `/dev`.
    pub(super) fn cdev_node(&self) -> Option<String> {
        let cdev = self.cdev.as_ref();
        cdev.map(|name| format!("vfio/devices/{name}"))
    }

    /// All nodes through which it can be open.
    pub(super) fn nodes(&self) -> Vec<String> {
        let nodes = [self.group_node(), self.cdev_node()];
        let nodes = nodes.iter().flatten();
        nodes.map(|node| format!("/dev/{node}")).collect()
    }
}

/// Looks at a device's folder.
pub(super) fn examine(host: &Host, path: &Path) -> Result<Located, OpenError> {
    let Some(folder) = Folder::find(path) else {
        return Err(OpenError::NoDevice(path.to_owned()));
    };
    let name = folder.name();
    if folder.is_bridge() {
        return Err(OpenError::Bridge(name));
    }
    if !is_mediated(&folder) && folder.text(LINK_SPEED).is_none() {
        return Err(OpenError::Conventional(name));
    }
    let cdev = folder.cdev();
    // Where a driver has made a node, it is one of VFIO, whatever its name is: those of vendors are
    // called as they like.
    let is_vfio = cdev.is_some() || folder.driver().is_some_and(|name| is_vfio_driver(&name));
    let is_mediated = is_mediated(&folder);
    // Groups of mediated devices have the same name: their parents' drivers do the translating.
    let is_translated = is_mediated || folder.group_name().as_deref() != Some(NOIOMMU);
    if folder.group().is_none() || !is_translated {
        return Err(OpenError::NoIommu(name));
    }
    match folder.driver() {
        // Drivers of mediated devices are called as their parents are.
        _ if is_vfio || is_mediated => {}
        Some(_) if folder.text(VGPU_TYPE).is_some_and(|kind| kind == "0") => {
            return Err(OpenError::NoVgpuType(name));
        }
        Some(driver) => {
            return Err(OpenError::WrongDriver {
                device: name,
                driver,
            });
        }
        None => return Err(OpenError::Unbound(name)),
    }
    let located = Located {
        name,
        group: folder.group(),
        cdev: cdev.filter(|cdev| host.dev.join("vfio/devices").join(cdev).exists()),
    };
    let used: Vec<String> = folder
        .neighbours()
        .into_iter()
        .filter_map(|(name, driver)| Some((name, driver?)))
        .filter(|(_, driver)| !is_harmless(driver))
        .map(|(name, driver)| format!("{name} ({driver})"))
        .collect();
    match used.is_empty() {
        true => Ok(located),
        false => Err(shared_group(&located, &used.join(", "))),
    }
}

pub(super) fn shared_group(located: &Located, others: &str) -> OpenError {
    OpenError::SharedGroup {
        device: located.name.clone(),
        group: located.group,
        others: others.to_owned(),
    }
}

fn is_mediated(folder: &Folder) -> bool {
    folder.link("subsystem").as_deref() == Some("mdev") || folder.link("mdev_type").is_some()
}
