//! Processes that have VFIO devices open, whoever they are.

use std::path::{Path, PathBuf};

use super::address::Address;
use super::tree::{self, SysfsTree};
use crate::kernel::OpenNodes;

/// Which process has which of VFIO's nodes open, as far as `/proc` tells.
#[derive(Debug, Default)]
pub(super) struct Holders(OpenNodes);

impl Holders {
    /// All of them. Without the right to look at others' processes there are only one's own.
    pub(super) fn scan(tree: &SysfsTree) -> Self {
        let Some(proc) = tree.proc() else {
            return Self::default();
        };
        let mut open = OpenNodes::scan(proc, |node| node.starts_with("/dev/vfio"));
        // Where others' processes are hidden the first one is, too (proc(5), `hidepid`).
        open.is_complete &= !tree.is_of_host() || proc.join("1").exists();
        Self(open)
    }

    /// Whether all processes could be looked at; never where there are none.
    pub(super) fn are_complete(&self) -> bool {
        self.0.is_complete
    }

    /// Who has this device open, by its IOMMU group or by a node of its own
    /// (Documentation/driver-api/vfio.rst).
    pub(super) fn of(&self, tree: &SysfsTree, address: &Address) -> Option<u32> {
        if self.0.is_empty() {
            return None;
        }
        let nodes = nodes(tree, address);
        nodes
            .iter()
            .find_map(|node| self.0.of(node).first().copied())
    }
}

/// The nodes through which a device can be open.
fn nodes(tree: &SysfsTree, address: &Address) -> Vec<PathBuf> {
    let folder = address.folder(tree);
    let mut nodes = Vec::new();
    if let Some(group) = tree::link(&folder.join("iommu_group")) {
        // Those of groups without an IOMMU are called otherwise (drivers/vfio/group.c).
        for name in [group.clone(), format!("noiommu-{group}")] {
            nodes.push(Path::new("/dev/vfio").join(name));
        }
    }
    let own = tree::names(&folder.join("vfio-dev")).unwrap_or_default();
    let own = own.iter();
    nodes.extend(own.map(|node| Path::new("/dev/vfio/devices").join(node)));
    nodes
}
