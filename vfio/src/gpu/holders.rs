//! Processes that have VFIO devices open, whoever they are.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::address::Address;
use super::tree::{self, SysfsTree};

/// Processes, and files of one, that are looked at.
const PROCESSES_MAX: usize = 65_536;
const FILES_MAX: usize = 65_536;

/// Which process has which of VFIO's nodes open, as far as `/proc` tells.
#[derive(Debug, Default)]
pub(super) struct Holders(BTreeMap<PathBuf, u32>);

impl Holders {
    /// All of them. Without the right to look at others' processes there are only one's own.
    pub(super) fn scan(tree: &SysfsTree) -> Self {
        let mut nodes = BTreeMap::new();
        let Some(proc) = tree.proc() else {
            return Self(nodes);
        };
        let processes = tree::names(proc).unwrap_or_default().into_iter();
        let pids = processes.filter_map(|name| name.parse::<u32>().ok());
        for pid in pids.take(PROCESSES_MAX) {
            let Ok(files) = fs::read_dir(proc.join(pid.to_string()).join("fd")) else {
                continue;
            };
            let targets = files
                .take(FILES_MAX)
                .filter_map(|file| fs::read_link(file.ok()?.path()).ok());
            for node in targets.filter(|target| target.starts_with("/dev/vfio")) {
                nodes.insert(node, pid);
            }
        }
        Self(nodes)
    }

    /// Who has this device open, by its IOMMU group or by a node of its own
    /// (Documentation/driver-api/vfio.rst).
    pub(super) fn of(&self, tree: &SysfsTree, address: &Address) -> Option<u32> {
        if self.0.is_empty() {
            return None;
        }
        let folder = address.folder(tree);
        let group = tree::link(&folder.join("iommu_group"));
        let group = group.map(|group| Path::new("/dev/vfio").join(group));
        let nodes = tree::names(&folder.join("vfio-dev")).unwrap_or_default();
        let nodes = nodes
            .iter()
            .map(|node| Path::new("/dev/vfio/devices").join(node));
        group
            .into_iter()
            .chain(nodes)
            .find_map(|node| self.0.get(&node).copied())
    }
}
