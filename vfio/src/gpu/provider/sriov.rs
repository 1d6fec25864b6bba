//! GPUs whose partitions are virtual functions alike, as many as somebody has asked for.
//!
//! - Intel's xe and i915: by `sriov_numvfs`; each has an equal share unless it was given another
//!   (Documentation/ABI/testing/sysfs-driver-intel-xe-sriov).
//! - any other driver that has virtual functions: by `sriov_numvfs`;
//! - AMD's gim: by the option `vf_num` of its module (amd/MxGPU-Virtualization, gim_config.c), and by
//!   its release notes only as many as the GPU can be divided into.

use super::{AMD, NOT_OPENED, Provider, Survey, sriov_obstacle, total_vfs};
use crate::gpu::address::Address;
use crate::gpu::divide::{self, PartitionError, Task};
use crate::gpu::inventory::Partition;
use crate::gpu::offer::{self, Offer, Setup};
use crate::gpu::tree::Function;

/// Virtual functions of one driver.
pub(super) struct Sriov {
    name: &'static str,
    counts: fn(&Function<'_>) -> Option<Vec<u32>>,
    divide: fn(&Task<'_>, Option<Vec<u32>>) -> Result<bool, PartitionError>,
}

pub(super) static XE: Sriov = Sriov {
    name: "xe",
    counts: any_count,
    divide: |task, counts| divide::sriov::divide(task, counts, &[MOVING, "vfio-pci"]),
};

pub(super) static I915: Sriov = Sriov {
    name: "i915",
    counts: any_count,
    divide: |task, counts| divide::sriov::divide(task, counts, &["vfio-pci"]),
};

pub(super) static GIM: Sriov = Sriov {
    name: "gim",
    counts: gim_counts,
    divide: divide::gim::divide,
};

/// Whoever else has virtual functions. A model of a GPU does, too.
pub(super) static GENERIC: Sriov = Sriov {
    name: "its driver",
    counts: any_count,
    divide: |task, counts| divide::sriov::divide(task, counts, &["vfio-pci"]),
};

/// Drivers of GPUs that make no virtual functions, whatever the device could: `sriov_totalvfs` is the
/// PCI core's. vfio-pci makes some whose owner it knows nothing of.
const WITHOUT: [&str; 7] = [
    "amdgpu",
    "i915",
    "nouveau",
    "nova-core",
    "nvidia",
    "radeon",
    "vfio-pci",
];

/// Whether a GPU is taken to be partitioned by `sriov_numvfs` alone.
pub(super) fn is_generic(gpu: &Function<'_>, driver: &str) -> bool {
    // The kernel has nobody to ask where there is no driver; a model's functions have none, nor this
    // file of every device of a kernel.
    let has_none = driver.is_empty() && gpu.has("driver_override");
    total_vfs(gpu).is_some() && !has_none && !WITHOUT.contains(&driver)
}

/// The driver of virtual functions that can move (drivers/vfio/pci/xe).
const MOVING: &str = "xe-vfio-pci";

impl Provider for Sriov {
    fn name(&self) -> &'static str {
        self.name
    }

    fn obstacle(&self, gpu: &Function<'_>) -> Option<String> {
        sriov_obstacle(gpu)
    }

    fn survey(&self, gpu: &Function<'_>) -> Survey {
        let vfs = gpu.virtual_functions();
        let partition = |(number, vf): &(u16, Function<'_>)| partition(gpu, vf, *number);
        let partitions: Vec<_> = vfs.iter().map(partition).collect();
        Survey {
            valid_counts: (self.counts)(gpu),
            count: Some(partitions.len()),
            partitions,
        }
    }

    fn offers(&self, gpu: &Function<'_>) -> Vec<Offer> {
        let vfs = gpu.virtual_functions().into_iter();
        let offer = |(number, vf): (u16, Function<'_>)| Offer {
            address: Address::Pci(vf.address),
            kind: None,
            vram_bytes: share(gpu, &vf, number),
            setup: Setup::Ready,
            obstacle: offer::not_vfio(&vf),
        };
        vfs.map(offer).collect()
    }

    fn divide(&self, task: &Task<'_>) -> Result<bool, PartitionError> {
        (self.divide)(task, (self.counts)(task.gpu()))
    }
}

fn any_count(gpu: &Function<'_>) -> Option<Vec<u32>> {
    total_vfs(gpu).map(|total| (1..=total).collect())
}

/// By the release notes of gim up to 9.4.0.
fn gim_counts(gpu: &Function<'_>) -> Option<Vec<u32>> {
    let counts = match (gpu.hex16("vendor")?, gpu.hex16("device")?) {
        (AMD, 0x740f) => vec![1],                     // MI210
        (AMD, 0x74a1) => vec![1, 8],                  // MI300X
        (AMD, 0x7460 | 0x7461) => (1..=12).collect(), // Radeon PRO V710
        _ => return None,
    };
    let total = total_vfs(gpu)?;
    Some(counts.into_iter().filter(|count| *count <= total).collect())
}

/// Its memory: xe's is told by Linux 7.0 and later, a model's by its own file.
fn share(gpu: &Function<'_>, vf: &Function<'_>, number: u16) -> Option<u64> {
    // From 1 there.
    let own = u32::from(number) + 1;
    let quota = gpu.decimal(&format!("sriov_admin/vf{own}/profile/vram_quota"));
    quota
        .or_else(|| vf.decimal("vram_bytes"))
        .filter(|bytes| *bytes > 0)
}

fn partition(gpu: &Function<'_>, vf: &Function<'_>, number: u16) -> Partition {
    let (migratable, reason) = match vf.driver() {
        Some(driver) if driver == MOVING => (Some(true), None),
        Some(driver) => (Some(false), Some(format!("{driver} cannot move it"))),
        None if offer::has_socket(vf) => (None, Some(NOT_OPENED.to_owned())),
        None => (None, Some("it is bound to no driver".to_owned())),
    };
    Partition {
        vram_bytes: share(gpu, vf, number),
        migratable,
        ..Partition::unknown(vf.address.to_string(), reason)
    }
}
