//! Drivers that make partitions of GPUs, and the files by which they tell of them.
//!
//! | module | driver | how |
//! |---|---|---|
//! | `nvidia` | nvidia, of vGPU 17 and later | virtual functions, each with a type written to `nvidia/current_vgpu_type` |
//! | `mdev` | nvidia before that, and others | mediated devices of the types in `mdev_supported_types` |
//! | `sriov` | xe, i915, gim, and any other with `sriov_totalvfs` | virtual functions, as many as `sriov_numvfs` or the driver's option says |
//! | `models` | | what vendors say of their GPUs |

pub(super) mod mdev;
mod models;
pub(super) mod nvidia;
mod sriov;
pub(super) mod vgpu_config;

use super::divide::{PartitionError, Task};
use super::inventory::Partition;
use super::offer::Offer;
use super::status::NO_IOMMU;
use super::tree::Function;

pub(super) use models::vram;

pub(super) const NVIDIA: u16 = 0x10de;
pub(super) const AMD: u16 = 0x1002;
pub(super) const INTEL: u16 = 0x8086;

/// More partitions than any GPU has: a larger number is none that a device has told.
const PARTITIONS_MAX: u32 = 256;

/// Why nobody knows whether a VM moves with a partition.
const NOT_OPENED: &str = "its driver tells once it is opened";

/// What a provider knows of a GPU.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Into how many equal partitions it can be divided, ascending.
    pub(super) valid_counts: Option<Vec<u32>>,
    /// How many there are; `None` when that cannot be read.
    pub(super) count: Option<usize>,
    /// What it is divided into, by address.
    pub(super) partitions: Vec<Partition>,
}

/// One way of partitioning.
pub(super) trait Provider {
    /// Who does it, for people.
    fn name(&self) -> &'static str;

    /// Why this GPU cannot be partitioned on this host, though its driver could.
    fn obstacle(&self, gpu: &Function<'_>) -> Option<String>;

    /// What there is.
    fn survey(&self, gpu: &Function<'_>) -> Survey;

    /// What VMs can be given of it as it is divided now, by address: whether others have it or not.
    fn offers(&self, gpu: &Function<'_>) -> Vec<Offer>;

    /// Divides it; `false` when it was divided so already.
    fn divide(&self, task: &Task<'_>) -> Result<bool, PartitionError>;
}

/// Who partitions a GPU, if its driver does.
pub(super) fn of(gpu: &Function<'_>) -> Option<&'static dyn Provider> {
    let driver = gpu.driver().unwrap_or_default();
    let has_mediated = || mdev::parents(gpu).next().is_some();
    match driver.as_str() {
        "nvidia" if has_mediated() => Some(&mdev::Mediated),
        "nvidia" if nvidia::is_vgpu_host(gpu) => Some(&nvidia::VendorVfio),
        // Without the vGPU software it has virtual functions that nobody can make.
        "nvidia" => None,
        "xe" if gpu.has(SRIOV_TOTAL) => Some(&sriov::XE),
        // The kernel's own has no parameter of this name, and makes none.
        "i915" if gpu.tree.has_parameter("i915", "max_vfs") => Some(&sriov::I915),
        "gim" => Some(&sriov::GIM),
        _ if has_mediated() => Some(&mdev::Mediated),
        _ if sriov::is_generic(gpu, &driver) => Some(&sriov::GENERIC),
        _ => None,
    }
}

/// How many virtual functions a device has (Documentation/ABI/testing/sysfs-bus-pci).
const SRIOV_TOTAL: &str = "sriov_totalvfs";

/// The same; `None` where SR-IOV is off, or the number is none.
pub(super) fn total_vfs(gpu: &Function<'_>) -> Option<u32> {
    let total = gpu.decimal(SRIOV_TOTAL)?;
    (1..=PARTITIONS_MAX).contains(&total).then_some(total)
}

/// What stands in the way where it is `None`.
fn sriov_obstacle(gpu: &Function<'_>) -> Option<String> {
    if !gpu.tree.has_iommu() {
        return Some(NO_IOMMU.to_owned());
    }
    if total_vfs(gpu).is_some() {
        return None;
    }
    Some(match gpu.text(SRIOV_TOTAL).as_deref() {
        None | Some("0") => {
            "its driver could partition it, but SR-IOV is off, in the firmware or by \
            the driver's option"
                .to_owned()
        }
        Some(text) => {
            let text: String = text.chars().take(20).collect();
            format!("its driver could partition it, but {SRIOV_TOTAL} is {text:?}")
        }
    })
}
