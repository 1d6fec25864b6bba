//! What every backend must do, checked over any of them.

mod dma;
mod interrupts;
mod regions;
#[cfg(test)]
mod tests;

use crate::backend::{IrqKind, RegionIndex, VfioBackend};

/// Has the device send a vector of a kind. What listens is signalled when this returns; where nothing
/// does it has no effect.
pub type Raise<'a> = &'a dyn Fn(IrqKind, u32);

/// Bytes of a region that hold what is written to them.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// The region.
    pub region: RegionIndex,
    /// Where they begin.
    pub offset: u64,
    /// How many.
    pub len: usize,
    /// What each of them is after a reset; `None` where the device promises nothing.
    pub after_reset: Option<u8>,
}

/// A fresh function that the suite is run over, with what its backend cannot say of it.
pub struct Subject<'a> {
    backend: &'a dyn VfioBackend,
    memory: Vec<Memory>,
    raise: Option<Raise<'a>>,
    masks_line: bool,
    maps_parts: bool,
}

impl<'a> Subject<'a> {
    /// Any function: all is checked that needs no knowledge of the device.
    #[must_use]
    pub fn new(backend: &'a dyn VfioBackend) -> Self {
        Self {
            backend,
            memory: Vec::new(),
            raise: None,
            masks_line: false,
            maps_parts: true,
        }
    }

    /// It has such memory.
    #[must_use]
    pub fn with_memory(mut self, memory: impl IntoIterator<Item = Memory>) -> Self {
        self.memory.extend(memory);
        self
    }

    /// Its interrupts can be provoked.
    #[must_use]
    pub fn raised_by(mut self, raise: Raise<'a>) -> Self {
        self.raise = Some(raise);
        self
    }

    /// It is the device itself that [`Subject::raised_by`] has raise them: its line is masked when it
    /// fires, and what is raised meanwhile waits.
    #[must_use]
    pub fn masking_its_line(mut self) -> Self {
        self.masks_line = true;
        self
    }

    /// Its areas are mapped from their beginnings alone, as those of the kernel's sample devices.
    #[must_use]
    pub fn mapping_no_parts(mut self) -> Self {
        self.maps_parts = false;
        self
    }

    /// Runs the suite. The device is reset by it, and its interrupts are off afterwards.
    ///
    /// # Panics
    /// When the backend breaks the contract.
    pub fn check(&self) {
        regions::check_config(self.backend);
        regions::enable_memory(self.backend);
        regions::check_all(self.backend, self.maps_parts);
        for memory in &self.memory {
            regions::check_memory(self.backend, *memory);
        }
        dma::check(self.backend);
        interrupts::check(self);
        self.check_reset();
        dma::check(self.backend);
    }

    /// The same device, as it was at power-on, with the memory in reach that it had.
    fn check_reset(&self) {
        let header = regions::identity(self.backend);
        let kept = dma::map_one(self.backend);
        self.backend.reset().expect("a reset");
        kept.check_and_unmap();
        let again = regions::identity(self.backend);
        assert_eq!(again, header, "another device after a reset");
        regions::enable_memory(self.backend);
        for memory in &self.memory {
            regions::check_memory_after_reset(self.backend, *memory);
        }
    }
}
