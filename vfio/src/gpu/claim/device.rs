//! Claiming a device that was named, as it is: a PCI function or a mediated device, of a GPU or not.

use super::allocation::{Allocation, Claim, NewClaim};
use super::error::ClaimError;
use super::folder::Claims;
use crate::gpu::address::{Address, GpuAddress};
use crate::gpu::holders::Holders;
use crate::gpu::inventory::is_gpu;
use crate::gpu::offer::Undo;
use crate::gpu::provider::mdev;
use crate::gpu::tree::{Function, SysfsTree};

/// A device that a VM of this process has. Dropping it gives it back: close the device first.
#[derive(Debug)]
pub struct ClaimedDevice {
    _claim: Option<Claim>,
}

impl Claims {
    /// Claims the device at `address`, a PCI function's or a mediated device's UUID, for a VM of this
    /// process. It must be nobody's: neither itself, nor the GPU that it is a part of, nor a part of it. Of
    /// a device that is no GPU's nobody else need know: where the claims cannot be used, it is had without.
    ///
    /// # Errors
    /// [`ClaimError`] says who has it.
    pub fn acquire_device(
        &self,
        tree: &SysfsTree,
        address: &str,
        vm: &str,
    ) -> Result<ClaimedDevice, ClaimError> {
        let Ok(address) = address.parse::<Address>() else {
            let why = format!("{address} is neither a PCI function nor a mediated device");
            return Err(ClaimError::Missing(why));
        };
        let error = match self.claim_device(tree, &address, vm) {
            Ok(claim) => {
                let _claim = Some(claim);
                return Ok(ClaimedDevice { _claim });
            }
            Err(error) => error,
        };
        let is_of_gpu = match &address {
            Address::Pci(bdf) => is_gpu(&tree.function(*bdf)),
            Address::Mediated(_) => true,
        };
        let is_of_folder = matches!(
            error,
            ClaimError::File { .. }
                | ClaimError::Denied { .. }
                | ClaimError::Untrusted { .. }
                | ClaimError::Held { .. }
        );
        match is_of_folder && !is_of_gpu {
            true => {
                log::warn!(address:%, error:%; "a device is had without telling others of it");
                Ok(ClaimedDevice { _claim: None })
            }
            false => Err(error),
        }
    }

    fn claim_device(
        &self,
        tree: &SysfsTree,
        address: &Address,
        vm: &str,
    ) -> Result<Claim, ClaimError> {
        let allocation = self.allocation()?;
        allocation.sweep(tree, &Holders::of_tree(tree))?;
        check_free(&allocation, tree, address)?;
        let undo = Undo::Nothing;
        allocation.claim(address, NewClaim { vm, tree, undo })
    }
}

/// A device, what it is a part of, and its own parts are to be nobody's: a GPU is given whole or in parts,
/// never both.
fn check_free(
    allocation: &Allocation<'_>,
    tree: &SysfsTree,
    address: &Address,
) -> Result<(), ClaimError> {
    let owners = allocation.owners()?;
    let kin = kin(tree, address);
    let held = std::iter::once(address).chain(&kin).filter_map(|held| {
        let owner = owners.get(held)?;
        Some(match held == address {
            true => format!("{owner} has it"),
            false => format!("{owner} has {held}"),
        })
    });
    let held: Vec<_> = held.collect();
    match held.is_empty() {
        true => Ok(()),
        false => Err(ClaimError::Taken {
            device: address.to_string(),
            by: held.join(", "),
        }),
    }
}

/// What a device is a part of, and its parts: virtual functions and mediated devices.
fn kin(tree: &SysfsTree, address: &Address) -> Vec<Address> {
    let physical = |function: &Function<'_>| {
        let name = function.link("physfn");
        name.and_then(|name| name.parse::<GpuAddress>().ok())
    };
    match address {
        Address::Pci(address) => {
            let function = tree.function(*address);
            let vfs = function.virtual_functions().into_iter();
            let functions = vfs.map(|(_, vf)| vf.address).chain(physical(&function));
            let devices = mdev::devices(&function).into_iter();
            let devices = devices.map(|device| Address::Mediated(device.uuid));
            functions.map(Address::Pci).chain(devices).collect()
        }
        Address::Mediated(uuid) => {
            let parent = tree.mediated_parent(uuid);
            let physical = parent.and_then(|parent| physical(&tree.function(parent)));
            parent
                .into_iter()
                .chain(physical)
                .map(Address::Pci)
                .collect()
        }
    }
}
