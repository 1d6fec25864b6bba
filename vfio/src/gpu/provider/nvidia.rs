//! NVIDIA's vGPUs on kernels from 6.8 on: the driver is a VFIO driver of its own, and a virtual
//! function becomes a vGPU when a type's number is written to its `nvidia/current_vgpu_type`.
//!
//! Formats: NVIDIA's `vgpu-device-manager` (internal/vfio) and listings of real hosts
//! (NVIDIA/gpu-operator issue 2594, bigstack-oss/cubecos issue 312).

use std::collections::{BTreeMap, BTreeSet};

use super::models::{GIB, partition_sizes, vram};
use super::{NOT_OPENED, Provider, SRIOV_TOTAL, Survey, sriov_obstacle, total_vfs, vgpu_config};
use crate::gpu::address::Address;
use crate::gpu::change::CURRENT_VGPU_TYPE as CURRENT;
use crate::gpu::divide::{self, PartitionError, Task};
use crate::gpu::inventory::Partition;
use crate::gpu::offer::{Kind, Offer, Setup};
use crate::gpu::tree::Function;

const CREATABLE: &str = "nvidia/creatable_vgpu_types";

/// Lines of a list that are read: more types than any GPU has.
const TYPES_MAX: usize = 256;

/// NVIDIA's way since vGPU 17.
pub(in crate::gpu) struct VendorVfio;

/// Types of vGPUs, by their numbers.
pub(in crate::gpu) type Types = BTreeMap<u32, String>;

/// Whether the driver makes vGPUs of this GPU. The other driver has no such files and no such module.
pub(super) fn is_vgpu_host(gpu: &Function<'_>) -> bool {
    let can = gpu.has(SRIOV_TOTAL) || partition_sizes(gpu).next().is_some();
    let vfs = gpu.virtual_functions();
    let has_types = vfs.iter().any(|(_, vf)| vf.has(CREATABLE));
    has_types || (can && gpu.tree.has_module("nvidia_vgpu_vfio"))
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
        let types = creatable_types(gpu);
        let names = type_names(gpu, &types);
        let partitions = vfs.iter().filter_map(|(_, vf)| partition(vf, &names));
        let partitions: Vec<_> = partitions.collect();
        let is_known = partitions.iter().all(|partition| partition.kind.is_some());
        Survey {
            valid_counts: counts(gpu, &types, &partitions),
            count: is_known.then_some(partitions.len()),
            partitions,
        }
    }

    fn offers(&self, gpu: &Function<'_>) -> Vec<Offer> {
        let vfs = gpu.virtual_functions();
        let names = type_names(gpu, &creatable_types(gpu));
        vfs.iter()
            .flat_map(|(_, vf)| offers_of(vf, &names))
            .collect()
    }

    fn divide(&self, task: &Task<'_>) -> Result<bool, PartitionError> {
        divide::nvidia::divide(task)
    }
}

/// What a virtual function is, or all that it could be.
fn offers_of(vf: &Function<'_>, names: &Types) -> Vec<Offer> {
    let offer = |id: u32, name: String, setup| Offer {
        address: Address::Pci(vf.address),
        vram_bytes: framebuffer(&name),
        kind: Some(Kind {
            id: id.to_string(),
            name,
        }),
        setup,
        obstacle: None,
    };
    match vf.decimal::<u32>(CURRENT) {
        None => Vec::new(),
        Some(0) => {
            let types = creatable(vf).into_iter();
            types
                .map(|(id, name)| offer(id, name, Setup::VgpuType(vf.address, id)))
                .collect()
        }
        Some(id) => {
            let name = name_or_number(names, id);
            vec![offer(id, name, Setup::Reset(vf.address, id))]
        }
    }
}

/// A virtual function that has a type.
fn partition(vf: &Function<'_>, names: &Types) -> Option<Partition> {
    let address = vf.address.to_string();
    let Some(id) = vf.decimal::<u32>(CURRENT) else {
        let reason = Some(format!("{CURRENT} cannot be read"));
        return Some(Partition::unknown(address, reason));
    };
    if id == 0 {
        return None;
    }
    let name = name_or_number(names, id);
    Some(Partition {
        vram_bytes: framebuffer(&name),
        kind: Some(name),
        ..Partition::unknown(address, Some(NOT_OPENED.to_owned()))
    })
}

fn name_or_number(names: &Types, id: u32) -> String {
    let name = names.get(&id).cloned();
    name.unwrap_or_else(|| format!("type {id}"))
}

/// These types, and those that the GPU's functions have and that may not be made any more.
pub(in crate::gpu) fn type_names(gpu: &Function<'_>, creatable: &Types) -> Types {
    let mut names = creatable.clone();
    let vfs = gpu.virtual_functions();
    let current = vfs
        .iter()
        .filter_map(|(_, vf)| vf.decimal::<u32>(CURRENT))
        .filter(|id| *id != 0 && !creatable.contains_key(id));
    let current: BTreeSet<u32> = current.collect();
    let file = gpu.tree.vgpu_config().filter(|_| !current.is_empty());
    if let Some(file) = file {
        names.extend(vgpu_config::names_of(file, &current));
    }
    names
}

/// The types of a GPU that can be made now: what is left depends on what there is already, and is not the
/// same everywhere.
pub(in crate::gpu) fn creatable_types(gpu: &Function<'_>) -> Types {
    let vfs = gpu.virtual_functions();
    vfs.iter().flat_map(|(_, vf)| creatable(vf)).collect()
}

/// The types that a virtual function can be given now: lines of number and name under a header.
pub(in crate::gpu) fn creatable(vf: &Function<'_>) -> Vec<(u32, String)> {
    let text = vf.text(CREATABLE).unwrap_or_default();
    let line = |line: &str| {
        let (id, name) = line.split_once(':')?;
        let (id, name) = (id.trim().parse().ok()?, name.trim());
        (!name.is_empty()).then(|| (id, name.to_owned()))
    };
    text.lines().filter_map(line).take(TYPES_MAX).collect()
}

/// Into how many vGPUs of one type the GPU can be divided. The lists tell of all types while there is
/// no vGPU; afterwards, of a model that is not known, nobody does.
fn counts(gpu: &Function<'_>, types: &Types, partitions: &[Partition]) -> Option<Vec<u32>> {
    // Parts of a GPU in MIG mode are counted otherwise.
    let names = types.values().filter(|name| !is_mig(name));
    let listed = names.filter_map(|name| framebuffer(name));
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

/// The memory of a GPU without vGPUs: as its vendor tells, or that of the largest type.
pub(in crate::gpu) fn whole(gpu: &Function<'_>, types: &Types) -> Option<u64> {
    let names = types.values().filter(|name| !is_mig(name));
    vram(gpu).max(names.filter_map(|name| framebuffer(name)).max())
}

/// A type's video memory, by its name: `NVIDIA A10-6Q` has 6 GiB, `NVIDIA H100-2-20C` 20, and a 0
/// stands for half a GiB (NVIDIA's vGPU user guide, "Virtual GPU types").
pub(in crate::gpu) fn framebuffer(name: &str) -> Option<u64> {
    let (_, last) = name.rsplit_once('-')?;
    // Of vGPUs on a part of the GPU with media engines.
    let last = last.strip_suffix("ME").unwrap_or(last);
    let digits = last.strip_suffix(['A', 'B', 'C', 'Q'])?;
    match digits.parse::<u64>().ok()? {
        0 => Some(GIB / 2),
        gib => gib.checked_mul(GIB),
    }
}

/// Whether a type is one of a part of the GPU: `NVIDIA H100-2-20C` has two slices.
fn is_mig(name: &str) -> bool {
    let parts = name.rsplit('-').nth(1);
    parts.is_some_and(|slices| !slices.is_empty() && slices.bytes().all(|b| b.is_ascii_digit()))
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

    #[test]
    fn types_of_a_part_of_the_gpu_are_told_from_the_others() {
        for (name, expected) in [
            ("NVIDIA H100-2-20C", true),
            ("NVIDIA A100-1-5CME", true),
            ("NVIDIA A10-6Q", false),
            ("NVIDIA RTX Pro 6000 Blackwell DC-96Q", false),
            ("6Q", false),
            ("", false),
        ] {
            assert_eq!(is_mig(name), expected, "{name}");
        }
    }
}
