//! GPUs whose partitions are virtual functions alike, as many as somebody has asked for.
//!
//! - Intel's xe and i915: by `sriov_numvfs`; each has an equal share unless it was given another
//!   (Documentation/ABI/testing/sysfs-driver-intel-xe-sriov).
//! - AMD's gim: by the option `vf_num` of its module (amd/MxGPU-Virtualization, gim_config.c), and by
//!   its release notes only as many as the GPU can be divided into.

use super::{AMD, Provider, Survey, sriov_obstacle, total_vfs};
use crate::gpu::inventory::Partition;
use crate::gpu::tree::Function;

/// Virtual functions of one driver.
pub(super) struct Sriov {
    name: &'static str,
    counts: fn(&Function<'_>) -> Option<Vec<u32>>,
}

pub(super) static XE: Sriov = Sriov {
    name: "xe",
    counts: any_count,
};

pub(super) static I915: Sriov = Sriov {
    name: "i915",
    counts: any_count,
};

pub(super) static GIM: Sriov = Sriov {
    name: "gim",
    counts: gim_counts,
};

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

fn partition(gpu: &Function<'_>, vf: &Function<'_>, number: u16) -> Partition {
    // From 1 there.
    let own = u32::from(number) + 1;
    let share = gpu.decimal(&format!("sriov_admin/vf{own}/profile/vram_quota"));
    let (migratable, reason) = match vf.driver() {
        Some(driver) if driver == MOVING => (Some(true), None),
        Some(driver) => (Some(false), Some(format!("{driver} cannot move it"))),
        None => (None, Some("it is bound to no driver".to_owned())),
    };
    Partition {
        // Only the kernel's 7.0 and later tell.
        vram_bytes: share.filter(|bytes| *bytes > 0),
        migratable,
        ..Partition::unknown(vf.address.to_string(), reason)
    }
}
