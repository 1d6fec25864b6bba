//! Who has a device open.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
use rustix::io::Errno;

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

/// Nodes that processes have open, as far as `/proc` tells: of processes of the same user, or of all
/// to root.
#[derive(Debug, Default)]
pub(crate) struct OpenNodes {
    nodes: BTreeMap<PathBuf, Vec<u32>>,
    /// Whether every process could be looked at.
    pub(crate) is_complete: bool,
}

impl OpenNodes {
    /// Those of the processes in `proc` that are `wanted`.
    pub(crate) fn scan(proc: &Path, wanted: impl Fn(&Path) -> bool) -> Self {
        let pids = processes(proc);
        let mut open = Self {
            nodes: BTreeMap::new(),
            is_complete: pids.len() <= PROCESSES_MAX,
        };
        for pid in pids.into_iter().take(PROCESSES_MAX) {
            let files = proc.join(pid.to_string()).join("fd");
            // A process that has ended meanwhile has nothing open.
            let is_gone = |error: &io::Error| {
                error.kind() == ErrorKind::NotFound
                    || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
            };
            match open.add(pid, &files, &wanted) {
                Err(error) if !is_gone(&error) => open.is_complete = false,
                _ => {}
            }
        }
        open
    }

    fn add(&mut self, pid: u32, files: &Path, wanted: impl Fn(&Path) -> bool) -> io::Result<()> {
        for file in fs::read_dir(files)?.take(FILES_MAX) {
            let file = file?.path();
            let node = match fs::read_link(&file) {
                Ok(node) => node,
                Err(error) if error.kind() == ErrorKind::PermissionDenied => return Err(error),
                // One may be closed at any time.
                Err(_) => continue,
            };
            if wanted(&node) && is_node(&file, &node) {
                let pids = self.nodes.entry(node).or_default();
                if pids.last() != Some(&pid) {
                    pids.push(pid);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Who has this node open, ascending.
    pub(crate) fn of(&self, node: &Path) -> &[u32] {
        self.nodes.get(node).map_or(&[], Vec::as_slice)
    }
}

/// Whether what is open as `file` is the device at `node`, and no file that somebody has given this name in a
/// mount namespace of their own. Their file system is not asked: it may never answer.
fn is_node(file: &Path, node: &Path) -> bool {
    let number = |path| {
        let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
        let kind = FileType::from_raw_mode(found.stx_mode.into());
        Ok((kind, found.stx_rdev_major, found.stx_rdev_minor))
    };
    match (number(file), number(node)) {
        (Ok(open), Ok(node)) => open == node && open.0 == FileType::CharacterDevice,
        // A copy of a host's tree.
        (Err(Errno::NOENT), _) => true,
        _ => false,
    }
}

/// The processes that have one of `nodes` open.
pub(super) fn find(proc: &Path, nodes: &[String]) -> Holders {
    let open = OpenNodes::scan(proc, |node| nodes.iter().any(|one| node == Path::new(one)));
    let mut pids: Vec<u32> = open.nodes.into_values().flatten().collect();
    pids.sort_unstable();
    pids.dedup();
    let holder = |pid: u32| Holder {
        pid,
        name: text(&proc.join(pid.to_string()).join("comm")),
    };
    Holders(pids.into_iter().map(holder).collect())
}

fn processes(proc: &Path) -> Vec<u32> {
    let mut pids: Vec<u32> = names(proc)
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_the_device_itself_is_open_under_its_name() {
        let (null, zero) = (Path::new("/dev/null"), Path::new("/dev/zero"));
        let open = File::open(null).expect("every Linux has it");
        let file = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
        assert!(is_node(&file, null));
        assert!(!is_node(&file, zero), "another number");
        let is_open = |path: &Path| {
            let open = OpenNodes::scan(Path::new("/proc"), |node| node == path);
            open.of(path).contains(&std::process::id())
        };
        assert!(is_open(null));
        let name = format!("drover-no-node-{}", std::process::id());
        let plain = std::env::temp_dir().join(name);
        let open = File::create(&plain).expect("the folder is ours");
        assert!(!is_open(&plain), "no device");
        drop(open);
        fs::remove_file(&plain).expect("it is ours");
        // A recorded host has no such files, only links that say what is open.
        assert!(is_node(&plain, null));
    }
}
