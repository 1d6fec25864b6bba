//! What is the same for all drivers.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::gpu::address::{Address, GpuAddress};
use crate::gpu::change::ChangeError;
use crate::gpu::claim::{Allocation, ClaimError, Claims, Occupants};
use crate::gpu::holders::Holders;
use crate::gpu::inventory::gpus;
use crate::gpu::provider::{self, Provider};
use crate::gpu::tree::{Function, SysfsTree, TreeError};

/// NVIDIA's program that switches virtual functions on and off.
const SRIOV_MANAGE: &str = "/usr/lib/nvidia/sriov-manage";

/// Into what a GPU is to be divided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Division {
    /// Into how many; 0: it is not.
    pub count: u32,
    /// Of which type, by its number or its name; `None` where there are no types, or one alone makes so
    /// many.
    pub kind: Option<String>,
}

/// How a GPU is divided now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Divided {
    /// Which one.
    pub gpu: GpuAddress,
    /// Whether it was divided otherwise.
    pub changed: bool,
    /// The addresses of its partitions.
    pub partitions: Vec<String>,
}

/// A GPU is not divided as it should be.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// There is none at this address.
    #[error("{0} is no GPU of this host")]
    Missing(GpuAddress),
    /// It cannot be divided.
    #[error("GPU {gpu} cannot be divided: {why}")]
    Indivisible {
        /// Which one.
        gpu: GpuAddress,
        /// Why not.
        why: String,
    },
    /// Not into so many.
    #[error("GPU {gpu} cannot be divided into {count}, but into {valid}")]
    Count {
        /// Which one.
        gpu: GpuAddress,
        /// What was asked for.
        count: u32,
        /// What it can be divided into.
        valid: Counts,
    },
    /// Not into partitions of this type.
    #[error("GPU {gpu} {why}")]
    Type {
        /// Which one.
        gpu: GpuAddress,
        /// What is wrong with the type, and which there are.
        why: String,
    },
    /// Somebody has it, or a part of it.
    #[error("GPU {gpu} is in use: {holders}")]
    Busy {
        /// Which one.
        gpu: GpuAddress,
        /// Which partition, and who has it.
        holders: String,
    },
    /// Its driver takes no orders while it runs.
    #[error("GPU {gpu} cannot be divided by drover: {remedy}")]
    ByHand {
        /// Which one.
        gpu: GpuAddress,
        /// What to do.
        remedy: String,
    },
    /// A step went wrong.
    #[error("GPU {gpu} could not be divided; {restored}")]
    Step {
        /// Which one.
        gpu: GpuAddress,
        /// How it is now.
        restored: Restored,
        /// What went wrong.
        #[source]
        source: StepError,
    },
    /// Another GPU is in its place.
    #[error("GPU {gpu} is not the {expected} that was there when its division was saved")]
    Replaced {
        /// Which one.
        gpu: GpuAddress,
        /// Vendor and device of the one that was saved.
        expected: String,
    },
    /// Who has what cannot be told.
    #[error(transparent)]
    Claims(#[from] ClaimError),
    /// The host's devices cannot be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// How a GPU is after something went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restored {
    /// As it was before.
    Yes,
    /// Nobody knows.
    No,
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Yes => "it is divided as before",
            Self::No => "nor is it as before",
        })
    }
}

/// What went wrong with a step.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A driver refused.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// A driver did something else.
    #[error("{0}")]
    Unexpected(String),
    /// A vendor's program failed.
    #[error("{} failed: {said}", .program.display())]
    Tool {
        /// Which one.
        program: PathBuf,
        /// What it said.
        said: String,
    },
}

/// Numbers, ascending; those that follow each other are not all written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts(pub Vec<u32>);

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for &number in &self.0 {
            match runs.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
                _ => runs.push((number, number)),
            }
        }
        for (position, (first, last)) in runs.into_iter().enumerate() {
            let mark = if position == 0 { "" } else { ", " };
            match last - first {
                0 => write!(f, "{mark}{first}")?,
                1 => write!(f, "{mark}{first}, {last}")?,
                _ => write!(f, "{mark}{first} to {last}")?,
            }
        }
        Ok(())
    }
}

/// Divides GPUs of a host.
#[derive(Debug)]
pub struct Partitioner<'h> {
    tree: &'h SysfsTree,
    claims: &'h Claims,
    sriov_manage: Option<PathBuf>,
}

impl<'h> Partitioner<'h> {
    /// Of this host, whose partitions are claimed there. Another host's vendors' programs are not run.
    #[must_use]
    pub fn new(tree: &'h SysfsTree, claims: &'h Claims) -> Self {
        let sriov_manage = tree.is_of_host().then(|| PathBuf::from(SRIOV_MANAGE));
        Self {
            tree,
            claims,
            sriov_manage,
        }
    }

    /// With NVIDIA's `sriov-manage` at another place.
    #[must_use]
    pub fn with_sriov_manage(mut self, program: impl Into<PathBuf>) -> Self {
        self.sriov_manage = Some(program.into());
        self
    }

    pub(super) fn tree(&self) -> &SysfsTree {
        self.tree
    }

    /// Divides a GPU. Nothing is done when it is divided so already.
    ///
    /// # Errors
    /// [`PartitionError`] says what can be done instead; what was begun is taken back.
    pub fn divide(&self, gpu: GpuAddress, division: &Division) -> Result<Divided, PartitionError> {
        let all = gpus(self.tree)?;
        let function = all.iter().find(|function| function.address == gpu);
        let function = function.ok_or(PartitionError::Missing(gpu))?;
        let Some(provider) = provider::of(function) else {
            let why = match function.driver() {
                Some(driver) => format!("its driver, {driver}, does not do that here"),
                None => "it is bound to no driver".to_owned(),
            };
            return Err(PartitionError::Indivisible { gpu, why });
        };
        if let Some(why) = provider.obstacle(function) {
            return Err(PartitionError::Indivisible { gpu, why });
        }
        if let (0, Some(kind)) = (division.count, &division.kind) {
            let why = format!("is to have no partitions, so none of type {kind}");
            return Err(PartitionError::Type { gpu, why });
        }
        let allocation = self.claims.allocation()?;
        let holders = Holders::of_tree(self.tree);
        allocation.sweep(self.tree, &holders)?;
        let task = Task {
            gpu: *function,
            division,
            sriov_manage: self.sriov_manage.as_deref(),
            provider,
            allocation,
            holders,
        };
        let changed = provider.divide(&task)?;
        if changed {
            log::info!(gpu:%, count = division.count; "a GPU is divided anew");
        }
        let partitions = provider.survey(function).partitions.into_iter();
        Ok(Divided {
            gpu,
            changed,
            partitions: partitions.map(|partition| partition.address).collect(),
        })
    }
}

/// A GPU that is to be divided.
pub(in crate::gpu) struct Task<'t> {
    pub(super) gpu: Function<'t>,
    pub(super) division: &'t Division,
    pub(super) sriov_manage: Option<&'t Path>,
    provider: &'static dyn Provider,
    /// Nobody claims a part of it meanwhile.
    allocation: Allocation<'t>,
    holders: Holders<'t>,
}

impl<'t> Task<'t> {
    pub(in crate::gpu) fn gpu(&self) -> &Function<'t> {
        &self.gpu
    }

    /// What keeps others from claiming a part of it: locked as long as somebody has it open.
    pub(super) fn lock(&self) -> &File {
        self.allocation.lock()
    }

    /// Refuses when somebody has a part of it, or all: to be asked before anything is changed.
    pub(super) fn admit(&self) -> Result<(), PartitionError> {
        let occupants = Occupants {
            tree: self.gpu.tree,
            owners: &self.allocation.owners()?,
            holders: &self.holders,
        };
        let offers = self.provider.offers(&self.gpu).into_iter();
        let vfs = self.gpu.virtual_functions().into_iter();
        let mut addresses: Vec<Address> = offers.map(|offer| offer.address).collect();
        addresses.extend(vfs.map(|(_, vf)| Address::Pci(vf.address)));
        addresses.push(Address::Pci(self.gpu.address));
        addresses.sort_unstable();
        addresses.dedup();
        let held = addresses.into_iter().filter_map(|address| {
            let owner = occupants.of(&address)?;
            Some(format!("{address} by {owner}"))
        });
        let held: Vec<_> = held.collect();
        match held.is_empty() {
            true => Ok(()),
            false => Err(PartitionError::Busy {
                gpu: self.gpu.address,
                holders: held.join(", "),
            }),
        }
    }

    /// Whether one of these goes with the claim that somebody has of it: then it is none that the GPU is
    /// divided into.
    pub(super) fn is_temporary(
        &self,
        addresses: impl IntoIterator<Item = Address>,
    ) -> Result<bool, PartitionError> {
        let owners = self.allocation.owners()?;
        let mut addresses = addresses.into_iter();
        Ok(addresses.any(|address| owners.may_be_made(&address)))
    }

    /// Refuses a count that is not one of these; where they are not known the driver will.
    pub(super) fn check_count(&self, valid: Option<Vec<u32>>) -> Result<(), PartitionError> {
        let count = self.division.count;
        match valid {
            Some(valid) if count > 0 && !valid.contains(&count) => Err(PartitionError::Count {
                gpu: self.gpu.address,
                count,
                valid: Counts(valid),
            }),
            _ => Ok(()),
        }
    }

    /// Refuses a type where there are none.
    pub(super) fn check_no_type(&self) -> Result<(), PartitionError> {
        match &self.division.kind {
            None => Ok(()),
            Some(kind) => {
                Err(self.wrong_type(format!("has no types of partitions, so none named {kind}")))
            }
        }
    }

    pub(super) fn wrong_type(&self, why: String) -> PartitionError {
        PartitionError::Type {
            gpu: self.gpu.address,
            why,
        }
    }

    pub(super) fn failed(
        &self,
        source: StepError,
        restored: Result<(), StepError>,
    ) -> PartitionError {
        let restored = match restored {
            Ok(()) => Restored::Yes,
            Err(error) => {
                log::warn!(gpu:% = self.gpu.address, error:%; "a GPU cannot be divided as before");
                Restored::No
            }
        };
        PartitionError::Step {
            gpu: self.gpu.address,
            restored,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_written_as_a_range() {
        for (numbers, written) in [
            (&[][..], "nothing"),
            (&[1], "1"),
            (&[1, 2], "1, 2"),
            (&[1, 2, 3, 4, 6, 8, 12, 24], "1 to 4, 6, 8, 12, 24"),
            (&[u32::MAX], "4294967295"),
        ] {
            assert_eq!(Counts(numbers.to_vec()).to_string(), written);
        }
    }
}
