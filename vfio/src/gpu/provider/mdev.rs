//! Mediated devices: of the types that a parent has (Documentation/driver-api/vfio-mediated-device.rst).
//! NVIDIA's vGPUs on kernels before 6.8 are such, on the GPU itself or on its virtual functions.

use std::collections::{BTreeMap, BTreeSet};

use super::{NOT_OPENED, PARTITIONS_MAX, Provider, Survey};
use crate::gpu::address::{GpuAddress, Uuid};
use crate::gpu::divide::{self, PartitionError, Task};
use crate::gpu::inventory::Partition;
use crate::gpu::offer::{self, Kind, Offer, Setup};
use crate::gpu::tree::Function;

const TYPES: &str = "mdev_supported_types";

/// Types of one parent that are read: more than any has.
const TYPES_MAX: usize = 256;

/// Parents of mediated devices.
pub(super) struct Mediated;

/// The functions of a GPU that have types.
pub(super) fn parents<'t>(gpu: &Function<'t>) -> impl Iterator<Item = Function<'t>> {
    let vfs = gpu.virtual_functions().into_iter().map(|(_, vf)| vf);
    let all = std::iter::once(*gpu).chain(vfs);
    all.filter(|function| function.has(TYPES))
}

/// Whether a parent's mediated devices are PCI functions with a display, as those of the kernel's mbochs are
/// (samples/vfio-mdev): others make ports of serial lines.
pub(in crate::gpu) fn is_display(parent: &Function<'_>) -> bool {
    let kinds = parent.names(TYPES).into_iter().take(TYPES_MAX);
    let mut kinds = kinds.map(|id| format!("{TYPES}/{id}"));
    kinds.any(|folder| {
        let of = |file: &str| parent.text(&format!("{folder}/{file}")).unwrap_or_default();
        let description = of("description");
        let is_shown = description.contains("display") || framebuffer(&description).is_some();
        of("device_api") == "vfio-pci" && is_shown
    })
}

impl Provider for Mediated {
    fn name(&self) -> &'static str {
        "its driver"
    }

    fn obstacle(&self, _gpu: &Function<'_>) -> Option<String> {
        None
    }

    fn survey(&self, gpu: &Function<'_>) -> Survey {
        let mut partitions = Vec::new();
        // By type: those of an SR-IOV GPU are the same on each virtual function.
        let mut most: BTreeMap<String, u32> = BTreeMap::new();
        for parent in parents(gpu) {
            for id in parent.names(TYPES).into_iter().take(TYPES_MAX) {
                let kind = MdevType::read(&parent, &id);
                partitions.extend(kind.devices);
                let most = most.entry(id).or_default();
                *most = match kind.most {
                    Some(told) => told,
                    None => most.saturating_add(kind.available),
                };
            }
        }
        partitions.sort_by(|one, other| one.address.cmp(&other.address));
        partitions.truncate(PARTITIONS_MAX as usize);
        // What is left of a GPU that is divided tells nothing of the whole.
        let counts: BTreeSet<u32> = most.into_values().collect();
        let counts: BTreeSet<u32> = counts.range(1..=PARTITIONS_MAX).copied().collect();
        let is_known = partitions.is_empty() && !counts.is_empty();
        Survey {
            valid_counts: is_known.then(|| counts.into_iter().collect()),
            count: Some(partitions.len()),
            partitions,
        }
    }

    fn offers(&self, gpu: &Function<'_>) -> Vec<Offer> {
        let mut offers = Vec::new();
        for parent in parents(gpu) {
            for id in parent.names(TYPES).into_iter().take(TYPES_MAX) {
                let kind = MdevType::read(&parent, &id);
                offers.extend(kind.offers(&parent, &id));
            }
        }
        offers.sort_by(|one, other| one.address.cmp(&other.address));
        offers
    }

    fn divide(&self, task: &Task<'_>) -> Result<bool, PartitionError> {
        divide::mdev::divide(task)
    }
}

/// A mediated device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::gpu) struct Device {
    pub(in crate::gpu) uuid: Uuid,
    pub(in crate::gpu) parent: GpuAddress,
    /// Its type's folder.
    pub(in crate::gpu) kind: String,
}

/// All of a GPU, by type.
pub(in crate::gpu) fn devices(gpu: &Function<'_>) -> Vec<Device> {
    let mut devices = Vec::new();
    for parent in parents(gpu) {
        for kind in parent.names(TYPES).into_iter().take(TYPES_MAX) {
            let uuids = parent.names(&format!("{TYPES}/{kind}/devices")).into_iter();
            devices.extend(uuids.take(PARTITIONS_MAX as usize).filter_map(|uuid| {
                Some(Device {
                    uuid: uuid.parse().ok()?,
                    parent: parent.address,
                    kind: kind.clone(),
                })
            }));
        }
    }
    devices.sort_by(|one, other| (&one.kind, &one.uuid).cmp(&(&other.kind, &other.uuid)));
    devices
}

/// A type, over all parents of a GPU.
pub(in crate::gpu) struct GpuType {
    pub(in crate::gpu) name: String,
    /// How many there can be, with those that there are.
    pub(in crate::gpu) most: u32,
}

/// A GPU's types, by their folders.
pub(in crate::gpu) fn types(gpu: &Function<'_>) -> BTreeMap<String, GpuType> {
    let mut types = BTreeMap::new();
    for parent in parents(gpu) {
        for id in parent.names(TYPES).into_iter().take(TYPES_MAX) {
            let kind = MdevType::read(&parent, &id);
            let there = u32::try_from(kind.devices.len()).unwrap_or(PARTITIONS_MAX);
            let entry = types.entry(id).or_insert_with(|| GpuType {
                name: kind.name.clone(),
                most: 0,
            });
            let most = entry
                .most
                .saturating_add(kind.available)
                .saturating_add(there);
            entry.most = kind.most.unwrap_or(most).min(PARTITIONS_MAX);
        }
    }
    types
}

/// A function of a GPU that can have one more of this type.
pub(in crate::gpu) fn room(gpu: &Function<'_>, kind: &str) -> Option<GpuAddress> {
    let mut parents = parents(gpu);
    let has_room = |parent: &Function<'_>| MdevType::read(parent, kind).available > 0;
    parents.find(has_room).map(|parent| parent.address)
}

/// A type of mediated device.
struct MdevType {
    name: String,
    vram_bytes: Option<u64>,
    /// How many there can be, if it says so.
    most: Option<u32>,
    /// How many more there can be at this parent.
    available: u32,
    devices: Vec<Partition>,
}

impl MdevType {
    fn read(parent: &Function<'_>, id: &str) -> Self {
        let folder = format!("{TYPES}/{id}");
        let of = |file: &str| parent.text(&format!("{folder}/{file}"));
        let name = of("name").filter(|name| !name.is_empty());
        let description = of("description").unwrap_or_default();
        let devices = parent.names(&format!("{folder}/devices")).into_iter();
        let name = name.unwrap_or_else(|| id.to_owned());
        let vram_bytes = framebuffer(&description);
        let devices = devices.map(|uuid| Partition {
            kind: Some(name.clone()),
            vram_bytes,
            ..Partition::unknown(uuid, Some(NOT_OPENED.to_owned()))
        });
        let available = of("available_instances").and_then(|count| count.parse().ok());
        Self {
            most: max_instance(&description),
            available: available.unwrap_or(0),
            devices: devices.collect(),
            name,
            vram_bytes,
        }
    }

    /// Those that there are, and one that could be made.
    fn offers(&self, parent: &Function<'_>, id: &str) -> Vec<Offer> {
        let offer = |address, setup| Offer {
            address,
            kind: Some(Kind {
                id: id.to_owned(),
                name: self.name.clone(),
            }),
            vram_bytes: self.vram_bytes,
            setup,
            obstacle: None,
        };
        let devices = self.devices.iter().take(PARTITIONS_MAX as usize);
        let addresses = devices.filter_map(|device| device.address.parse().ok());
        let ready = addresses.map(|address| offer(address, Setup::Ready));
        let is_more = self.available > 0;
        let address = is_more.then(offer::new_mediated).flatten();
        let more = address.map(|address| {
            let setup = Setup::Mediated(parent.address, id.to_owned());
            offer(address, setup)
        });
        ready.chain(more).collect()
    }
}

/// NVIDIA's drivers tell how many vGPUs of a type one GPU has at most.
fn max_instance(description: &str) -> Option<u32> {
    let (_, rest) = description.split_once("max_instance=")?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// Video memory as drivers describe it: `framebuffer=6144M` (NVIDIA), `16 MB video memory` (the
/// kernel's mbochs).
fn framebuffer(description: &str) -> Option<u64> {
    const MIB: u64 = 1 << 20;
    let after = |mark: &str| Some(description.split_once(mark)?.1);
    let before = |mark: &str| Some(description.split_once(mark)?.0);
    let digits = match after("framebuffer=") {
        Some(rest) => rest.split_once('M')?.0,
        None => before(" MB video memory")?.rsplit(' ').next()?,
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_out_of_a_description() {
        let nvidia = "num_heads=4, frl_config=60, framebuffer=6144M, max_resolution=7680x4320";
        for (text, expected) in [
            (nvidia, Some(6144 << 20)),
            ("virtual display, 16 MB video memory", Some(16 << 20)),
            ("framebuffer=, max_instance=4", None),
            ("framebuffer=99999999999999999999M", None),
            ("video memory", None),
            ("", None),
        ] {
            assert_eq!(framebuffer(text), expected, "{text}");
        }
    }
}
