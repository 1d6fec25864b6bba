//! What the root bus needs of a function.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::bar::{BarChange, BarSpec};

/// A guest write that the kernel turns into an event without leaving for user space.
#[derive(Debug)]
pub struct Doorbell<'a> {
    /// Offset within the BAR; a write of any size and value there counts.
    pub offset: u64,
    /// Signalled by the write.
    pub event: &'a EventFd,
}

/// Memory of this process that a guest may be shown: it stays mapped as long as this lives.
pub trait HostMemory: Send + Sync {
    /// Address of its first byte in this process, a multiple of the page size.
    fn address(&self) -> u64;

    /// Bytes, a multiple of the page size.
    fn bytes(&self) -> u64;
}

/// A part of a BAR that guests reach without leaving for user space.
pub struct BarMapping {
    /// Offset within the BAR, a multiple of the page size.
    pub offset: u64,
    /// What is there.
    pub memory: Arc<dyn HostMemory>,
}

/// A PCI function on the root bus. Methods are called on vCPU threads, several at once.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space; `offset` is below 4096.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space and reports which BARs appear or disappear. The root applies
    /// them; the function must not reach for the bus itself.
    fn write_config(&self, offset: u16, data: &[u8]) -> Vec<BarChange>;

    /// Reads from a BAR.
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes to a BAR.
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]);

    /// Kinds and sizes of the BARs, fixed for the function's life.
    fn bars(&self) -> Vec<BarSpec>;

    /// Places a BAR as firmware would, before the guest runs.
    fn place_bar(&self, bar: u8, address: u64);

    /// Calls `visit` with every doorbell of `bar`.
    fn doorbells(&self, bar: u8, visit: &mut dyn FnMut(Doorbell<'_>));

    /// Calls `visit` with every part of `bar` that the guest reaches directly; the rest goes through
    /// [`PciFunction::read_bar`] and [`PciFunction::write_bar`].
    fn mappings(&self, bar: u8, visit: &mut dyn FnMut(BarMapping));

    /// Puts configuration space back to power-on and reports the BARs that disappear.
    fn reset_config(&self) -> Vec<BarChange>;

    /// BARs that configuration space decodes now, as maps: after a restore, they must be applied.
    fn decoded(&self) -> Vec<BarChange>;
}
