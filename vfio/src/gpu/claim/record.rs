//! What a claim's file says.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::gpu::offer::Undo;
use crate::gpu::tree::{SysfsTree, printable};

/// Bytes of a claim that are read.
const CLAIM_MAX_BYTES: u64 = 4096;

/// Characters of a VM's name that are shown.
const NAME_MAX: usize = 128;

/// What tells one boot of a kernel from the next.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Whose a partition is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The VM; `None` where no claim tells.
    pub vm: Option<String>,
    /// Its process.
    pub pid: Option<u32>,
}

/// For people, and for whoever comes after a kill.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    vm: String,
    pid: u32,
    /// Whether the claim has made the partition, which is to go with it.
    made: bool,
    /// The type that a virtual function had, as long as the claim may have taken it away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prior: Option<u32>,
    /// Below which `/sys` that is.
    sysfs: PathBuf,
    /// Since when the kernel runs: drivers forget with it what was made.
    #[serde(default)]
    boot: Option<String>,
}

impl Record {
    /// One of this process, for a VM of it.
    pub(super) fn new(vm: &str, tree: &SysfsTree, undo: Undo) -> Self {
        Self {
            vm: vm.to_owned(),
            pid: std::process::id(),
            made: undo == Undo::Unmake,
            prior: match undo {
                Undo::Retype(id) => Some(id),
                Undo::Nothing | Undo::Unmake => None,
            },
            sysfs: tree.place(),
            boot: boot_id(),
        }
    }

    /// `None` when it is none.
    pub(super) fn read(file: &File) -> Option<Self> {
        let mut text = Vec::new();
        file.take(CLAIM_MAX_BYTES).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    pub(super) fn write(&self, mut file: &File) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&text)
    }

    /// What is left to be done after its owner.
    pub(super) fn undo(&self) -> Undo {
        match (self.made, self.prior) {
            (true, _) => Undo::Unmake,
            (false, Some(id)) => Undo::Retype(id),
            (false, None) => Undo::Nothing,
        }
    }

    /// Whether it was written since the kernel runs. Of another boot nothing is left but the file.
    pub(super) fn is_of_this_boot(&self) -> bool {
        self.boot.is_some() && self.boot == boot_id()
    }

    pub(super) fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    pub(super) fn owner(&self) -> Owner {
        let name: String = printable(&self.vm)
            .chars()
            .filter(|letter| *letter != '\n')
            .take(NAME_MAX)
            .collect();
        Owner {
            vm: Some(name),
            pid: Some(self.pid),
        }
    }
}

fn boot_id() -> Option<String> {
    let text = fs::read_to_string(BOOT_ID).ok()?;
    Some(text.trim().to_owned())
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.vm, self.pid) {
            (Some(vm), Some(pid)) => write!(f, "{vm} (pid {pid})"),
            (Some(vm), None) => f.write_str(vm),
            (None, Some(pid)) => write!(f, "pid {pid}"),
            (None, None) => f.write_str("somebody"),
        }
    }
}
