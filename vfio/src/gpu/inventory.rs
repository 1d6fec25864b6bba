//! The GPUs of a host.

use pci_ids::Device;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::address::{Address, GpuAddress};
use super::claim::{ClaimError, Claims, Occupants, Owners};
use super::holders::Holders;
use super::offer::Attachment;
use super::provider::{self, Survey};
use super::status::{self, Status};
use super::tree::{Function, SysfsTree, TreeError};

/// A number that the PCI SIG has given a vendor, or a vendor a device; written `0x10de`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciId(pub u16);

impl Serialize for PciId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#06x}", self.0))
    }
}

impl<'de> Deserialize<'de> for PciId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let id = text.strip_prefix("0x");
        let id = id.and_then(|digits| u16::from_str_radix(digits, 16).ok());
        let invalid = || serde::de::Error::custom(format!("{text:?} is no PCI number like 0x10de"));
        id.map(Self).ok_or_else(invalid)
    }
}

/// A GPU. What is not known, or is not there of one that is no PCI device, is `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Where it is.
    pub address: GpuAddress,
    /// Its name in the PCI ID database.
    pub name: Option<String>,
    /// PCI vendor.
    pub vendor_id: Option<PciId>,
    /// PCI device.
    pub device_id: Option<PciId>,
    /// PCI subsystem's device: the board.
    pub subsystem_id: Option<PciId>,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// That driver's version; drivers of the kernel's own tree have none.
    pub driver_version: Option<String>,
    /// The node of the host's memory that is nearest.
    pub numa_node: Option<u32>,
    /// Its IOMMU group.
    pub iommu_group: Option<u32>,
    /// Its video memory.
    pub vram_bytes: Option<u64>,
    /// What can be done with it.
    pub status: Status,
    /// Why that is so.
    pub reason: String,
    /// Into how many equal partitions it can be divided, ascending.
    pub valid_partition_counts: Option<Vec<u32>>,
    /// Into how many it is divided.
    pub partition_count: Option<u32>,
    /// What it is divided into, by address.
    pub partitions: Vec<Partition>,
    /// Whose all of it is.
    #[serde(default)]
    pub owner: Option<String>,
}

impl Gpu {
    /// Whether it is one of those that hosts should have in common.
    #[must_use]
    pub fn is_partitionable(&self) -> bool {
        matches!(
            self.status,
            Status::Partitioned | Status::Paravirtualization
        )
    }
}

/// A part of a GPU that a VM can be given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// A virtual function's address, or a mediated device's UUID.
    pub address: String,
    /// What the driver calls its type.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Its video memory.
    pub vram_bytes: Option<u64>,
    /// Whether it is in use.
    pub state: Option<PartitionState>,
    /// Whose it is.
    pub owner: Option<String>,
    /// Whether it goes with its owner, who has had it made.
    #[serde(default)]
    pub temporary: bool,
    /// Whether a VM moves with it.
    pub migratable: Option<bool>,
    /// Why that is so, or why it is not known.
    pub reason: Option<String>,
}

impl Partition {
    /// One of which nothing else is known.
    pub(super) fn unknown(address: String, reason: Option<String>) -> Self {
        Self {
            address,
            kind: None,
            vram_bytes: None,
            state: None,
            owner: None,
            temporary: false,
            migratable: None,
            reason,
        }
    }
}

/// How a partition stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PartitionState {
    /// Nobody has it.
    Free,
    /// A VM has it.
    Claimed,
}

/// Classes of GPUs: display controllers and processing accelerators (PCI Code and ID Assignment
/// Specification).
const BASE_CLASS_DISPLAY: u32 = 0x03;
const CLASS_ACCELERATOR: u32 = 0x1200;

/// The GPUs of a host, by address.
///
/// # Errors
/// [`TreeError`] when the host's devices cannot be listed. What cannot be read of one of them is not
/// known, and no error.
pub fn inventory(tree: &SysfsTree) -> Result<Vec<Gpu>, TreeError> {
    Ok(gpus(tree)?.iter().map(gpu).collect())
}

/// The same, with who has what by these claims, and by who has a device open. Without claims, or where
/// they cannot be read, nobody knows.
///
/// # Errors
/// As [`inventory`].
pub fn inventory_with(tree: &SysfsTree, claims: Option<&Claims>) -> Result<Vec<Gpu>, TreeError> {
    let mut gpus = inventory(tree)?;
    let Some(claims) = claims else {
        return Ok(gpus);
    };
    let look = || match claims.look()? {
        Some(allocation) => allocation.owners(),
        None => Ok(Owners::default()),
    };
    let owners: Result<Owners, ClaimError> = look();
    match owners {
        Ok(owners) => {
            let is_told = owners.know(tree) || tree.proc().is_some();
            let holders = &Holders::of_tree(tree);
            let is_seen = tree.proc().is_none() || holders.are_complete();
            let owners = &owners.of_tree(tree);
            let occupants = Occupants {
                tree,
                owners,
                holders,
            };
            let is_known = is_told && is_seen;
            gpus.iter_mut()
                .for_each(|gpu| fill_in(gpu, &occupants, is_known));
        }
        Err(error) => log::warn!(error:%; "who has which GPU cannot be told"),
    }
    Ok(gpus)
}

/// Whose each part is. What nobody has is free where everybody could be seen: all processes of this host,
/// or claims of the tree. A model's parts are known by their claims alone.
fn fill_in(gpu: &mut Gpu, occupants: &Occupants<'_>, is_known: bool) {
    let whole = occupants.of(&Address::Pci(gpu.address));
    gpu.owner = whole.map(|owner| owner.to_string());
    for partition in &mut gpu.partitions {
        let Ok(address) = partition.address.parse() else {
            continue;
        };
        let owner = occupants.of(&address);
        let attachment = Attachment::of(occupants.tree, &address);
        let is_model = matches!(attachment, Attachment::VfioUser(_));
        partition.state = match owner {
            Some(_) => Some(PartitionState::Claimed),
            None => (is_known || is_model).then_some(PartitionState::Free),
        };
        partition.temporary = occupants.owners.is_made(&address);
        partition.owner = owner.map(|owner| owner.to_string());
    }
}

/// The functions of a host that are GPUs, by address, and then those that are no PCI functions.
pub(super) fn gpus(tree: &SysfsTree) -> Result<Vec<Function<'_>>, TreeError> {
    let mut functions = tree.functions()?;
    functions.retain(|function| is_gpu(function) && !function.is_virtual());
    functions.extend(
        tree.parents()
            .into_iter()
            .filter(provider::mdev::is_display),
    );
    Ok(functions)
}

/// Whether a function has the class of a GPU; virtual ones have it, too.
pub(super) fn is_gpu(function: &Function<'_>) -> bool {
    let class = function.hex("class").map(|class| class >> 8);
    class.is_some_and(|class| class >> 8 == BASE_CLASS_DISPLAY || class == CLASS_ACCELERATOR)
}

fn gpu(function: &Function<'_>) -> Gpu {
    let ids = (function.hex16("vendor"), function.hex16("device"));
    let name = ids
        .0
        .zip(ids.1)
        .and_then(|(vendor, device)| name(vendor, device));
    let driver = function.driver();
    let provider = provider::of(function);
    let Survey {
        valid_counts,
        count,
        partitions,
    } = provider
        .map(|provider| provider.survey(function))
        .unwrap_or_default();
    let (status, reason) = match (function.address, ids) {
        (GpuAddress::Pci(_), (None, _) | (_, None)) => {
            let reason = "what it is cannot be read: its vendor, or its device".to_owned();
            (Status::NotAssignable, reason)
        }
        _ => status::of(function, provider, count),
    };
    Gpu {
        address: function.address,
        name,
        vendor_id: ids.0.map(PciId),
        device_id: ids.1.map(PciId),
        subsystem_id: function.hex16("subsystem_device").map(PciId),
        driver_version: driver.as_deref().and_then(|name| version(function, name)),
        driver,
        numa_node: function.decimal("numa_node"),
        iommu_group: function.iommu_group(),
        vram_bytes: provider::vram(function),
        status,
        reason,
        valid_partition_counts: valid_counts,
        partition_count: count.and_then(|count| u32::try_from(count).ok()),
        partitions,
        owner: None,
    }
}

fn name(vendor: u16, device: u16) -> Option<String> {
    let device = Device::from_vid_pid(vendor, device)?;
    Some(format!("{} {}", device.vendor().name(), device.name()))
}

/// A driver's module may have another name.
pub(super) fn version(function: &Function<'_>, driver: &str) -> Option<String> {
    let module = function.link("driver/module");
    let module = module.as_deref().unwrap_or(driver);
    function.tree.module_version(module)
}
