//! The system calls of VFIO (include/uapi/linux/vfio.h), each with the kernel's own answer.
//!
//! The descriptors are the caller's and open for the length of a call, which the borrow says. Every
//! structure begins with its size, and the kernel writes no further.

#![expect(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, IOMMUFD_TYPE,
    iommu_hwpt_get_dirty_bitmap, iommu_hwpt_set_dirty_tracking,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_SET, VFIO_TYPE,
    vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, vfio_device_feature_dma_logging_range,
    vfio_device_info, vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
    vfio_iommu_type1_info, vfio_irq_info, vfio_precopy_info, vfio_region_info,
};
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::ioctl_io_nr;

use crate::dma::PAGE_BYTES;

const TYPE: u32 = VFIO_TYPE as u32;
const IOMMU: u32 = IOMMUFD_TYPE as u32;

ioctl_io_nr!(
    IOMMU_HWPT_SET_DIRTY_TRACKING,
    IOMMU,
    IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING
);
ioctl_io_nr!(
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU,
    IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP
);

ioctl_io_nr!(VFIO_GET_API_VERSION, TYPE, VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, TYPE, VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, TYPE, VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, TYPE, VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, TYPE, VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, TYPE, VFIO_BASE + 6);
ioctl_io_nr!(VFIO_DEVICE_GET_INFO, TYPE, VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, TYPE, VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, TYPE, VFIO_BASE + 9);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, TYPE, VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, TYPE, VFIO_BASE + 11);
ioctl_io_nr!(VFIO_DEVICE_FEATURE, TYPE, VFIO_BASE + 17);
ioctl_io_nr!(VFIO_MIG_GET_PRECOPY_INFO, TYPE, VFIO_BASE + 21);
ioctl_io_nr!(VFIO_DEVICE_BIND_IOMMUFD, TYPE, VFIO_BASE + 18);
ioctl_io_nr!(VFIO_DEVICE_ATTACH_IOMMUFD_PT, TYPE, VFIO_BASE + 19);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, TYPE, VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, TYPE, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, TYPE, VFIO_BASE + 14);

/// Bytes of what a region's capabilities are read into; sparse lists have 16 bytes an entry.
const REGION_INFO_MAX: u32 = 64 << 10;

/// The size that a structure begins with.
#[expect(
    clippy::cast_possible_truncation,
    reason = "these structures have some dozen bytes"
)]
pub(super) const fn argsz<T>() -> u32 {
    mem::size_of::<T>() as u32
}

fn answer(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn done(result: i32) -> io::Result<()> {
    answer(result).map(drop)
}

fn word(value: u32) -> libc::c_ulong {
    libc::c_ulong::from(value)
}

/// The version of the container's interface.
pub(super) fn api_version(container: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: this takes no argument.
    answer(unsafe { ioctl(&container, VFIO_GET_API_VERSION()) })
}

pub(super) fn has_extension(container: BorrowedFd<'_>, extension: u32) -> bool {
    // SAFETY: the argument is a number.
    let result = unsafe { ioctl_with_val(&container, VFIO_CHECK_EXTENSION(), word(extension)) };
    result > 0
}

/// Whether a container has groups and an IOMMU model.
pub(super) fn has_iommu(container: BorrowedFd<'_>) -> bool {
    let mut info = vfio_iommu_type1_info {
        argsz: argsz::<vfio_iommu_type1_info>(),
        ..Default::default()
    };
    // SAFETY: the structure has the size that it begins with.
    let result = unsafe { ioctl_with_mut_ref(&container, VFIO_IOMMU_GET_INFO(), &mut info) };
    result == 0
}

pub(super) fn set_iommu(container: BorrowedFd<'_>, model: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    done(unsafe { ioctl_with_val(&container, VFIO_SET_IOMMU(), word(model)) })
}

/// The flags of a group: viable, in a container.
pub(super) fn group_flags(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = vfio_group_status {
        argsz: argsz::<vfio_group_status>(),
        ..Default::default()
    };
    // SAFETY: the structure has the size that it begins with.
    done(unsafe { ioctl_with_mut_ref(&group, VFIO_GROUP_GET_STATUS(), &mut status) })?;
    Ok(status.flags)
}

pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let container = container.as_raw_fd();
    // SAFETY: the argument is a number, a descriptor that is open.
    done(unsafe { ioctl_with_ref(&group, VFIO_GROUP_SET_CONTAINER(), &container) })
}

pub(super) fn device_of_group(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the name ends with a zero byte.
    let fd = unsafe { ioctl_with_ptr(&group, VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr()) };
    answer(fd)?;
    // SAFETY: the kernel made this descriptor just now, and nobody else has its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the devices of a container reach memory of this process. The range's owner keeps it mapped
/// until it is unmapped here.
pub(super) fn map_dma(container: BorrowedFd<'_>, map: &vfio_iommu_type1_dma_map) -> io::Result<()> {
    // SAFETY: the kernel reads a structure of the size that it begins with; it pins the memory that
    // the structure names, or refuses what is none of this process's.
    done(unsafe { ioctl_with_ref(&container, VFIO_IOMMU_MAP_DMA(), map) })
}

/// Ends that; how many bytes were unmapped is told in the structure.
pub(super) fn unmap_dma(
    container: BorrowedFd<'_>,
    unmap: &mut vfio_iommu_type1_dma_unmap,
) -> io::Result<()> {
    // SAFETY: the structure has the size that it begins with.
    done(unsafe { ioctl_with_mut_ref(&container, VFIO_IOMMU_UNMAP_DMA(), unmap) })
}

/// Makes an iommufd the one of a device that was opened by its own node; returns the device's id there.
pub(super) fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: argsz::<vfio_device_bind_iommufd>(),
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the structure has the size that it begins with.
    done(unsafe { ioctl_with_mut_ref(&device, VFIO_DEVICE_BIND_IOMMUFD(), &mut bind) })?;
    Ok(bind.out_devid)
}

/// Gives a bound device an address space, or page tables of one.
pub(super) fn attach(device: BorrowedFd<'_>, table: u32) -> io::Result<()> {
    let mut attach = vfio_device_attach_iommufd_pt {
        argsz: argsz::<vfio_device_attach_iommufd_pt>(),
        pt_id: table,
        ..Default::default()
    };
    // SAFETY: the structure has the size that it begins with.
    done(unsafe { ioctl_with_mut_ref(&device, VFIO_DEVICE_ATTACH_IOMMUFD_PT(), &mut attach) })
}

pub(super) fn device_info(device: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let mut info = vfio_device_info {
        argsz: argsz::<vfio_device_info>(),
        ..Default::default()
    };
    // SAFETY: the structure has the size that it begins with.
    done(unsafe { ioctl_with_mut_ref(&device, VFIO_DEVICE_GET_INFO(), &mut info) })?;
    Ok(info)
}

/// A region's `vfio_region_info` and the capabilities behind it.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u8>> {
    let mut size = argsz::<vfio_region_info>();
    loop {
        // In words, for the alignment: the size and the flags, the index and where capabilities are.
        let mut words = vec![0_u64; (size as usize).div_ceil(8)];
        if let [first, second, ..] = words.as_mut_slice() {
            (*first, *second) = (u64::from(size), u64::from(index));
        }
        let at = words.as_mut_ptr();
        // SAFETY: there are at least as many bytes as the structure says in its beginning.
        done(unsafe { ioctl_with_mut_ptr(&device, VFIO_DEVICE_GET_REGION_INFO(), at) })?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        // It tells the size that it needs for everything.
        let needed = words.first().map_or(0, |word| *word & u64::from(u32::MAX));
        let needed = u32::try_from(needed).unwrap_or(u32::MAX);
        if needed <= size {
            return Ok(bytes);
        }
        if needed > REGION_INFO_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        size = needed;
    }
}

pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<vfio_irq_info> {
    let mut info = vfio_irq_info {
        argsz: argsz::<vfio_irq_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: the structure has the size that it begins with.
    done(unsafe { ioctl_with_mut_ref(&device, VFIO_DEVICE_GET_IRQ_INFO(), &mut info) })?;
    Ok(info)
}

/// `vfio_irq_set`: `flags`, `index` and `count` as they are, one descriptor or -1 per vector. Fewer
/// vectors than asked for are an error that tells how many there are.
pub(super) fn set_irqs(
    device: BorrowedFd<'_>,
    (flags, index, count): (u32, u32, u32),
    events: &[i32],
) -> io::Result<()> {
    // The size, the flags, the index, the first vector and the count.
    let size = u32::try_from((5 + events.len()) * 4).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut words = vec![size, flags, index, 0, count];
    words.extend(events.iter().map(|event| event.cast_unsigned()));
    // SAFETY: there are as many bytes as the structure says in its beginning.
    let result = unsafe { ioctl_with_ptr(&device, VFIO_DEVICE_SET_IRQS(), words.as_ptr()) };
    match answer(result)? {
        0 => Ok(()),
        fewer => Err(io::Error::other(format!(
            "the host gives {fewer} of {count} vectors"
        ))),
    }
}

pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this takes no argument.
    done(unsafe { ioctl(&device, VFIO_DEVICE_RESET()) })
}

/// `vfio_device_feature` with 8 bytes behind it, as most have: which feature and what about it; the value
/// after the call.
pub(super) fn feature(device: BorrowedFd<'_>, flags: u32, value: u64) -> io::Result<u64> {
    const BYTES: u64 = 16;
    let mut words = [u64::from(flags) << 32 | BYTES, value];
    let at = words.as_mut_ptr();
    // SAFETY: there are as many bytes as the structure says in its beginning.
    done(unsafe { ioctl_with_mut_ptr(&device, VFIO_DEVICE_FEATURE(), at) })?;
    Ok(words[1])
}

/// Takes the device to a migration state, and returns the file through which its data flows, if that is
/// another one than before.
pub(super) fn set_migration_state(
    device: BorrowedFd<'_>,
    state: u32,
) -> io::Result<Option<OwnedFd>> {
    const SET: u32 = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
    let answer = feature(device, SET, u64::from(state))?;
    let [.., a, b, c, d] = answer.to_le_bytes();
    let fd = i32::from_le_bytes([a, b, c, d]);
    // SAFETY: the kernel made this descriptor just now, and nobody else has its number.
    Ok((fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// What is left to be read of a device that runs; of the file through which that flows.
pub(super) fn precopy_info(session: BorrowedFd<'_>) -> io::Result<vfio_precopy_info> {
    let mut info = vfio_precopy_info {
        argsz: argsz::<vfio_precopy_info>(),
        ..Default::default()
    };
    // SAFETY: the structure has the size that it begins with.
    done(unsafe { ioctl_with_mut_ref(&session, VFIO_MIG_GET_PRECOPY_INFO(), &mut info) })?;
    Ok(info)
}

/// A page of memory with a part of a bitmap, and with nothing else.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(super) struct BitmapPage(pub(super) [u64; Self::WORDS]);

impl BitmapPage {
    const WORDS: usize = 512;

    /// Sets the bits of the first `words` words of `pages` in `bitmap`, too.
    pub(super) fn merge(pages: &[Self], bitmap: &mut [u64], words: usize) {
        let read = pages.iter().flat_map(|page| page.0);
        for (word, read) in bitmap.iter_mut().zip(read.take(words)) {
            *word |= read;
        }
    }

    /// Room for so many words, all of them 0.
    pub(super) fn of_words(words: usize) -> Vec<Self> {
        vec![Self([0; Self::WORDS]); words.div_ceil(Self::WORDS)]
    }
}

/// Has a device log its writes to these ranges by pages of `page_bytes`; returns the bytes of those that it
/// logs by.
pub(super) fn start_dma_log(
    device: BorrowedFd<'_>,
    page_bytes: u64,
    ranges: &[vfio_device_feature_dma_logging_range],
) -> io::Result<u64> {
    const START: u32 = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
    const BYTES: u64 = 32;
    let count = u32::try_from(ranges.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut words = [
        u64::from(START) << 32 | BYTES,
        page_bytes,
        u64::from(count),
        ranges.as_ptr().expose_provenance() as u64,
    ];
    let at = words.as_mut_ptr();
    // SAFETY: there are as many bytes as the structure says in its beginning, and as many ranges, which are
    // borrowed and only read.
    done(unsafe { ioctl_with_mut_ptr(&device, VFIO_DEVICE_FEATURE(), at) })?;
    Ok(words[1])
}

/// Ends that.
pub(super) fn stop_dma_log(device: BorrowedFd<'_>) -> io::Result<()> {
    const STOP: u32 = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP;
    const BYTES: u64 = 8;
    let mut words = [u64::from(STOP) << 32 | BYTES];
    let at = words.as_mut_ptr();
    // SAFETY: there are as many bytes as the structure says in its beginning.
    done(unsafe { ioctl_with_mut_ptr(&device, VFIO_DEVICE_FEATURE(), at) })
}

/// Sets the bits of the pages of a range (first address, bytes) that the device has written, and has it
/// forget them. The bitmap has room for all of them.
pub(super) fn report_dma_log(
    device: BorrowedFd<'_>,
    (iova, bytes): (u64, u64),
    page_bytes: u64,
    bitmap: &mut [BitmapPage],
) -> io::Result<()> {
    const REPORT: u32 = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
    const BYTES: u64 = 40;
    let room = size_of_val(bitmap) as u64 * 8;
    if page_bytes == 0 || bytes.div_ceil(page_bytes) > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut words = [
        u64::from(REPORT) << 32 | BYTES,
        iova,
        bytes,
        page_bytes,
        bitmap.as_mut_ptr().expose_provenance() as u64,
    ];
    let at = words.as_mut_ptr();
    // SAFETY: there are as many bytes as the structure says in its beginning. The kernel sets bits only on
    // pages of memory that have a bit of the range; all of these are the bitmap's, which is borrowed for it.
    done(unsafe { ioctl_with_mut_ptr(&device, VFIO_DEVICE_FEATURE(), at) })
}

/// Has an IOMMU note in page tables of its own what devices write, or ends that.
pub(super) fn set_dirty_tracking(iommufd: BorrowedFd<'_>, table: u32, on: bool) -> io::Result<()> {
    let set = iommu_hwpt_set_dirty_tracking {
        size: argsz::<iommu_hwpt_set_dirty_tracking>(),
        flags: u32::from(on),
        hwpt_id: table,
        ..Default::default()
    };
    // SAFETY: the structure has the size that it begins with.
    done(unsafe { ioctl_with_ref(&iommufd, IOMMU_HWPT_SET_DIRTY_TRACKING(), &set) })
}

/// Sets the bits of the pages of 4 KiB from `iova` on, `bytes` long, that were written, and forgets that.
pub(super) fn dirty_bitmap(
    (iommufd, table): (BorrowedFd<'_>, u32),
    (iova, bytes): (u64, u64),
    bitmap: &mut [BitmapPage],
) -> io::Result<()> {
    let room = size_of_val(bitmap) as u64 * 8;
    if bytes.div_ceil(PAGE_BYTES) > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut get = iommu_hwpt_get_dirty_bitmap {
        size: argsz::<iommu_hwpt_get_dirty_bitmap>(),
        hwpt_id: table,
        iova,
        length: bytes,
        page_size: PAGE_BYTES,
        data: bitmap.as_mut_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the structure has the size that it begins with. The kernel sets bits only on pages of memory
    // that have a bit of the range; all of these are the bitmap's, which is borrowed for it.
    done(unsafe { ioctl_with_mut_ref(&iommufd, IOMMU_HWPT_GET_DIRTY_BITMAP(), &mut get) })
}
