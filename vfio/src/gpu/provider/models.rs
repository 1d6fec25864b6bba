//! What vendors say of models whose drivers do not tell.

use super::{AMD, INTEL, NVIDIA};
use crate::gpu::tree::Function;

pub(super) const GIB: u64 = 1 << 30;

/// A model. Boards with several GPUs have this for each.
struct Model {
    vendor: u16,
    device: u16,
    gib: u64,
    /// GiB of the partitions into which all of it can be divided evenly.
    sizes: &'static [u64],
}

const SIZES_16: &[u64] = &[1, 2, 4, 8, 16];
const SIZES_24: &[u64] = &[1, 2, 3, 4, 6, 8, 12, 24];
const SIZES_48: &[u64] = &[1, 2, 3, 4, 6, 8, 12, 16, 24, 48];

/// By the vendors' data sheets and, for sizes, NVIDIA's vGPU user guide ("Virtual GPU types"); the
/// numbers are those of the PCI ID database.
const MODELS: [Model; 13] = [
    model(NVIDIA, 0x2235, 48, SIZES_48), // A40
    model(NVIDIA, 0x2236, 24, SIZES_24), // A10
    model(NVIDIA, 0x25b6, 16, SIZES_16), // A2, A16
    model(NVIDIA, 0x26b5, 48, SIZES_48), // L40
    model(NVIDIA, 0x26b9, 48, SIZES_48), // L40S
    model(NVIDIA, 0x27b6, 24, SIZES_24), // L2
    model(NVIDIA, 0x27b8, 24, SIZES_24), // L4
    model(AMD, 0x740f, 64, &[]),         // Instinct MI210
    model(AMD, 0x74a1, 192, &[]),        // Instinct MI300X
    model(INTEL, 0x56c0, 16, &[]),       // Flex 170
    model(INTEL, 0x56c1, 6, &[]),        // Flex 140
    model(INTEL, 0xe211, 24, &[]),       // Arc Pro B60
    model(INTEL, 0xe212, 16, &[]),       // Arc Pro B50
];

const fn model(vendor: u16, device: u16, gib: u64, sizes: &'static [u64]) -> Model {
    Model {
        vendor,
        device,
        gib,
        sizes,
    }
}

fn find(gpu: &Function<'_>) -> Option<&'static Model> {
    let ids = (gpu.hex16("vendor")?, gpu.hex16("device")?);
    MODELS
        .iter()
        .find(|model| (model.vendor, model.device) == ids)
}

/// A GPU's memory: what its driver tells (amdgpu's `mem_info_vram_total`, a model's `vram_bytes`), else
/// what its vendor does.
pub(in crate::gpu) fn vram(gpu: &Function<'_>) -> Option<u64> {
    let files = ["mem_info_vram_total", "vram_bytes"];
    let told = files.iter().find_map(|file| gpu.decimal(file));
    let told = told.filter(|bytes| *bytes > 0);
    told.or_else(|| find(gpu).map(|model| model.gib * GIB))
}

/// Bytes of the partitions that a GPU can be divided into evenly, as its vendor tells.
pub(super) fn partition_sizes(gpu: &Function<'_>) -> impl Iterator<Item = u64> {
    let sizes = find(gpu).map_or(&[][..], |model| model.sizes);
    sizes.iter().map(|gib| gib * GIB)
}
