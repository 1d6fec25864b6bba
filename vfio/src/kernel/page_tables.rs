//! What devices write to memory, as the IOMMU notes it in its page tables
//! (include/uapi/linux/iommufd.h, `IOMMU_HWPT_SET_DIRTY_TRACKING` and `IOMMU_HWPT_GET_DIRTY_BITMAP`).

use std::io;
use std::sync::Arc;
use std::time::Instant;

use iommufd_bindings::iommufd::{
    iommu_hwpt_alloc, iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING as DIRTY_TRACKING,
};
use iommufd_ioctls::IommuFd;
use parking_lot::Mutex;

use super::ioctl::{self, BitmapPage};
use super::translation::{fd_of, plain};
use crate::backend::BackendError;
use crate::dma_log::{LoggingDevice, PagedLog, Span};

/// Bytes that are asked about at once, of which the bitmap has 1 MiB.
const REPORT_BYTES: u64 = 32 << 30;

/// The largest pages of an IOMMU. What it notes of one is read at once.
const LARGEST_PAGE_BYTES: u64 = 1 << 30;

/// Page tables of an address space in which the IOMMU notes what is written.
pub(super) struct PageTables {
    iommufd: Arc<IommuFd>,
    pub(super) id: u32,
    /// Logs that are on.
    users: Mutex<usize>,
}

impl PageTables {
    /// Page tables of the address space `ioas`, of the kind of a device's IOMMU.
    ///
    /// # Errors
    /// The kernel's answer where that notes nothing.
    pub(super) fn new(iommufd: &Arc<IommuFd>, ioas: u32, device: u32) -> io::Result<Self> {
        let mut alloc = iommu_hwpt_alloc {
            size: ioctl::argsz::<iommu_hwpt_alloc>(),
            flags: DIRTY_TRACKING,
            dev_id: device,
            pt_id: ioas,
            ..Default::default()
        };
        iommufd.alloc_iommu_hwpt(&mut alloc).map_err(plain)?;
        Ok(Self {
            iommufd: Arc::clone(iommufd),
            id: alloc.out_hwpt_id,
            users: Mutex::default(),
        })
    }
}

impl Drop for PageTables {
    fn drop(&mut self) {
        if let Err(error) = self.iommufd.destroy_iommu_object(self.id) {
            let table = self.id;
            log::debug!(table, error:%; "page tables stay until their iommufd is closed");
        }
    }
}

/// The log of all devices behind the same page tables: what one of them asks for, the others do not hear
/// of again. All of a VM's devices are asked, one after the other, and what they tell is put together.
pub(super) struct IommuLog(Arc<PageTables>);

impl IommuLog {
    pub(super) fn new(tables: Arc<PageTables>) -> PagedLog<Self> {
        PagedLog::new(Self(tables))
    }
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> BackendError {
    move |source| BackendError::Refused { what, source }
}

impl LoggingDevice for IommuLog {
    fn start(&self, _: &[Span]) -> Result<u64, BackendError> {
        let tables = &self.0;
        let mut users = tables.users.lock();
        if *users == 0 {
            let set = ioctl::set_dirty_tracking(fd_of(&tables.iommufd), tables.id, true);
            set.map_err(refused("have the IOMMU note its writes to memory"))?;
        }
        *users += 1;
        Ok(LARGEST_PAGE_BYTES)
    }

    fn stop(&self) -> Result<(), BackendError> {
        let tables = &self.0;
        let mut users = tables.users.lock();
        if *users == 1 {
            let set = ioctl::set_dirty_tracking(fd_of(&tables.iommufd), tables.id, false);
            set.map_err(refused("stop to have the IOMMU note its writes to memory"))?;
        }
        *users = users.saturating_sub(1);
        Ok(())
    }

    fn report(&self, span: Span, bitmap: &mut [u64], _: Instant) -> Result<(), BackendError> {
        let (tables, words) = (&self.0, span.words());
        let mut pages = BitmapPage::of_words(words);
        let noted = (fd_of(&tables.iommufd), tables.id);
        let read = ioctl::dirty_bitmap(noted, (span.start, span.bytes()), &mut pages);
        read.map_err(refused("tell what the IOMMU has noted of its writes"))?;
        BitmapPage::merge(&pages, bitmap, words);
        Ok(())
    }

    fn report_bytes(&self) -> u64 {
        REPORT_BYTES
    }
}

/// The log of page tables of one's own, for tests: those of the device `device` of an iommufd, of its
/// address space `ioas`; and their id there.
///
/// # Errors
/// The kernel's answer where the device's IOMMU notes nothing.
#[cfg(any(test, feature = "testing"))]
pub fn iommu_log(
    iommufd: std::os::fd::OwnedFd,
    ioas: u32,
    device: u32,
) -> io::Result<(Box<dyn crate::DmaLog>, u32)> {
    let iommufd = Arc::new(IommuFd::new_from_fd(iommufd.into()));
    let tables = PageTables::new(&iommufd, ioas, device)?;
    let id = tables.id;
    Ok((Box::new(IommuLog::new(Arc::new(tables))), id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_iommufd_notes_nothing() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = iommu_log(null.into(), 1, 2).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }
}
