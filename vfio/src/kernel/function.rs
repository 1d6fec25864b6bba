//! One assigned function, opened by the kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use vfio_bindings::bindings::vfio::VFIO_DEVICE_FLAGS_PCI;
use vmm_sys_util::eventfd::EventFd;

use super::dma_log::KernelDmaLog;
use super::error::KernelPath;
use super::group::Group;
use super::ioctl;
use super::irqs::{self, Irqs};
use super::kvm::Registration;
use super::mapping::RegionMapping;
use super::migration::KernelMigration;
use super::page_tables::{IommuLog, PageTables};
use super::regions::{self, Placed};
use super::space::FunctionDma;
use super::translation::Iommu;
use crate::backend::{BackendError, Irq, IrqKind, Region, RegionIndex, VfioBackend};
use crate::dma::DmaSpace;
use crate::dma_log::DmaLog;
use crate::migration::VfioMigration;

/// Where the command register is, and its bit for bus mastering (PCI Local Bus 3.0, 6.2.2).
const COMMAND: u64 = 4;
const COMMAND_BUS_MASTER: u16 = 1 << 2;

/// An open device with what belongs to it. The fields are dropped in this order.
pub(super) struct Opened {
    /// What KVM was told of the device's own node.
    pub(super) _kvm: Option<Registration>,
    /// Page tables in which the IOMMU notes what it writes.
    pub(super) tables: Option<Arc<PageTables>>,
    pub(super) device: File,
    /// The group through which it was opened.
    pub(super) _group: Option<Arc<Group>>,
    /// The address space outlives the device, which uses it.
    pub(super) dma: FunctionDma<Iommu>,
}

/// One function that the kernel's VFIO has opened for a VM. Dropping it turns its interrupts off,
/// takes guest memory out of its reach and closes it; parts of regions that are still mapped keep the
/// device open.
pub struct KernelFunction {
    name: Arc<str>,
    regions: BTreeMap<RegionIndex, Placed>,
    irqs: Irqs,
    path: KernelPath,
    migration: Option<KernelMigration>,
    dma_log: Option<Box<dyn DmaLog>>,
    opened: Opened,
}

impl KernelFunction {
    /// Examines an open device that has its address space.
    pub(super) fn new(
        name: Arc<str>,
        path: KernelPath,
        opened: Opened,
    ) -> Result<Self, BackendError> {
        let refused = |what| move |source| BackendError::Refused { what, source };
        let device = opened.device.as_fd();
        let info = ioctl::device_info(device).map_err(refused("tell what it is"))?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(BackendError::Absent("PCI configuration space"));
        }
        let mut regions = BTreeMap::new();
        for index in RegionIndex::ALL {
            let placed = regions::query(device, index, info.num_regions);
            if let Some(placed) = placed.map_err(refused("tell its regions"))? {
                regions.insert(index, placed);
            }
        }
        let irqs = Irqs::query(device, info.num_irqs);
        // The device's own costs the IOMMU nothing.
        let own = KernelDmaLog::query(device).map(|log| Box::new(log) as Box<dyn DmaLog>);
        let noted = || {
            let tables = opened.tables.as_ref()?;
            Some(Box::new(IommuLog::new(Arc::clone(tables))) as Box<dyn DmaLog>)
        };
        Ok(Self {
            name,
            regions,
            irqs: irqs.map_err(refused("tell its interrupts"))?,
            path,
            migration: KernelMigration::query(device),
            dma_log: own.or_else(noted),
            opened,
        })
    }

    /// Its address or UUID.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which way it was opened.
    #[must_use]
    pub fn path(&self) -> KernelPath {
        self.path
    }

    /// Where in the device's file an access goes.
    fn place(&self, region: RegionIndex, offset: u64, len: usize) -> Result<u64, BackendError> {
        let placed = self.regions.get(&region);
        let size = placed.map_or(0, |placed| placed.region.size);
        let end = offset.checked_add(len as u64).filter(|end| *end <= size);
        let outside = BackendError::OutsideRegion {
            region,
            offset,
            len,
            size,
        };
        let (Some(placed), Some(_)) = (placed, end) else {
            return Err(outside);
        };
        placed.offset.checked_add(offset).ok_or(outside)
    }

    /// Has VFIO signal a vector as if the device had sent it; for tests. A kind that is off is refused.
    ///
    /// # Errors
    /// [`BackendError::Refused`].
    #[cfg(any(test, feature = "testing"))]
    pub fn provoke(&self, kind: IrqKind, vector: u32) -> Result<(), BackendError> {
        let provoked = irqs::provoke(self.opened.device.as_fd(), kind, vector);
        provoked.map_err(|source| BackendError::Refused {
            what: "provoke an interrupt",
            source,
        })
    }

    /// Stops DMA before the memory goes: what the device still sent would be faults of the IOMMU.
    fn stop_dma(&self) -> Result<(), BackendError> {
        let mut command = [0; 2];
        self.read(RegionIndex::Config, COMMAND, &mut command)?;
        let stopped = u16::from_le_bytes(command) & !COMMAND_BUS_MASTER;
        self.write(RegionIndex::Config, COMMAND, &stopped.to_le_bytes())
    }
}

/// Repeats what a signal interrupted. A register is accessed in one piece or not at all, so there is
/// no second part.
fn whole(len: usize, mut transfer: impl FnMut() -> io::Result<usize>) -> io::Result<()> {
    loop {
        return match transfer() {
            Ok(count) if count == len => Ok(()),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
    }
}

impl VfioBackend for KernelFunction {
    fn region(&self, index: RegionIndex) -> Result<Region, BackendError> {
        let none = Region {
            size: 0,
            readable: false,
            writable: false,
            mappable: Vec::new(),
        };
        let placed = self.regions.get(&index);
        Ok(placed.map_or(none, |placed| placed.region.clone()))
    }

    fn read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        let at = self.place(index, offset, data.len())?;
        whole(data.len(), || self.opened.device.read_at(data, at)).map_err(|source| {
            BackendError::Refused {
                what: "read a region",
                source,
            }
        })
    }

    fn write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        let at = self.place(index, offset, data.len())?;
        whole(data.len(), || self.opened.device.write_at(data, at)).map_err(|source| {
            BackendError::Refused {
                what: "write a region",
                source,
            }
        })
    }

    fn map_region(
        &self,
        index: RegionIndex,
        offset: u64,
        len: u64,
    ) -> Result<RegionMapping, BackendError> {
        let placed = self.regions.get(&index);
        let placed = placed.ok_or(BackendError::Absent("region of that number"))?;
        let end = offset.checked_add(len).filter(|_| len > 0);
        let is_within = |(start, size): &(u64, u64)| {
            *start <= offset && end.is_some_and(|end| end <= start + size)
        };
        if !placed.region.mappable.iter().any(is_within) {
            return Err(BackendError::Absent("part of a region that can be mapped"));
        }
        let at = placed.offset.saturating_add(offset);
        let writable = placed.region.writable;
        let mapping = RegionMapping::new(self.opened.device.as_fd(), at, len, writable);
        mapping.map_err(|source| BackendError::Refused {
            what: "map a region",
            source,
        })
    }

    fn irq(&self, kind: IrqKind) -> Result<Irq, BackendError> {
        Ok(self.irqs.irq(kind))
    }

    fn set_irqs(&self, kind: IrqKind, events: &[&EventFd]) -> Result<(), BackendError> {
        self.irqs.set(self.opened.device.as_fd(), kind, events)
    }

    fn unmask_intx(&self) -> Result<(), BackendError> {
        self.irqs.unmask_intx(self.opened.device.as_fd())
    }

    fn dma(&self) -> &dyn DmaSpace {
        &self.opened.dma
    }

    /// Errors and requests, which are the host's, stay on.
    fn reset(&self) -> Result<(), BackendError> {
        let device = self.opened.device.as_fd();
        self.irqs.turn_off(device, &irqs::OF_FUNCTION)?;
        // Not only where the device's flags promise it: sample devices reset without.
        match reset_soon(device) {
            Ok(()) => {
                self.migration.iter().for_each(KernelMigration::end_session);
                Ok(())
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                Err(BackendError::Absent("reset"))
            }
            Err(source) => Err(BackendError::Refused {
                what: "reset",
                source,
            }),
        }
    }

    fn migration(&self) -> Option<&dyn VfioMigration> {
        let migration = self.migration.as_ref();
        migration.map(|migration| migration as &dyn VfioMigration)
    }

    fn dma_log(&self) -> Option<&dyn DmaLog> {
        self.dma_log.as_deref()
    }
}

/// Somebody else on the host may have the device's lock for a moment.
fn reset_soon(device: BorrowedFd<'_>) -> io::Result<()> {
    const TRIES: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(20);
    for _ in 1..TRIES {
        match ioctl::reset(device) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
    ioctl::reset(device)
}

impl Drop for KernelFunction {
    fn drop(&mut self) {
        self.irqs.close(self.opened.device.as_fd());
        if let Err(error) = self.stop_dma() {
            log::warn!(device = &*self.name, error:%; "an assigned device may still do DMA while it is closed");
        }
        self.opened.dma.clear();
    }
}
