//! The driver of a host behind a device that a VM is given: it alone understands the device's state.

use serde::{Deserialize, Serialize};

use super::address::Address;
use super::inventory::version;
use super::provider;
use super::tree::{Function, SysfsTree};
use crate::Bdf;

/// What can be told of it. What is not known is `None`, and counts as no difference.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDriver {
    /// The driver of the device that it is a part of, or its own when it is none's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// That driver's version; drivers of the kernel's own tree have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver_version: Option<String>,
    /// What the driver calls the part's type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition_type: Option<String>,
}

impl HostDriver {
    /// That of the device at `address`: a PCI function's, or a mediated device's UUID.
    #[must_use]
    pub fn of(tree: &SysfsTree, address: &str) -> Self {
        let Ok(place) = address.parse::<Address>() else {
            return Self::default();
        };
        let Some(parent) = parent(tree, &place) else {
            // Of VFIO itself there are no versions that matter.
            let driver = match place {
                Address::Pci(own) => tree.function(own).driver(),
                Address::Mediated(_) => None,
            };
            return Self {
                driver,
                ..Self::default()
            };
        };
        let driver = parent.driver();
        let survey = provider::of(&parent).map(|provider| provider.survey(&parent));
        let parts = survey.map(|survey| survey.partitions).unwrap_or_default();
        let part = parts.into_iter().find(|part| part.address == address);
        Self {
            driver_version: driver.as_deref().and_then(|name| version(&parent, name)),
            driver,
            partition_type: part.and_then(|part| part.kind),
        }
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }

    /// What `self` has that the one here, `found`, has not: one line each.
    #[must_use]
    pub fn differences(&self, found: &Self) -> Vec<String> {
        let line =
            |wanted: &str, found: &str| format!("the source's is {wanted}, the one here {found}");
        let mut lines = Vec::new();
        if differ(&self.driver, &found.driver) {
            lines.push(line(
                &format!("of driver {}", self.named()),
                &format!("of driver {}", found.named()),
            ));
        } else if differ(&self.driver_version, &found.driver_version) {
            let named = |side: &Self| format!("of driver {}", side.named());
            lines.push(line(&named(self), &named(found)));
        }
        if differ(&self.partition_type, &found.partition_type) {
            let typed = |side: &Self| {
                let name = side.partition_type.as_deref().unwrap_or_default();
                format!("of type {name}")
            };
            lines.push(line(&typed(self), &typed(found)));
        }
        lines
    }

    fn named(&self) -> String {
        let name = self.driver.as_deref().unwrap_or("unknown");
        match &self.driver_version {
            Some(version) => format!("{name} {version}"),
            None => name.to_owned(),
        }
    }
}

/// Whether both are known, and are not the same.
fn differ(wanted: &Option<String>, found: &Option<String>) -> bool {
    wanted.is_some() && found.is_some() && wanted != found
}

/// What made it.
fn parent<'t>(tree: &'t SysfsTree, place: &Address) -> Option<Function<'t>> {
    let address = match place {
        Address::Pci(own) => {
            let physical = tree.function(*own).link("physfn")?;
            physical.parse::<Bdf>().ok()?.into()
        }
        Address::Mediated(uuid) => tree.mediated_parent(uuid)?,
    };
    Some(tree.function(address))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    use super::*;

    const UUID: &str = "9a8d2f1c-0000-4000-8000-000000000001";

    /// A tree that goes with the test.
    struct Tree(PathBuf);

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    impl Tree {
        fn new(name: &str) -> Self {
            let name = format!("drover-driver-{name}-{}", std::process::id());
            let tree = Self(std::env::temp_dir().join(name));
            fs::create_dir_all(tree.0.join("bus/pci/devices")).unwrap();
            tree
        }

        fn folder(&self, path: &str) -> PathBuf {
            let folder = self.0.join(path);
            fs::create_dir_all(&folder).unwrap();
            folder
        }

        fn link(&self, path: &str, to: &str) {
            self.folder(Path::new(path).parent().unwrap().to_str().unwrap());
            symlink(to, self.0.join(path)).unwrap();
        }

        /// A driver's module with a version.
        fn module(&self, name: &str, version: &str) {
            fs::write(
                self.folder(&format!("module/{name}")).join("version"),
                version,
            )
            .unwrap();
        }

        fn driver(&self, address: &str) -> HostDriver {
            HostDriver::of(&SysfsTree::at(&self.0), address)
        }
    }

    #[test]
    fn virtual_function_has_its_parents_driver() {
        let tree = Tree::new("vf");
        let (gpu, vf) = (
            "bus/pci/devices/0000:41:00.0",
            "bus/pci/devices/0000:41:00.1",
        );
        tree.link(&format!("{gpu}/driver"), "../../../drivers/nvidia");
        tree.link(&format!("{vf}/physfn"), "../0000:41:00.0");
        tree.link(&format!("{vf}/driver"), "../../../drivers/nvidia-vfio");
        tree.module("nvidia", "550.54.16\n");
        let found = tree.driver("0000:41:00.1");
        assert_eq!(found.driver.as_deref(), Some("nvidia"));
        assert_eq!(found.driver_version.as_deref(), Some("550.54.16"));
        // One that is nobody's part has a driver of its own, whose version says nothing.
        tree.module("vfio_pci", "0.2\n");
        let whole = "bus/pci/devices/0000:42:00.0";
        tree.link(&format!("{whole}/driver"), "../../../drivers/vfio-pci");
        let found = tree.driver("0000:42:00.0");
        assert_eq!(found.driver.as_deref(), Some("vfio-pci"));
        assert_eq!(found.driver_version, None);
        assert!(tree.driver("0000:43:00.0").is_unknown());
        assert!(tree.driver("no address").is_unknown());
        assert!(tree.driver(UUID).is_unknown());
    }

    #[test]
    fn mediated_device_has_its_makers_driver_and_type() {
        let tree = Tree::new("mdev");
        let gpu = "bus/pci/devices/0000:41:00.0";
        tree.link(&format!("{gpu}/driver"), "../../../drivers/nvidia");
        tree.module("nvidia", "535.1");
        let kind = format!("{gpu}/mdev_supported_types/nvidia-63");
        let devices = tree.folder(&format!("{kind}/devices"));
        fs::write(tree.folder(&kind).join("name"), "GRID A100-4C").unwrap();
        fs::write(tree.folder(&kind).join("available_instances"), "3").unwrap();
        symlink("../../..", devices.join(UUID)).unwrap();
        let back = format!("../../../../{kind}");
        tree.link(&format!("bus/mdev/devices/{UUID}/mdev_type"), &back);
        let found = tree.driver(UUID);
        assert_eq!(found.driver.as_deref(), Some("nvidia"));
        assert_eq!(found.driver_version.as_deref(), Some("535.1"));
        assert!(found.partition_type.is_some(), "{found:?}");
    }

    fn known(driver: &str, version: &str, kind: &str) -> HostDriver {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        HostDriver {
            driver: text(driver),
            driver_version: text(version),
            partition_type: text(kind),
        }
    }

    #[test]
    fn what_both_sides_know_is_compared_and_nothing_else() {
        let source = known("nvidia", "550.54", "nvidia-63");
        for (here, expected) in [
            (known("nvidia", "550.54", "nvidia-63"), &[][..]),
            (known("", "", ""), &[]),
            (known("nvidia", "", ""), &[]),
            (
                known("nvidia", "535.1", "nvidia-64"),
                &[
                    "the source's is of driver nvidia 550.54, the one here of driver nvidia 535.1",
                    "the source's is of type nvidia-63, the one here of type nvidia-64",
                ],
            ),
            (
                known("xe", "", "nvidia-63"),
                &["the source's is of driver nvidia 550.54, the one here of driver xe"],
            ),
        ] {
            assert_eq!(source.differences(&here), expected, "{here:?}");
        }
        assert_eq!(HostDriver::default().differences(&source), [""; 0]);
    }
}
