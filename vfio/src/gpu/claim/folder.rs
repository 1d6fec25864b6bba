//! The folder of claims. Lock order: the folder's, then those of claims; who has a claim alone asks for no
//! other lock.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::gpu::address::Address;
use crate::gpu::change::{ChangeError, wait_until};
use crate::gpu::holders::Holders;
use crate::gpu::offer;
use crate::gpu::tree::{SysfsTree, TreeError, names, printable};

/// Where the claims of a host are.
pub const CLAIMS_DIR: &str = "/run/drover/gpu";

/// The environment's variable that names another folder.
pub const CLAIMS_VARIABLE: &str = "DROVER_GPU_CLAIMS";

/// Held by whoever looks at claims, or makes one.
const ALLOCATION: &str = "allocation.lock";

/// Bytes of a claim that are read.
const CLAIM_MAX_BYTES: u64 = 4096;

/// Characters of a VM's name that are shown.
const NAME_MAX: usize = 128;

/// How long others may take to choose: making virtual functions of some GPUs takes many seconds.
const WAIT: Duration = Duration::from_secs(120);

/// How long somebody waits who only looks.
const LOOK: Duration = Duration::from_secs(3);

/// The claims of a host's partitions.
#[derive(Clone, Debug)]
pub struct Claims {
    dir: PathBuf,
}

/// Whose a partition is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The VM; `None` where no claim tells.
    pub vm: Option<String>,
    /// Its process.
    pub pid: Option<u32>,
}

/// No partition was claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// What is asked for can never be.
    #[error("{0}")]
    Request(String),
    /// There is no such device.
    #[error("{0}")]
    Missing(String),
    /// There are such partitions, and others have them.
    #[error("{wanted} cannot be given, others have what there is: {details}")]
    Exhausted {
        /// What was asked for.
        wanted: String,
        /// Per GPU what it has, who has it, or why it does not count.
        details: String,
    },
    /// There are none such.
    #[error("{wanted} cannot be given: {details}")]
    Unsuitable {
        /// What was asked for.
        wanted: String,
        /// Per GPU what it has, and why that is not it.
        details: String,
    },
    /// It was claimed, and could not be made ready.
    #[error("partition {address} of GPU {gpu} cannot be made ready")]
    Setup {
        /// Of which GPU.
        gpu: crate::Bdf,
        /// Which one.
        address: String,
        /// Why not.
        #[source]
        source: ChangeError,
    },
    /// Others are choosing, and do not come to an end.
    #[error("{} has been held for {} s", .path.display(), .seconds)]
    Held {
        /// The lock.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// A file of the claims cannot be used.
    #[error("{} cannot be used", .path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host's devices cannot be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// What a claim's file says.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    vm: String,
    pid: u32,
    /// Whether the claim has made the partition, which is to go with it.
    made: bool,
    /// Below which `/sys` that is.
    sysfs: PathBuf,
}

/// Who has what.
#[derive(Debug, Default)]
pub(in crate::gpu) struct Owners(BTreeMap<Address, Owner>);

impl Owners {
    pub(in crate::gpu) fn get(&self, address: &Address) -> Option<&Owner> {
        self.0.get(address)
    }
}

impl Claims {
    /// This host's: of the folder that [`CLAIMS_VARIABLE`] names, or of [`CLAIMS_DIR`].
    #[must_use]
    pub fn of_host() -> Self {
        let named = std::env::var_os(CLAIMS_VARIABLE).filter(|dir| !dir.is_empty());
        Self::at(named.unwrap_or_else(|| CLAIMS_DIR.into()))
    }

    /// Those of this folder, which is made when it is needed.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Waits until nobody else chooses, and keeps others from it.
    pub(in crate::gpu) fn allocation(&self) -> Result<Allocation<'_>, ClaimError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir);
        made.map_err(|source| self.error("", source))?;
        self.lock(&self.file(ALLOCATION, true)?, WAIT)
    }

    /// The same to look only; `None` where nothing was ever claimed.
    pub(in crate::gpu) fn look(&self) -> Result<Option<Allocation<'_>>, ClaimError> {
        let file = match self.file(ALLOCATION, false) {
            Err(ClaimError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Ok(None);
            }
            file => file?,
        };
        self.lock(&file, LOOK).map(Some)
    }

    fn lock(&self, file: &File, limit: Duration) -> Result<Allocation<'_>, ClaimError> {
        let error = |source| self.error(ALLOCATION, source);
        let file = file.try_clone().map_err(error)?;
        let mut failure = None;
        let is_locked = wait_until(limit, || match file.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(source)) => {
                failure = Some(source);
                true
            }
        });
        match (failure, is_locked) {
            (Some(source), _) => Err(error(source)),
            (None, false) => Err(ClaimError::Held {
                path: self.dir.join(ALLOCATION),
                seconds: limit.as_secs(),
            }),
            (None, true) => Ok(Allocation {
                claims: self,
                _lock: file,
            }),
        }
    }

    /// A plain file of the folder: a link would lead elsewhere, a pipe would be waited for.
    fn file(&self, name: &str, is_changed: bool) -> Result<File, ClaimError> {
        let error = |source| self.error(name, source);
        let file = OpenOptions::new()
            .read(true)
            .write(is_changed)
            .create(is_changed)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(self.dir.join(name))
            .map_err(error)?;
        match file.metadata().map_err(error)?.is_file() {
            true => Ok(file),
            false => Err(error(io::Error::other("it is no plain file"))),
        }
    }

    fn error(&self, name: &str, source: io::Error) -> ClaimError {
        let path = match name {
            "" => self.dir.clone(),
            name => self.dir.join(name),
        };
        ClaimError::File { path, source }
    }
}

/// The right to look at claims and to make some. Nobody else has it meanwhile, so a claim that was free when
/// it was looked at still is, and looking keeps nobody from claiming.
#[derive(Debug)]
pub(in crate::gpu) struct Allocation<'c> {
    claims: &'c Claims,
    _lock: File,
}

impl Allocation<'_> {
    /// Everybody who has a claim.
    pub(in crate::gpu) fn owners(&self) -> Result<Owners, ClaimError> {
        let mut owners = Owners::default();
        for (name, address) in self.entries()? {
            if let Some(owner) = self.owner(&name) {
                owners.0.insert(address, owner);
            }
        }
        Ok(owners)
    }

    fn entries(&self) -> Result<Vec<(String, Address)>, ClaimError> {
        let names = names(&self.claims.dir).map_err(|source| self.claims.error("", source))?;
        let entry = |name: String| {
            let address = name.parse().ok()?;
            Some((name, address))
        };
        Ok(names.into_iter().filter_map(entry).collect())
    }

    /// Who has this claim. One that cannot be looked at is somebody's: better none than two.
    fn owner(&self, name: &str) -> Option<Owner> {
        let file = match self.claims.file(name, false) {
            Ok(file) => file,
            Err(error) => {
                log::warn!(error:%; "a claim cannot be looked at, and counts as taken");
                return Some(Owner::default());
            }
        };
        match file.try_lock() {
            Ok(()) => None,
            Err(_) => Some(record(&file).map_or_else(Owner::default, |record| record.owner())),
        }
    }

    /// Takes back what those have made who are gone, and removes their files.
    pub(in crate::gpu) fn sweep(
        &self,
        tree: &SysfsTree,
        holders: &Holders,
    ) -> Result<(), ClaimError> {
        let place = tree.place();
        for (name, address) in self.entries()? {
            let Ok(file) = self.claims.file(&name, false) else {
                continue;
            };
            if file.try_lock().is_err() {
                continue;
            }
            let left = record(&file).filter(|record| record.made);
            if left.as_ref().is_some_and(|left| left.sysfs != place) {
                continue;
            }
            if left.is_some() {
                // Whoever that is: an open device is not taken away.
                if holders.of(tree, &address).is_some() {
                    continue;
                }
                log::info!(address:%; "a partition whose owner is gone is taken back");
                if let Err(error) = offer::unmake(tree, &address) {
                    log::warn!(address:%, error:%; "a partition whose owner is gone cannot be taken back");
                    continue;
                }
            }
            // Nobody else opens it meanwhile: claims are made by who has the allocation alone.
            let _ = fs::remove_file(self.claims.dir.join(&name));
        }
        Ok(())
    }

    /// Claims it, for a VM of this process.
    pub(super) fn claim(
        &self,
        address: &Address,
        claim: NewClaim<'_>,
    ) -> Result<Claim, ClaimError> {
        let name = address.to_string();
        let error = |source| self.claims.error(&name, source);
        let file = self.claims.file(&name, true)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(source)) => return Err(error(source)),
            Err(TryLockError::WouldBlock) => {
                return Err(error(io::Error::other("somebody has locked it meanwhile")));
            }
        }
        let record = Record {
            vm: claim.vm.to_owned(),
            pid: std::process::id(),
            made: claim.is_making,
            sysfs: claim.tree.place(),
        };
        let mut claim = Claim(file);
        claim.write(&record).map_err(error)?;
        Ok(claim)
    }
}

/// For whom a claim is.
#[derive(Clone, Copy)]
pub(super) struct NewClaim<'v> {
    pub(super) vm: &'v str,
    pub(super) is_making: bool,
    pub(super) tree: &'v SysfsTree,
}

/// A lock on a claim's file.
#[derive(Debug)]
pub(super) struct Claim(File);

impl Claim {
    fn write(&mut self, record: &Record) -> io::Result<()> {
        let text = serde_json::to_vec(record)?;
        self.0.set_len(0)?;
        self.0.rewind()?;
        self.0.write_all(&text)
    }

    /// What it has made is gone: the next has nothing to take back.
    pub(super) fn forget(&self) -> io::Result<()> {
        self.0.set_len(0)
    }
}

impl Record {
    fn owner(self) -> Owner {
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

fn record(file: &File) -> Option<Record> {
    let mut text = Vec::new();
    file.take(CLAIM_MAX_BYTES).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
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
