//! Looking at claims, making some, and cleaning up after those that are gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::ClaimError;
use super::folder::Claims;
use super::record::{Owner, Record};
use crate::gpu::address::Address;
use crate::gpu::holders::Holders;
use crate::gpu::offer::Undo;
use crate::gpu::tree::{SysfsTree, names};

/// Who has what.
#[derive(Debug, Default)]
pub(in crate::gpu) struct Owners {
    held: BTreeMap<Address, Held>,
    /// Below which `/sys` something is, or was claimed.
    trees: BTreeSet<PathBuf>,
}

/// A claim that somebody has.
#[derive(Debug)]
struct Held {
    owner: Owner,
    /// Below which `/sys`; `None` where it does not tell.
    sysfs: Option<PathBuf>,
    /// Whether the claim has made the partition, which goes with it; `None` where it does not tell.
    is_made: Option<bool>,
}

impl Owners {
    pub(in crate::gpu) fn get(&self, address: &Address) -> Option<&Owner> {
        Some(&self.held.get(address)?.owner)
    }

    /// Whether this is a partition that goes with its claim.
    pub(in crate::gpu) fn is_made(&self, address: &Address) -> bool {
        let held = self.held.get(address);
        held.is_some_and(|held| held.is_made == Some(true))
    }

    /// Whether it may be one.
    pub(in crate::gpu) fn may_be_made(&self, address: &Address) -> bool {
        let held = self.held.get(address);
        held.is_some_and(|held| held.is_made != Some(false))
    }

    /// Those of this tree alone, and those that do not tell where they are.
    pub(in crate::gpu) fn of_tree(mut self, tree: &SysfsTree) -> Self {
        let place = tree.place();
        let is_there = |held: &Held| held.sysfs.as_ref().is_none_or(|sysfs| *sysfs == place);
        self.held.retain(|_, held| is_there(held));
        self
    }

    /// Whether claims of this tree are kept there.
    pub(in crate::gpu) fn know(&self, tree: &SysfsTree) -> bool {
        self.trees.contains(&tree.place())
    }
}

/// The right to look at claims and to make some. Nobody else has it meanwhile, so a claim that was free when
/// it was looked at still is, and looking keeps nobody from claiming.
#[derive(Debug)]
pub(in crate::gpu) struct Allocation<'c> {
    claims: &'c Claims,
    lock: File,
}

impl Drop for Allocation<'_> {
    /// Also for what a vendor's program has left running with it.
    fn drop(&mut self) {
        if let Err(error) = self.lock.unlock() {
            log::warn!(error:%; "others may not be able to claim GPUs");
        }
    }
}

impl<'c> Allocation<'c> {
    pub(super) fn new(claims: &'c Claims, lock: File) -> Self {
        Self { claims, lock }
    }

    /// An empty file, locked.
    pub(in crate::gpu) fn lock(&self) -> &File {
        &self.lock
    }

    /// Everybody who has a claim, of whichever tree: one address has one claim.
    pub(in crate::gpu) fn owners(&self) -> Result<Owners, ClaimError> {
        let mut owners = Owners::default();
        for (name, address) in self.entries()? {
            let (record, is_held) = self.look(&name);
            let sysfs = record.as_ref().map(|record| record.sysfs().to_owned());
            owners.trees.extend(sysfs.clone());
            if is_held {
                let of_record = |record: &Record| record.undo() == Undo::Unmake;
                let held = Held {
                    is_made: record.as_ref().map(of_record),
                    owner: record.map_or_else(Owner::default, |record| record.owner()),
                    sysfs,
                };
                owners.held.insert(address, held);
            }
        }
        Ok(owners)
    }

    fn entries(&self) -> Result<Vec<(String, Address)>, ClaimError> {
        let names = names(self.claims.dir()).map_err(|source| self.claims.error("", source))?;
        let entry = |name: String| {
            let address = name.parse().ok()?;
            Some((name, address))
        };
        Ok(names.into_iter().filter_map(entry).collect())
    }

    /// What a claim says, and whether somebody has it. One that cannot be looked at is somebody's: better
    /// none than two.
    fn look(&self, name: &str) -> (Option<Record>, bool) {
        match self.claims.file(name, false) {
            Ok(file) => (Record::read(&file), !is_free(&file)),
            Err(error) => {
                log::warn!(error:%; "a claim cannot be looked at, and counts as taken");
                (None, true)
            }
        }
    }

    /// Takes back what those have made who are gone, and removes their files.
    pub(in crate::gpu) fn sweep(
        &self,
        tree: &SysfsTree,
        holders: &Holders<'_>,
    ) -> Result<(), ClaimError> {
        let place = tree.place();
        for (name, address) in self.entries()? {
            let Ok(file) = self.claims.file(&name, false) else {
                continue;
            };
            if file.try_lock().is_err() {
                continue;
            }
            let left = Record::read(&file).filter(Record::is_of_this_boot);
            let left = left.filter(|left| left.undo() != Undo::Nothing);
            if left.is_none_or(|left| clean_up(&left, tree, (&place, &address), holders)) {
                // Nobody else opens it meanwhile: claims are made by who has the allocation alone.
                let _ = fs::remove_file(self.claims.dir().join(&name));
            }
            let _ = file.unlock();
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
        let file = match self.claims.lock(&name, true, Duration::ZERO) {
            Err(ClaimError::Held { .. }) => {
                let held = io::Error::other("somebody has locked it meanwhile");
                return Err(self.claims.error(&name, held));
            }
            file => file?,
        };
        let record = Record::new(claim.vm, claim.tree, claim.undo);
        let written = record.write(&file);
        written.map_err(|source| self.claims.error(&name, source))?;
        Ok(Claim(file))
    }
}

/// Whether nobody has locked it. Unlocked, as a claim is: others may have a copy of the file for a moment.
fn is_free(file: &File) -> bool {
    file.try_lock().is_ok() && file.unlock().is_ok()
}

/// Does what an owner has left to be done; whether it is done.
fn clean_up(
    left: &Record,
    tree: &SysfsTree,
    (place, address): (&Path, &Address),
    holders: &Holders<'_>,
) -> bool {
    // Whoever that is: an open device is not taken away.
    if left.sysfs() != place || holders.of(address).is_some() {
        return false;
    }
    log::info!(address:%; "a partition whose owner is gone is as it was before");
    match left.undo().carry_out(tree, address) {
        Ok(()) => true,
        Err(error) => {
            log::warn!(address:%, error:%; "a partition whose owner is gone cannot be taken back");
            false
        }
    }
}

/// For whom a claim is.
#[derive(Clone, Copy)]
pub(super) struct NewClaim<'v> {
    pub(super) vm: &'v str,
    pub(super) tree: &'v SysfsTree,
    pub(super) undo: Undo,
}

/// A lock on a claim's file.
#[derive(Debug)]
pub(super) struct Claim(File);

impl Drop for Claim {
    /// A process that another thread is beginning has a copy of the file until it is another program.
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            log::warn!(error:%; "others may not be able to claim this GPU for a moment");
        }
    }
}

impl Claim {
    /// There is nothing to be taken back any more.
    pub(super) fn settle(&self, claim: NewClaim<'_>) -> io::Result<()> {
        Record::new(claim.vm, claim.tree, Undo::Nothing).write(&self.0)
    }

    /// What it has made is gone: the next has nothing to take back.
    pub(super) fn forget(&self) -> io::Result<()> {
        self.0.set_len(0)
    }
}
