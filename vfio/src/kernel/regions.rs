//! The regions of a device: where they are in its file, and what can be mapped.

use std::io;
use std::os::fd::BorrowedFd;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ROM_REGION_INDEX, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};

use super::ioctl;
use crate::backend::{Region, RegionIndex};
use crate::dma::PAGE_BYTES;

/// A region and where it is in the device's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) region: Region,
    pub(super) offset: u64,
}

fn number(index: RegionIndex) -> u32 {
    match index {
        RegionIndex::Bar(bar) => u32::from(bar),
        RegionIndex::Rom => VFIO_PCI_ROM_REGION_INDEX,
        RegionIndex::Config => VFIO_PCI_CONFIG_REGION_INDEX,
    }
}

/// Asks the kernel for one of a device's `count` regions; `None` when it does not have it.
pub(super) fn query(
    device: BorrowedFd<'_>,
    index: RegionIndex,
    count: u32,
) -> io::Result<Option<Placed>> {
    if number(index) >= count {
        return Ok(None);
    }
    match ioctl::region_info(device, number(index)) {
        Ok(info) => {
            let placed = parse(&info).ok_or(io::ErrorKind::InvalidData)?;
            Ok((placed.region.size > 0).then_some(placed))
        }
        // So says vfio-pci of what a function does not have.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        Err(error) => Err(error),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(word.try_into().ok()?))
}

/// `struct vfio_region_info`; `None` when it is too short for itself.
fn parse(info: &[u8]) -> Option<Placed> {
    let flags = u32_at(info, 4)?;
    let first_capability = u32_at(info, 12)?;
    let (size, offset) = (u64_at(info, 16)?, u64_at(info, 24)?);
    let has = |flag| flags & flag != 0;
    let sparse = match has(VFIO_REGION_INFO_FLAG_CAPS) {
        true => sparse_areas(info, first_capability as usize),
        false => None,
    };
    let areas = match has(VFIO_REGION_INFO_FLAG_MMAP) {
        true => sparse.unwrap_or_else(|| vec![(0, size)]),
        false => Vec::new(),
    };
    let areas = areas.into_iter().filter_map(|area| whole_pages(area, size));
    let region = Region {
        size,
        readable: has(VFIO_REGION_INFO_FLAG_READ),
        writable: has(VFIO_REGION_INFO_FLAG_WRITE),
        mappable: areas.collect(),
    };
    Some(Placed { region, offset })
}

/// The areas of `VFIO_REGION_INFO_CAP_SPARSE_MMAP`; `None` when there is no such capability.
fn sparse_areas(info: &[u8], first: usize) -> Option<Vec<(u64, u64)>> {
    let mut at = first;
    loop {
        let header = u32_at(info, at)?;
        if header & 0xffff == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            break;
        }
        // Capabilities follow each other: no list leads back.
        let next = u32_at(info, at + 4)? as usize;
        if next <= at {
            return None;
        }
        at = next;
    }
    let count = u32_at(info, at + 8)? as usize;
    let areas = info.get(at + 16..)?.chunks_exact(16).take(count);
    areas
        .map(|area| Some((u64_at(area, 0)?, u64_at(area, 8)?)))
        .collect()
}

/// The whole pages of an area that lies in the region; `None` when there are none.
fn whole_pages((offset, len): (u64, u64), size: u64) -> Option<(u64, u64)> {
    let end = offset.checked_add(len)?.min(size) / PAGE_BYTES * PAGE_BYTES;
    let start = offset.checked_next_multiple_of(PAGE_BYTES)?;
    (start < end).then(|| (start, end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RWM: u32 =
        VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE | VFIO_REGION_INFO_FLAG_MMAP;

    fn info(flags: u32, capability: u32, size: u64, rest: &[u32]) -> Vec<u8> {
        let mut bytes: Vec<u8> = [32, flags, 0, capability]
            .iter()
            .copied()
            .flat_map(u32::to_le_bytes)
            .collect();
        bytes.extend(size.to_le_bytes());
        bytes.extend((1_u64 << 40).to_le_bytes());
        bytes.extend(rest.iter().copied().flat_map(u32::to_le_bytes));
        bytes
    }

    fn mappable(flags: u32, capability: u32, rest: &[u32]) -> Vec<(u64, u64)> {
        parse(&info(flags, capability, 0x8000, rest))
            .unwrap()
            .region
            .mappable
    }

    #[test]
    fn region_without_a_list_is_mappable_as_a_whole_or_not_at_all() {
        let placed = parse(&info(RWM, 0, 0x4000, &[])).unwrap();
        assert_eq!(placed.offset, 1 << 40);
        assert_eq!(placed.region.mappable, [(0, 0x4000)]);
        assert!(placed.region.readable && placed.region.writable);
        let read_only = parse(&info(VFIO_REGION_INFO_FLAG_READ, 0, 0xff, &[])).unwrap();
        assert!(read_only.region.readable && !read_only.region.writable);
        assert!(read_only.region.mappable.is_empty());
        // Less than a page cannot be mapped, whatever the flag says.
        assert!(
            parse(&info(RWM, 0, 0x100, &[]))
                .unwrap()
                .region
                .mappable
                .is_empty()
        );
    }

    #[test]
    fn sparse_list_is_found_behind_other_capabilities() {
        let flags = RWM | VFIO_REGION_INFO_FLAG_CAPS;
        // MSI-X mappable (3), then two areas, the second one not in whole pages.
        let list = [
            3 | 1 << 16,
            40,
            1 | 1 << 16,
            0,
            2,
            0,
            0,
            0,
            0x1000,
            0,
            0x2800,
            0,
            0x2000,
            0,
        ];
        assert_eq!(mappable(flags, 32, &list), [(0, 0x1000), (0x3000, 0x1000)]);
        // Without the sparse one, all of it.
        assert_eq!(mappable(flags, 32, &[3 | 1 << 16, 0]), [(0, 0x8000)]);
        // An empty list: nothing.
        assert!(mappable(flags, 32, &[1 | 1 << 16, 0, 0, 0]).is_empty());
    }

    #[test]
    fn broken_lists_end() {
        let flags = RWM | VFIO_REGION_INFO_FLAG_CAPS;
        let whole = [(0, 0x8000)];
        // A list that leads to itself, one that leads out of the structure, one that begins there.
        assert_eq!(mappable(flags, 32, &[3, 32]), whole);
        assert_eq!(mappable(flags, 32, &[3, 0xffff_fff0]), whole);
        assert_eq!(mappable(flags, 0xffff_ffff, &[]), whole);
        // More areas promised than there are; areas outside the region.
        let outside = [
            1,
            0,
            9,
            0,
            0x9000,
            0,
            0x1000,
            0,
            0xffff_f000,
            0xffff_ffff,
            0x2000,
            0,
        ];
        assert!(mappable(flags, 32, &outside).is_empty());
        assert_eq!(parse(&[0; 31]), None);
    }
}
