//! One assigned function, opened: the kernel's, a vfio-user server's or a test model's.
//!
//! The methods mirror the kernel's interface (include/uapi/linux/vfio.h), which vfio-user carries
//! over a socket.

use std::io;

use vmm_sys_util::eventfd::EventFd;

use crate::dma::DmaSpace;
use crate::dma_log::DmaLog;
use crate::kernel::RegionMapping;
use crate::migration::VfioMigration;

/// A backend refused or broke.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// An access outside the region.
    #[error("{region:?}: access of {len} bytes at {offset:#x} is outside its {size:#x} bytes")]
    OutsideRegion {
        /// The region.
        region: RegionIndex,
        /// Where.
        offset: u64,
        /// How many bytes.
        len: usize,
        /// The region's size.
        size: u64,
    },
    /// The kernel or the server refused.
    #[error("{what}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// The server of the device broke the protocol, or is gone.
    #[error("{0}")]
    Server(String),
    /// The device does not have it.
    #[error("the device has no {0}")]
    Absent(&'static str),
}

/// A region of a PCI function (`VFIO_PCI_*_REGION_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RegionIndex {
    /// Base address register 0 to 5.
    Bar(u8),
    /// Expansion ROM.
    Rom,
    /// Configuration space.
    Config,
}

impl RegionIndex {
    /// Those that a PCI function can have, by their numbers.
    pub const ALL: [Self; 8] = [
        Self::Bar(0),
        Self::Bar(1),
        Self::Bar(2),
        Self::Bar(3),
        Self::Bar(4),
        Self::Bar(5),
        Self::Rom,
        Self::Config,
    ];
}

/// A region's size and abilities (`VFIO_DEVICE_GET_REGION_INFO`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 when the function does not have the region.
    pub size: u64,
    /// It can be read.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// Parts that can be mapped, as offset and length; the rest is accessed by read and write.
    pub mappable: Vec<(u64, u64)>,
}

/// How a function interrupts (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IrqKind {
    /// The legacy line.
    Intx,
    /// MSI.
    Msi,
    /// MSI-X.
    MsiX,
    /// An uncorrectable error was reported.
    Error,
    /// The host asks for the device back.
    Request,
}

/// An interrupt kind's size and abilities (`VFIO_DEVICE_GET_IRQ_INFO`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Irq {
    /// Vectors; 0 when the function does not have the kind.
    pub count: u32,
    /// The kernel masks the line when it fires; it must be unmasked after the guest's EOI.
    pub automasked: bool,
}

/// One assigned function. Methods may be called by several threads at once.
pub trait VfioBackend: Send + Sync {
    /// A region's size and abilities.
    ///
    /// # Errors
    /// [`BackendError`].
    fn region(&self, index: RegionIndex) -> Result<Region, BackendError>;

    /// Reads `data.len()` bytes at `offset`.
    ///
    /// # Errors
    /// [`BackendError::OutsideRegion`] before the device is asked.
    fn read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> Result<(), BackendError>;

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`BackendError::OutsideRegion`] before the device is asked.
    fn write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> Result<(), BackendError>;

    /// Maps `len` bytes at `offset`, whole pages within one of [`Region::mappable`], into this
    /// process.
    ///
    /// # Errors
    /// [`BackendError`].
    fn map_region(
        &self,
        index: RegionIndex,
        offset: u64,
        len: u64,
    ) -> Result<RegionMapping, BackendError>;

    /// An interrupt kind's size and abilities.
    ///
    /// # Errors
    /// [`BackendError`].
    fn irq(&self, kind: IrqKind) -> Result<Irq, BackendError>;

    /// Lets vector `i` of `kind` signal `events[i]`; an empty list turns the kind off. A kind that
    /// is on may be given another list.
    ///
    /// # Errors
    /// [`BackendError::Absent`] for more vectors than there are, [`BackendError`]; the kind is then off, as
    /// far as it can be.
    fn set_irqs(&self, kind: IrqKind, events: &[&EventFd]) -> Result<(), BackendError>;

    /// Lets the legacy line fire again after [`Irq::automasked`].
    ///
    /// # Errors
    /// [`BackendError::Absent`] when the line is off, [`BackendError`].
    fn unmask_intx(&self) -> Result<(), BackendError>;

    /// What the device may reach of guest memory.
    fn dma(&self) -> &dyn DmaSpace;

    /// Puts the function back to power-on (function-level reset). Its interrupts are off afterwards;
    /// [`IrqKind::Error`] and [`IrqKind::Request`], which are the host's, and what it may reach of
    /// memory stay.
    ///
    /// # Errors
    /// [`BackendError`].
    fn reset(&self) -> Result<(), BackendError>;

    /// The migration interface; `None` when the device has none and so cannot move.
    fn migration(&self) -> Option<&dyn VfioMigration>;

    /// The device's own log of its writes to guest memory; `None` when it keeps none: then all that it can
    /// reach counts as written.
    fn dma_log(&self) -> Option<&dyn DmaLog> {
        None
    }
}
