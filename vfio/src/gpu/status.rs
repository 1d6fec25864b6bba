//! What can be done with a GPU.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::address::GpuAddress;
use super::provider::Provider;
use super::tree::Function;
use crate::Bdf;
use crate::kernel::is_harmless;

/// What can be done with a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// A VM can be given all of it; it cannot be partitioned.
    ReadyForDda,
    /// It can be partitioned, or is.
    Partitioned,
    /// Its driver could partition it, but this host does not let it.
    Paravirtualization,
    /// Neither.
    NotAssignable,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadyForDda => "Ready for DDA",
            Self::Partitioned => "Partitioned",
            Self::Paravirtualization => "Paravirtualization",
            Self::NotAssignable => "Not assignable",
        })
    }
}

pub(super) const NO_IOMMU: &str = "the host has no IOMMU at work: switch it on in the firmware (VT-d, AMD-Vi), and with Intel's \
     boot with intel_iommu=on";

/// PCI header type 1 (PCI 3.0, 6.1); bit 7 tells of further functions.
const HEADER_TYPE_BRIDGE: u8 = 1;
const HEADER_TYPE_OFFSET: usize = 0x0e;

/// A GPU's status, and why it has that.
pub(super) fn of(
    gpu: &Function<'_>,
    provider: Option<&dyn Provider>,
    count: Option<usize>,
) -> (Status, String) {
    let GpuAddress::Pci(address) = gpu.address else {
        return match provider {
            Some(provider) => (Status::Partitioned, divided(provider, count)),
            None => (Status::NotAssignable, "it is no PCI device".to_owned()),
        };
    };
    if let Some(why) = obstacle(gpu) {
        return (Status::NotAssignable, why);
    }
    let has_iommu = gpu.tree.has_iommu();
    let Some(provider) = provider else {
        return match whole(gpu, address, has_iommu) {
            Ok(how) => (Status::ReadyForDda, how),
            Err(why) => (Status::NotAssignable, why),
        };
    };
    let by = provider.name();
    if !has_iommu {
        let why = format!("{by} could partition it, but {NO_IOMMU}");
        return (Status::Paravirtualization, why);
    }
    if let Some(why) = provider.obstacle(gpu) {
        return (Status::Paravirtualization, why);
    }
    (Status::Partitioned, divided(provider, count))
}

fn divided(provider: &dyn Provider, count: Option<usize>) -> String {
    let by = provider.name();
    match count {
        None => format!("{by} partitions it; how it is divided cannot be read"),
        Some(0) => format!("{by} can partition it; it is not divided"),
        Some(1) => format!("{by} has made 1 partition of it"),
        Some(count) => format!("{by} has made {count} partitions of it"),
    }
}

/// What no driver mends.
fn obstacle(gpu: &Function<'_>) -> Option<String> {
    let header = gpu.bytes("config", HEADER_TYPE_OFFSET + 1);
    let kind = header.and_then(|header| header.last().map(|kind| kind & 0x7f));
    if kind == Some(HEADER_TYPE_BRIDGE) {
        return Some("it is a bridge".to_owned());
    }
    // The kernel shows a link's speed for PCI Express alone.
    (!gpu.has("max_link_speed")).then(|| {
        "it is a conventional PCI device: those cannot be told apart by an IOMMU".to_owned()
    })
}

/// Whether, and how, a VM can be given all of it.
fn whole(gpu: &Function<'_>, address: Bdf, has_iommu: bool) -> Result<String, String> {
    let Some(group) = gpu.iommu_group().filter(|_| has_iommu) else {
        return Err(match has_iommu {
            true => "it is in no IOMMU group".to_owned(),
            false => NO_IOMMU.to_owned(),
        });
    };
    let others = strangers(gpu, address, group);
    if !others.is_empty() {
        let others: Vec<_> = others.iter().map(Bdf::to_string).collect();
        let others = others.join(", ");
        return Err(format!(
            "IOMMU group {group} also has {others}: they cannot be kept apart"
        ));
    }
    let mut how = match gpu.driver().as_deref() {
        Some("vfio-pci") => "it is bound to vfio-pci".to_owned(),
        Some(driver) => format!("it has to be bound to vfio-pci instead of {driver} first"),
        None => "it has to be bound to vfio-pci first".to_owned(),
    };
    let used = used_siblings(gpu, address, group);
    if !used.is_empty() {
        how = format!("{how}; so must be, of the same device, {}", used.join(", "));
    }
    Ok(how)
}

/// The functions of the same device that drivers of the host have, and their drivers. They are in its
/// group, and would keep it from being opened.
fn used_siblings(gpu: &Function<'_>, own: Bdf, group: u32) -> Vec<String> {
    let members = gpu.tree.group(group).into_iter();
    let siblings = members.filter(|address| *address != own && address.is_beside(own));
    let used = siblings.filter_map(|address| {
        let driver = gpu.tree.function(address).driver()?;
        (!is_harmless(&driver)).then(|| format!("{address} ({driver})"))
    });
    used.collect()
}

/// Functions of other devices in its group, other than bridges.
fn strangers(gpu: &Function<'_>, own: Bdf, group: u32) -> Vec<Bdf> {
    /// Base class of bridges.
    const BASE_CLASS_BRIDGE: u32 = 0x06;
    let members = gpu.tree.group(group).into_iter();
    let is_bridge = |address: Bdf| {
        let class = gpu.tree.function(address).hex("class");
        class.is_some_and(|class| class >> 16 == BASE_CLASS_BRIDGE)
    };
    members
        .filter(|address| !address.is_beside(own) && !is_bridge(*address))
        .collect()
}
