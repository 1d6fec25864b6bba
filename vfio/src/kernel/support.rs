//! What a host has of VFIO.

use std::fs;
use std::path::Path;

use super::sysfs::{names, text};

/// What a host has of VFIO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfioSupport {
    /// An IOMMU is on: devices have groups.
    pub iommu: bool,
    /// The IOMMU remaps interrupts; `None` when that cannot be told.
    pub interrupt_remapping: Option<bool>,
    /// Devices are assigned all the same where it does not, as a module's parameter says.
    pub unsafe_interrupts: bool,
    /// There is a `/dev/iommu`.
    pub iommufd: bool,
    /// There is a `/dev/vfio/vfio`.
    pub container: bool,
    /// There is a driver for PCI functions, vfio-pci.
    pub driver: bool,
    /// Devices that can be opened by nodes of their own, of those that are bound to VFIO's drivers.
    pub device_nodes: Vec<String>,
}

/// Looks at the host below `root`: `/`, or a recorded one.
#[must_use]
pub fn support(root: &Path) -> VfioSupport {
    let groups = root.join("sys/kernel/iommu_groups");
    let is_real = |group: &String| {
        let name = text(&groups.join(group).join("name"));
        name.as_deref() != Some("vfio-noiommu")
    };
    let is_set = |parameter: &str| {
        let value = text(&root.join("sys/module").join(parameter));
        value.is_some_and(|value| value == "Y" || value == "1")
    };
    VfioSupport {
        iommu: names(&groups).iter().any(is_real),
        interrupt_remapping: remaps_interrupts(root),
        unsafe_interrupts: is_set("vfio_iommu_type1/parameters/allow_unsafe_interrupts")
            || is_set("iommufd/parameters/allow_unsafe_interrupts"),
        iommufd: root.join("dev/iommu").exists(),
        container: root.join("dev/vfio/vfio").exists(),
        driver: root.join("sys/bus/pci/drivers/vfio-pci").is_dir(),
        device_nodes: names(&root.join("dev/vfio/devices")),
    }
}

/// The kernel calls the chips of remapped interrupts `IR-...`, with either vendor's IOMMU.
fn remaps_interrupts(root: &Path) -> Option<bool> {
    let interrupts = fs::read_to_string(root.join("proc/interrupts")).ok()?;
    let mut words = interrupts.split_whitespace();
    Some(words.any(|word| word.starts_with("IR-")))
}
