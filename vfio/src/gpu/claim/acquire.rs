//! Claiming: all that a VM asks for, or nothing.

use super::allocation::{Allocation, NewClaim};
use super::choose::{choose, shortage};
use super::error::ClaimError;
use super::folder::Claims;
use super::partition::ClaimedPartition;
use super::request::GpuRequest;
use super::view::{Occupants, View};
use crate::gpu::address::GpuAddress;
use crate::gpu::holders::Holders;
use crate::gpu::offer::{Attachment, Offer, Undo};
use crate::gpu::tree::SysfsTree;

impl Claims {
    /// Claims what `request` says for a VM of this process, makes it where it has to be made, and leaves
    /// opening it to the caller.
    ///
    /// # Errors
    /// [`ClaimError`] says what there is, and who has it. Then nothing is claimed.
    pub fn acquire(
        &self,
        tree: &SysfsTree,
        request: &GpuRequest,
        vm: &str,
    ) -> Result<Vec<ClaimedPartition>, ClaimError> {
        self.acquire_all(tree, std::slice::from_ref(request), vm)
    }

    /// The same for several requests of a VM: all of them or none. What is claimed comes in their order.
    ///
    /// # Errors
    /// As [`Claims::acquire`].
    pub fn acquire_all(
        &self,
        tree: &SysfsTree,
        requests: &[GpuRequest],
        vm: &str,
    ) -> Result<Vec<ClaimedPartition>, ClaimError> {
        if let Some(mistake) = requests.iter().find_map(GpuRequest::mistake) {
            return Err(ClaimError::Request(mistake));
        }
        // Before what is claimed, so that it is let go after that when something fails.
        let allocation = self.allocation()?;
        let holders = Holders::of_tree(tree);
        allocation.sweep(tree, &holders)?;
        let mut claimed = Vec::new();
        let each = requests
            .iter()
            .flat_map(|request| (0..request.count).map(move |_| request));
        let views = || views(&allocation, tree, &holders);
        for request in each {
            match choose(&views()?, request) {
                Ok(chosen) => claimed.push(claim(&allocation, tree, chosen, vm)?),
                // Nothing that is given back makes it be there.
                Err(missing @ ClaimError::Missing(_)) => return Err(missing),
                Err(refusal) if claimed.is_empty() => return Err(refusal),
                Err(_) => {
                    let had = claimed.len();
                    // It is not this VM that has what there is.
                    drop(claimed);
                    return Err(shortage(&views()?, request, had));
                }
            }
        }
        Ok(claimed)
    }
}

fn views(
    allocation: &Allocation<'_>,
    tree: &SysfsTree,
    holders: &Holders<'_>,
) -> Result<Vec<View>, ClaimError> {
    let occupants = Occupants {
        tree,
        owners: &allocation.owners()?,
        holders,
    };
    Ok(View::all(&occupants)?)
}

/// Claims first, so that whoever comes after a kill knows what to take back.
fn claim(
    allocation: &Allocation<'_>,
    tree: &SysfsTree,
    (gpu, offer): (GpuAddress, Offer),
    vm: &str,
) -> Result<ClaimedPartition, ClaimError> {
    let undo = offer.setup.undo();
    let new = NewClaim { vm, tree, undo };
    let mut claimed = ClaimedPartition {
        tree: tree.clone(),
        claim: allocation.claim(&offer.address, new)?,
        gpu,
        kind: offer.kind.map(|kind| kind.name),
        vram_bytes: offer.vram_bytes,
        undo,
        attachment: Attachment::of(tree, &offer.address),
        address: offer.address,
    };
    let made = offer.setup.make(tree, &claimed.address);
    made.map_err(|source| ClaimError::Setup {
        gpu: gpu.to_string(),
        address: claimed.address(),
        source,
    })?;
    if let Undo::Retype(_) = undo {
        claimed.undo = Undo::Nothing;
        if let Err(error) = claimed.claim.settle(new) {
            log::warn!(address:% = claimed.address, error:%; "the claim's file cannot be written");
        }
    }
    Ok(claimed)
}
