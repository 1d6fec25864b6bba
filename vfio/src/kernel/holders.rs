//! Who has a device open.

use std::fmt;
use std::fs;
use std::path::Path;

use super::sysfs::{names, text};

/// Processes, and descriptors of one, that are looked at.
const PROCESSES_MAX: usize = 65_536;
const FILES_MAX: usize = 65_536;

/// A process that has a device open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its name (`comm`), if that can be read.
    pub name: Option<String>,
}

/// Processes that have a device open, as far as this process may see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders(pub Vec<Holder>);

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("a process that this one may not see");
        }
        for (index, holder) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}process {}", holder.pid)?;
            if let Some(name) = &holder.name {
                write!(f, " ({name})")?;
            }
        }
        Ok(())
    }
}

/// The processes that have one of `nodes` open. `/proc` tells only of processes of the same user,
/// or of all to root.
pub(super) fn find(proc: &Path, nodes: &[String]) -> Holders {
    let pids = processes(proc).take(PROCESSES_MAX);
    let holders = pids.filter(|pid| {
        let files = fs::read_dir(proc.join(pid.to_string()).join("fd"));
        let files = files.into_iter().flatten().take(FILES_MAX);
        let mut targets = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
        targets.any(|target| nodes.iter().any(|node| target == Path::new(node)))
    });
    let holder = |pid: u32| Holder {
        pid,
        name: text(&proc.join(pid.to_string()).join("comm")),
    };
    Holders(holders.map(holder).collect())
}

fn processes(proc: &Path) -> impl Iterator<Item = u32> {
    let mut pids: Vec<u32> = names(proc)
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.into_iter()
}
