//! A claimed partition.

use crate::gpu::address::{Address, GpuAddress};
use crate::gpu::change::ChangeError;
use crate::gpu::driver::HostDriver;
use crate::gpu::offer::{Attachment, Undo};
use crate::gpu::tree::SysfsTree;

use super::allocation::Claim;

/// A partition that a VM of this process has, or a whole GPU. Dropping it gives it back: close the device
/// first.
#[derive(Debug)]
pub struct ClaimedPartition {
    pub(super) tree: SysfsTree,
    pub(super) claim: Claim,
    pub(super) address: Address,
    pub(super) gpu: GpuAddress,
    pub(super) kind: Option<String>,
    pub(super) vram_bytes: Option<u64>,
    /// What is to be done at its end.
    pub(super) undo: Undo,
    pub(super) attachment: Attachment,
}

impl ClaimedPartition {
    /// A virtual function's address, a mediated device's UUID, or a GPU's address.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// What the driver calls its type.
    #[must_use]
    pub fn kind(&self) -> Option<&str> {
        self.kind.as_deref()
    }

    /// Who understands its state.
    #[must_use]
    pub fn host_driver(&self) -> HostDriver {
        HostDriver::of(&self.tree, &self.address())
    }

    /// Its video memory.
    #[must_use]
    pub fn vram_bytes(&self) -> Option<u64> {
        self.vram_bytes
    }

    /// The GPU that it is of.
    #[must_use]
    pub fn gpu(&self) -> GpuAddress {
        self.gpu
    }

    /// How it is opened: `/sys/bus/pci/devices/BDF`, `/sys/bus/mdev/devices/UUID`, or a model's socket.
    #[must_use]
    pub fn device_path(&self) -> &Attachment {
        &self.attachment
    }

    /// Gives it back: what the claim has made is taken back, then others can have it.
    ///
    /// # Errors
    /// The driver does not take it back, because the device is still open for instance. The partition is
    /// given up nevertheless; the next who claims one tries again.
    pub fn release(mut self) -> Result<(), ChangeError> {
        self.unmake()
    }

    fn unmake(&mut self) -> Result<(), ChangeError> {
        let undo = std::mem::take(&mut self.undo);
        if undo == Undo::Nothing {
            return Ok(());
        }
        undo.carry_out(&self.tree, &self.address)?;
        if let Err(error) = self.claim.forget() {
            log::warn!(address:% = self.address, error:%; "the claim's file cannot be emptied");
        }
        Ok(())
    }
}

impl Drop for ClaimedPartition {
    fn drop(&mut self) {
        if let Err(error) = self.unmake() {
            log::warn!(address:% = self.address, error:%; "a GPU partition cannot be taken back");
        }
    }
}
