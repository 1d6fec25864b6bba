//! What there is on a host, and who has it.

use std::fmt;

use super::allocation::Owners;
use super::record::Owner;
use crate::gpu::address::{Address, GpuAddress};
use crate::gpu::holders::Holders;
use crate::gpu::inventory::gpus;
use crate::gpu::offer::{self, Offer, Setup};
use crate::gpu::provider;
use crate::gpu::status::{self, Status};
use crate::gpu::tree::{Function, SysfsTree, TreeError};

/// A GPU, as it can be given away.
#[derive(Debug)]
pub(super) struct View {
    pub(super) gpu: GpuAddress,
    /// Its partitions that nobody has, and those that could be made.
    pub(super) free: Vec<Offer>,
    /// Those that somebody has.
    pub(super) taken: Vec<Taken>,
    /// All of it.
    pub(super) whole: Whole,
}

/// A partition that somebody has.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) offer: Offer,
    pub(super) by: Owner,
}

/// Whether all of a GPU can be given.
#[derive(Debug)]
pub(super) enum Whole {
    Free(Offer),
    Taken(Owner),
    /// It is or can be divided, or cannot be given for another reason.
    Not(String),
}

/// Who has what, by claims and by open devices.
pub(in crate::gpu) struct Occupants<'o> {
    pub(in crate::gpu) tree: &'o SysfsTree,
    pub(in crate::gpu) owners: &'o Owners,
    pub(in crate::gpu) holders: &'o Holders<'o>,
}

impl Occupants<'_> {
    /// Who has this; `None` when nobody has.
    pub(in crate::gpu) fn of(&self, address: &Address) -> Option<Owner> {
        let claimed = self.owners.get(address).cloned();
        claimed.or_else(|| {
            let pid = self.holders.of(address)?;
            Some(Owner {
                vm: None,
                pid: Some(pid),
            })
        })
    }
}

impl View {
    /// All GPUs of a host, by address.
    pub(super) fn all(occupants: &Occupants<'_>) -> Result<Vec<Self>, TreeError> {
        let gpus = gpus(occupants.tree)?;
        Ok(gpus.iter().map(|gpu| Self::of(gpu, occupants)).collect())
    }

    fn of(gpu: &Function<'_>, occupants: &Occupants<'_>) -> Self {
        let provider = provider::of(gpu);
        let offers = provider
            .map(|provider| provider.offers(gpu))
            .unwrap_or_default();
        let is_divided = offers.iter().any(|offer| !offer.setup.is_making());
        let (mut free, mut taken) = (Vec::new(), Vec::new());
        for offer in offers {
            match occupants.of(&offer.address) {
                None => free.push(offer),
                // One for each type that it could have been given.
                Some(_)
                    if taken
                        .last()
                        .is_some_and(|last: &Taken| last.offer.address == offer.address) => {}
                Some(by) => taken.push(Taken { offer, by }),
            }
        }
        let whole = whole(gpu, occupants, is_divided);
        if let Whole::Taken(_) = whole {
            free.clear();
        }
        let gpu = gpu.address;
        Self {
            gpu,
            free,
            taken,
            whole,
        }
    }
}

fn whole(gpu: &Function<'_>, occupants: &Occupants<'_>, is_divided: bool) -> Whole {
    let address = Address::Pci(gpu.address);
    if let Some(owner) = occupants.of(&address) {
        return Whole::Taken(owner);
    }
    if is_divided {
        return Whole::Not("it is divided".to_owned());
    }
    if let GpuAddress::Parent(_) = gpu.address {
        return Whole::Not("it is no PCI device, of which only parts can be given".to_owned());
    }
    let (status, reason) = status::of(gpu, None, None);
    // Behind a server there is no IOMMU group to ask for.
    let attachment = offer::Attachment::of(occupants.tree, &address);
    let is_kernel = matches!(attachment, offer::Attachment::Kernel(_));
    if is_kernel && status != Status::ReadyForDda {
        return Whole::Not(reason);
    }
    match offer::not_vfio(gpu) {
        Some(why) => Whole::Not(why),
        None => Whole::Free(Offer {
            address,
            kind: None,
            vram_bytes: provider::vram(gpu),
            setup: Setup::Ready,
            obstacle: None,
        }),
    }
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}", self.offer.address, self.by)
    }
}
