//! All of a device that a guest can have changed, apart from its video memory.

use drover_guest::gpu::{COMMAND_BYTES, NO_VECTOR, RING_MAX, VECTORS};
use serde::{Deserialize, Serialize};

use super::config::{Bar, Config};

/// Bytes of the BAR with the MSI-X table and the pending bits.
pub(super) const MSIX_BYTES: usize = 0x2000;
/// Bytes of an entry of the MSI-X table (PCI 3.0, 6.8.2).
const MSIX_ENTRY: usize = 16;
/// Bytes of the MSI-X table.
pub(super) const MSIX_TABLE: usize = VECTORS as usize * MSIX_ENTRY;

/// A device's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) config: Config,
    /// The BAR with the MSI-X table. Who serves the guest keeps one of its own, as VFIO's users do.
    pub(super) msix: Vec<u8>,
    pub(super) registers: Registers,
    /// The command that is carried out.
    pub(super) job: Option<Job>,
}

/// The registers that change; see [`drover_guest::gpu::registers`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) enabled: bool,
    pub(super) error: u32,
    pub(super) error_address: u64,
    pub(super) ring_base: u64,
    pub(super) ring_size: u32,
    pub(super) ring_head: u32,
    pub(super) ring_tail: u32,
    pub(super) fence_vector: u32,
    pub(super) error_vector: u32,
    pub(super) fence: u64,
    pub(super) commands_done: u64,
}

/// A command that has begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Job {
    /// As it stood in the ring.
    pub(super) command: [u8; COMMAND_BYTES],
    /// Steps done.
    pub(super) done: u64,
}

impl State {
    /// Whether a device can have it: what is checked when registers are written, and the sizes.
    pub(super) fn is_sound(&self) -> bool {
        let registers = &self.registers;
        let has_vector = |vector: u32| vector < VECTORS || vector == NO_VECTOR;
        let has_ring = registers.ring_size.is_power_of_two()
            && (2..=RING_MAX).contains(&registers.ring_size)
            && registers.ring_base.is_multiple_of(4096)
            && registers.ring_head < registers.ring_size
            && registers.ring_tail < registers.ring_size;
        self.config.is_whole()
            && self.msix.len() == MSIX_BYTES
            && has_vector(registers.fence_vector)
            && has_vector(registers.error_vector)
            && (has_ring || !registers.enabled || registers.error != 0)
    }

    /// As after a reset.
    pub(super) fn new(bars: &[Bar]) -> Self {
        let mut msix = vec![0; MSIX_BYTES];
        for entry in msix[..MSIX_TABLE].chunks_exact_mut(MSIX_ENTRY) {
            // Vector control: masked.
            entry[12] = 1;
        }
        Self {
            config: Config::new(bars),
            msix,
            registers: Registers {
                enabled: false,
                error: 0,
                error_address: 0,
                ring_base: 0,
                ring_size: 0,
                ring_head: 0,
                ring_tail: 0,
                fence_vector: NO_VECTOR,
                error_vector: NO_VECTOR,
                fence: 0,
                commands_done: 0,
            },
            job: None,
        }
    }
}
