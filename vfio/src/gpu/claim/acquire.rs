//! Claiming: all that a VM asks for, or nothing.

use super::choose::choose;
use super::folder::{Allocation, ClaimError, Claims, NewClaim};
use super::partition::ClaimedPartition;
use super::request::GpuRequest;
use super::view::{Occupants, View};
use crate::Bdf;
use crate::gpu::holders::Holders;
use crate::gpu::offer::{Attachment, Offer};
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
        if let Some(mistake) = request.mistake() {
            return Err(ClaimError::Request(mistake));
        }
        // Before what is claimed, so that it is let go after that when something fails.
        let allocation = self.allocation()?;
        let holders = Holders::scan(tree);
        allocation.sweep(tree, &holders)?;
        let mut claimed = Vec::new();
        for _ in 0..request.count {
            let occupants = Occupants {
                tree,
                owners: &allocation.owners()?,
                holders: &holders,
            };
            let (gpu, offer) = choose(&View::all(&occupants)?, request)?;
            claimed.push(claim(&allocation, tree, (gpu, offer), vm)?);
        }
        Ok(claimed)
    }
}

/// Claims first, so that whoever comes after a kill knows what to take back.
fn claim(
    allocation: &Allocation<'_>,
    tree: &SysfsTree,
    (gpu, offer): (Bdf, Offer),
    vm: &str,
) -> Result<ClaimedPartition, ClaimError> {
    let is_making = offer.setup.is_making();
    let new = NewClaim {
        vm,
        is_making,
        tree,
    };
    let claimed = ClaimedPartition {
        tree: tree.clone(),
        claim: allocation.claim(&offer.address, new)?,
        gpu,
        kind: offer.kind.map(|kind| kind.name),
        vram_bytes: offer.vram_bytes,
        is_made: is_making,
        attachment: Attachment::of(tree, &offer.address),
        address: offer.address,
    };
    let made = offer.setup.make(tree, &claimed.address);
    made.map_err(|source| ClaimError::Setup {
        gpu,
        address: claimed.address(),
        source,
    })?;
    Ok(claimed)
}
