//! Processes that have VFIO devices open, whoever they are.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use super::address::Address;
use super::tree::{self, SysfsTree};
use crate::kernel::OpenNodes;

/// Which process has which of VFIO's nodes open, as far as `/proc` tells. It is looked at when that is first
/// asked: it takes long on a host with many processes.
#[derive(Debug)]
pub(super) struct Holders<'h> {
    tree: &'h SysfsTree,
    open: OnceCell<OpenNodes>,
}

impl<'h> Holders<'h> {
    pub(super) fn of_tree(tree: &'h SysfsTree) -> Self {
        let open = OnceCell::new();
        Self { tree, open }
    }

    /// All of them. Without the right to look at others' processes there are only one's own.
    fn open(&self) -> &OpenNodes {
        self.open.get_or_init(|| {
            let Some(proc) = self.tree.proc() else {
                return OpenNodes::default();
            };
            let mut open = OpenNodes::scan(proc, |node| node.starts_with("/dev/vfio"));
            // Where others' processes are hidden the first one is, too (proc(5), `hidepid`).
            open.is_complete &= !self.tree.is_of_host() || proc.join("1").exists();
            open
        })
    }

    /// Whether all processes could be looked at; never where there are none.
    pub(super) fn are_complete(&self) -> bool {
        self.open().is_complete
    }

    /// Who has this device open, by its IOMMU group or by a node of its own
    /// (Documentation/driver-api/vfio.rst).
    pub(super) fn of(&self, address: &Address) -> Option<u32> {
        let open = self.open();
        if open.is_empty() {
            return None;
        }
        let nodes = nodes(self.tree, address);
        nodes.iter().find_map(|node| open.of(node).first().copied())
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
