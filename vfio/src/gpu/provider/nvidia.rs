//! NVIDIA's vGPUs on kernels from 6.8 on: the driver is a VFIO driver of its own, and a virtual
//! function becomes a vGPU when a type's number is written to its `nvidia/current_vgpu_type`.
//!
//! Formats: NVIDIA's `vgpu-device-manager` (internal/vfio) and listings of real hosts
//! (NVIDIA/gpu-operator issue 2594, bigstack-oss/cubecos issue 312).

use std::collections::BTreeSet;

use super::models::{GIB, partition_sizes, vram};
use super::{Provider, Survey, sriov_obstacle, total_vfs};
use crate::gpu::inventory::Partition;
use crate::gpu::tree::Function;

const CURRENT: &str = "nvidia/current_vgpu_type";
const CREATABLE: &str = "nvidia/creatable_vgpu_types";

/// Lines of a list that are read: more types than any GPU has.
const TYPES_MAX: usize = 256;

/// NVIDIA's way since vGPU 17.
pub(super) struct VendorVfio;

/// A type of vGPU.
#[derive(Debug, PartialEq, Eq)]
struct VgpuType {
    id: u32,
    name: String,
}

/// Whether the driver is that for vGPUs; the other has no such files and no such module.
pub(super) fn is_vgpu_host(gpu: &Function<'_>) -> bool {
    let has_types = |vf: &Function<'_>| vf.has(CREATABLE);
    gpu.tree.has_module("nvidia_vgpu_vfio") || gpu.virtual_functions().iter().any(has_types)
}

impl Provider for VendorVfio {
    fn name(&self) -> &'static str {
        "the vGPU driver"
    }

    fn obstacle(&self, gpu: &Function<'_>) -> Option<String> {
        sriov_obstacle(gpu)
    }

    fn survey(&self, gpu: &Function<'_>) -> Survey {
        let vfs = gpu.virtual_functions();
        // What is left depends on what there is already, and is not the same everywhere.
        let types: Vec<VgpuType> = vfs.iter().flat_map(creatable).collect();
        let partitions = vfs.iter().filter_map(|vf| partition(vf, &types));
        let partitions: Vec<_> = partitions.collect();
        Survey {
            valid_counts: counts(gpu, &types, &partitions),
            partitions: Some(partitions),
        }
    }
}

/// A virtual function that has a type.
fn partition(vf: &Function<'_>, types: &[VgpuType]) -> Option<Partition> {
    let address = vf.address.to_string();
    let Some(id) = vf.decimal::<u32>(CURRENT) else {
        let reason = format!("{CURRENT} cannot be read");
        return Some(Partition::unknown(address, reason));
    };
    if id == 0 {
        return None;
    }
    let known = types.iter().find(|kind| kind.id == id);
    let name = known.map_or_else(|| format!("type {id}"), |kind| kind.name.clone());
    Some(Partition {
        vram_bytes: framebuffer(&name),
        kind: Some(name),
        ..Partition::unknown(address, "its driver tells once it is opened".to_owned())
    })
}

/// The types that a virtual function can be given now: lines of number and name under a header.
fn creatable(vf: &Function<'_>) -> Vec<VgpuType> {
    let text = vf.text(CREATABLE).unwrap_or_default();
    let line = |line: &str| {
        let (id, name) = line.split_once(':')?;
        let (id, name) = (id.trim().parse().ok()?, name.trim());
        let name = (!name.is_empty()).then(|| name.to_owned())?;
        Some(VgpuType { id, name })
    };
    text.lines().filter_map(line).take(TYPES_MAX).collect()
}

/// Into how many vGPUs of one type the GPU can be divided. The lists tell of all types while there is
/// no vGPU; afterwards, of a model that is not known, nobody does.
fn counts(gpu: &Function<'_>, types: &[VgpuType], partitions: &[Partition]) -> Option<Vec<u32>> {
    let listed = types.iter().filter_map(|kind| framebuffer(&kind.name));
    let mut sizes: BTreeSet<u64> = match partitions {
        [] => listed.collect(),
        _ => BTreeSet::new(),
    };
    if sizes.is_empty() {
        sizes.extend(partition_sizes(gpu));
    }
    let whole = vram(gpu).max(sizes.last().copied())?;
    let limit = total_vfs(gpu)?;
    let counts = sizes
        .iter()
        .filter_map(|size| u32::try_from(whole / size).ok());
    let counts: BTreeSet<u32> = counts.map(|count| count.min(limit)).collect();
    (!counts.is_empty()).then(|| counts.into_iter().collect())
}

/// A type's video memory, by its name: `NVIDIA A10-6Q` has 6 GiB, `NVIDIA H100-2-20C` 20, and a 0
/// stands for half a GiB (NVIDIA's vGPU user guide, "Virtual GPU types").
fn framebuffer(name: &str) -> Option<u64> {
    let (_, last) = name.rsplit_once('-')?;
    // Of vGPUs on a part of the GPU with media engines.
    let last = last.strip_suffix("ME").unwrap_or(last);
    let digits = last.strip_suffix(['A', 'B', 'C', 'Q'])?;
    match digits.parse::<u64>().ok()? {
        0 => Some(GIB / 2),
        gib => gib.checked_mul(GIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_out_of_a_types_name() {
        for (name, expected) in [
            ("NVIDIA A10-6Q", Some(6 * GIB)),
            ("NVIDIA A16-0B", Some(GIB / 2)),
            ("NVIDIA H100-1-10CME", Some(10 * GIB)),
            ("NVIDIA RTX Pro 6000 Blackwell DC-96Q", Some(96 * GIB)),
            ("NVIDIA A10", None),
            ("NVIDIA A10-Q", None),
            ("NVIDIA A10-6X", None),
            ("NVIDIA A10-18446744073709551615Q", None),
            ("", None),
        ] {
            assert_eq!(framebuffer(name), expected, "{name}");
        }
    }
}
