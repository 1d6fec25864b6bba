//! How much memory GPUs have whose drivers do not tell.

use super::{AMD, INTEL, NVIDIA};
use crate::gpu::tree::Function;

pub(super) const GIB: u64 = 1 << 30;

/// Vendor, device and GiB, by the vendors' data sheets; the numbers are those of the PCI ID
/// database. Boards with several GPUs have this much for each.
const KNOWN: [(u16, u16, u64); 13] = [
    (NVIDIA, 0x2235, 48), // A40
    (NVIDIA, 0x2236, 24), // A10
    (NVIDIA, 0x25b6, 16), // A2, A16
    (NVIDIA, 0x26b5, 48), // L40
    (NVIDIA, 0x26b9, 48), // L40S
    (NVIDIA, 0x27b6, 24), // L2
    (NVIDIA, 0x27b8, 24), // L4
    (AMD, 0x740f, 64),    // Instinct MI210
    (AMD, 0x74a1, 192),   // Instinct MI300X
    (INTEL, 0x56c0, 16),  // Flex 170
    (INTEL, 0x56c1, 6),   // Flex 140
    (INTEL, 0xe211, 24),  // Arc Pro B60
    (INTEL, 0xe212, 16),  // Arc Pro B50
];

/// A GPU's memory: what its driver tells (amdgpu's `mem_info_vram_total`, in bytes), else what the
/// vendor does.
pub(in crate::gpu) fn vram(gpu: &Function<'_>, vendor: u16, device: u16) -> Option<u64> {
    let told = gpu
        .decimal("mem_info_vram_total")
        .filter(|bytes| *bytes > 0);
    let known = KNOWN.iter().find(|(v, d, _)| (*v, *d) == (vendor, device));
    told.or_else(|| known.map(|(_, _, gib)| gib * GIB))
}
