//! What translates the addresses of devices: a container with a type 1 IOMMU, or an I/O address space.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use iommufd_bindings::iommufd::{
    iommu_ioas_alloc, iommu_ioas_map, iommu_ioas_unmap,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as MAP_WRITEABLE,
};
use iommufd_ioctls::{IommuFd, IommufdError};
use parking_lot::Mutex;
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE1v2_IOMMU,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};

use super::ioctl;
use super::page_tables::PageTables;
use crate::dma::{DmaAccess, DmaRange};

/// What translates addresses for devices.
pub(super) trait Translation: Send + Sync {
    fn map(&self, range: DmaRange, access: DmaAccess) -> io::Result<()>;
    fn unmap(&self, range: DmaRange) -> io::Result<()>;

    /// Whether ranges may be BARs. A type 1 IOMMU takes them; iommufd takes memory only.
    fn maps_bars(&self) -> bool;
}

/// A container of groups with a type 1 IOMMU (Documentation/driver-api/vfio.rst).
pub(super) struct Container(OwnedFd);

impl Container {
    /// An open `/dev/vfio/vfio`.
    pub(super) fn new(file: OwnedFd) -> io::Result<Self> {
        let version = ioctl::api_version(file.as_fd())?;
        if version != VFIO_API_VERSION || !ioctl::has_extension(file.as_fd(), VFIO_TYPE1v2_IOMMU) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self(file))
    }

    /// Adds a group. The first one brings the IOMMU with it, which leaves with the last.
    pub(super) fn add(&self, group: BorrowedFd<'_>) -> io::Result<()> {
        ioctl::set_container(group, self.0.as_fd())?;
        match ioctl::has_iommu(self.0.as_fd()) {
            true => Ok(()),
            false => ioctl::set_iommu(self.0.as_fd(), VFIO_TYPE1v2_IOMMU),
        }
    }
}

impl Translation for Container {
    fn map(&self, range: DmaRange, access: DmaAccess) -> io::Result<()> {
        let flags = match access {
            DmaAccess::Read => VFIO_DMA_MAP_FLAG_READ,
            DmaAccess::ReadWrite => VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        };
        let map = vfio_iommu_type1_dma_map {
            argsz: ioctl::argsz::<vfio_iommu_type1_dma_map>(),
            flags,
            vaddr: range.host_address,
            iova: range.iova.0,
            size: range.len,
        };
        ioctl::map_dma(self.0.as_fd(), &map)
    }

    fn unmap(&self, range: DmaRange) -> io::Result<()> {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: ioctl::argsz::<vfio_iommu_type1_dma_unmap>(),
            flags: 0,
            iova: range.iova.0,
            size: range.len,
            ..Default::default()
        };
        ioctl::unmap_dma(self.0.as_fd(), &mut unmap)?;
        // A range that is not there is no error to the kernel.
        match unmap.size == range.len {
            true => Ok(()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn maps_bars(&self) -> bool {
        true
    }
}

/// An I/O address space of an iommufd (Documentation/userspace-api/iommufd.rst).
pub(super) struct Ioas {
    iommufd: Arc<IommuFd>,
    id: u32,
    /// Page tables of it in which the IOMMU notes what devices write.
    tables: Mutex<Vec<Arc<PageTables>>>,
}

impl Ioas {
    /// A new one of an open `/dev/iommu`.
    pub(super) fn new(file: OwnedFd) -> io::Result<Self> {
        let iommufd = Arc::new(IommuFd::new_from_fd(file.into()));
        let mut alloc = iommu_ioas_alloc {
            size: ioctl::argsz::<iommu_ioas_alloc>(),
            flags: 0,
            out_ioas_id: 0,
        };
        iommufd.alloc_iommu_ioas(&mut alloc).map_err(plain)?;
        Ok(Self {
            iommufd,
            id: alloc.out_ioas_id,
            tables: Mutex::default(),
        })
    }

    /// Lets a device that was opened by its own node use it; returns the device's id there.
    pub(super) fn add(&self, device: BorrowedFd<'_>) -> io::Result<u32> {
        ioctl::bind_iommufd(device, fd_of(&self.iommufd))
    }

    /// Makes it the address space of a device that was added, through page tables in which the IOMMU notes
    /// what the device writes, if it can; returns those.
    pub(super) fn attach(
        &self,
        device: BorrowedFd<'_>,
        id: u32,
    ) -> io::Result<Option<Arc<PageTables>>> {
        let mut tables = self.tables.lock();
        for known in &*tables {
            // Not if it is behind another IOMMU, or a mediated device, which is behind none.
            if ioctl::attach(device, known.id).is_ok() {
                return Ok(Some(Arc::clone(known)));
            }
        }
        match PageTables::new(&self.iommufd, self.id, id) {
            Ok(own) if ioctl::attach(device, own.id).is_ok() => {
                let own = Arc::new(own);
                tables.push(Arc::clone(&own));
                return Ok(Some(own));
            }
            Ok(_) => log::debug!("page tables that note writes are not the device's"),
            // As most say: EOPNOTSUPP, or ENOENT for those that are behind no IOMMU of their own.
            Err(error) => log::debug!(error:%; "the IOMMU does not note what a device writes"),
        }
        ioctl::attach(device, self.id).map(|()| None)
    }
}

pub(super) fn fd_of(iommufd: &IommuFd) -> BorrowedFd<'_> {
    #[expect(unsafe_code)]
    // SAFETY: the descriptor is open as long as `iommufd` is there, which is borrowed.
    unsafe {
        BorrowedFd::borrow_raw(iommufd.as_raw_fd())
    }
}

impl Translation for Ioas {
    fn map(&self, range: DmaRange, access: DmaAccess) -> io::Result<()> {
        let writeable = match access {
            DmaAccess::Read => 0,
            DmaAccess::ReadWrite => MAP_WRITEABLE,
        };
        let map = iommu_ioas_map {
            size: ioctl::argsz::<iommu_ioas_map>(),
            flags: MAP_FIXED_IOVA | MAP_READABLE | writeable,
            ioas_id: self.id,
            user_va: range.host_address,
            length: range.len,
            iova: range.iova.0,
            ..Default::default()
        };
        self.iommufd.map_iommu_ioas(&map).map_err(plain)
    }

    fn unmap(&self, range: DmaRange) -> io::Result<()> {
        let mut unmap = iommu_ioas_unmap {
            size: ioctl::argsz::<iommu_ioas_unmap>(),
            ioas_id: self.id,
            iova: range.iova.0,
            length: range.len,
        };
        self.iommufd.unmap_iommu_ioas(&mut unmap).map_err(plain)
    }

    fn maps_bars(&self) -> bool {
        false
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        // They are of it.
        self.tables.get_mut().clear();
        // An iommufd of others outlives this. Where a part of a device is still mapped into this
        // process, the device is still attached: then the address space goes with the iommufd.
        if let Err(error) = self.iommufd.destroy_iommu_object(self.id) {
            log::debug!(ioas = self.id, error:%; "an I/O address space stays until its iommufd is closed");
        }
    }
}

/// The kernel's answer, without the crate's words around it.
pub(super) fn plain(error: IommufdError) -> io::Error {
    match error {
        IommufdError::IommuIoasAlloc(source)
        | IommufdError::IommuIoasMap(source)
        | IommufdError::IommuIoasUnmap(source)
        | IommufdError::IommuHwptAlloc(source) => source.into(),
        other => io::Error::other(other),
    }
}

/// The one that all functions of a VM share.
pub(super) enum Iommu {
    Container(Container),
    Ioas(Ioas),
}

impl Translation for Iommu {
    fn map(&self, range: DmaRange, access: DmaAccess) -> io::Result<()> {
        match self {
            Self::Container(container) => container.map(range, access),
            Self::Ioas(ioas) => ioas.map(range, access),
        }
    }

    fn unmap(&self, range: DmaRange) -> io::Result<()> {
        match self {
            Self::Container(container) => container.unmap(range),
            Self::Ioas(ioas) => ioas.unmap(range),
        }
    }

    fn maps_bars(&self) -> bool {
        match self {
            Self::Container(container) => container.maps_bars(),
            Self::Ioas(ioas) => ioas.maps_bars(),
        }
    }
}
