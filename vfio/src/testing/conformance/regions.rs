//! Regions: what they say of themselves, accesses, and what is mapped of them.

use devices::pci::HostMemory;

use super::Memory;
use crate::backend::{BackendError, Region, RegionIndex, VfioBackend};
use crate::dma::PAGE_BYTES;

/// Of configuration space (PCI Local Bus 3.0, 6.1, 6.7 and 6.8.2).
const COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES: usize = 0x34;
const CAPABILITIES_MAX: usize = 48;
const CAPABILITY_MSIX: u8 = 0x11;

fn read(backend: &dyn VfioBackend, index: RegionIndex, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xa5; len];
    let done = backend.read(index, offset, &mut data);
    assert!(done.is_ok(), "{index:?}: {len} at {offset:#x}: {done:?}");
    data
}

fn region(backend: &dyn VfioBackend, index: RegionIndex) -> Region {
    backend.region(index).expect("asking is allowed")
}

/// Vendor and device.
pub(super) fn identity(backend: &dyn VfioBackend) -> Vec<u8> {
    read(backend, RegionIndex::Config, 0, 4)
}

/// BARs answer from now on.
pub(super) fn enable_memory(backend: &dyn VfioBackend) {
    let command = read(backend, RegionIndex::Config, COMMAND, 1)[0] | COMMAND_MEMORY;
    let written = backend.write(RegionIndex::Config, COMMAND, &[command]);
    written.expect("the command register");
}

/// The header reads the same in whichever pieces.
pub(super) fn check_config(backend: &dyn VfioBackend) {
    const HEADER_BYTES: usize = 64;
    let config = region(backend, RegionIndex::Config);
    assert!((64..=4096).contains(&config.size), "{config:x?}");
    assert!(config.readable && config.writable, "{config:x?}");
    let size = usize::try_from(config.size).expect("at most 4096");
    let whole = read(backend, RegionIndex::Config, 0, size);
    for width in [1, 2, 4, 8] {
        for offset in 0..=HEADER_BYTES - width {
            let part = read(backend, RegionIndex::Config, offset as u64, width);
            assert_eq!(
                part,
                whole[offset..offset + width],
                "{width} at {offset:#x}"
            );
        }
    }
    let last = read(backend, RegionIndex::Config, config.size - 1, 1);
    assert_eq!(last, whole[size - 1..], "the last byte");
}

pub(super) fn check_all(backend: &dyn VfioBackend, maps_parts: bool) {
    let table = msix_table(backend);
    for index in RegionIndex::ALL {
        let region = region(backend, index);
        let again = backend.region(index).expect("asking is allowed");
        assert_eq!(again, region, "{index:?} has changed");
        check_bounds(backend, index, region.size);
        if region.size == 0 {
            assert!(!region.readable && !region.writable, "{index:?} is absent");
            assert!(region.mappable.is_empty(), "{index:?} is absent");
        }
        let one = &mut [0];
        if !region.readable {
            assert!(backend.read(index, 0, one).is_err(), "{index:?}");
        }
        if !region.writable {
            assert!(backend.write(index, 0, one).is_err(), "{index:?}");
        }
        check_areas(backend, index, &region, maps_parts);
        check_refused_mappings(backend, index, &region);
        for (start, _) in region.mappable {
            let of_table = |(bar, page)| index == RegionIndex::Bar(bar) && start == page;
            // The kernel reads ones where the table is, and maps it as it is.
            if region.readable && !table.is_some_and(of_table) {
                check_same(backend, index, start);
            }
        }
    }
    for index in [RegionIndex::Bar(6), RegionIndex::Bar(u8::MAX)] {
        assert_eq!(region(backend, index).size, 0, "{index:?} is none");
        assert!(backend.read(index, 0, &mut [0]).is_err(), "{index:?}");
        assert!(backend.write(index, 0, &[0]).is_err(), "{index:?}");
        assert!(backend.map_region(index, 0, PAGE_BYTES).is_err());
    }
}

/// Who accesses what is not there is refused before the device is asked.
fn check_bounds(backend: &dyn VfioBackend, index: RegionIndex, size: u64) {
    let end = u64::MAX;
    let across = size.saturating_sub(1);
    for (offset, len) in [(across, 2), (across, 8), (size, 1), (end, 1), (end - 1, 4)] {
        let mut bytes = vec![0; len];
        let read = backend.read(index, offset, &mut bytes);
        for outside in [read, backend.write(index, offset, &bytes)] {
            let is_told = matches!(
                &outside,
                Err(BackendError::OutsideRegion { region, offset: at, len: bytes, size: end })
                    if (*region, *at, *bytes, *end) == (index, offset, len, size)
            );
            assert!(is_told, "{index:?}: {len} at {offset:#x}: {outside:?}");
        }
    }
}

/// They are whole pages of the region and apart from each other, and each of them can be mapped.
fn check_areas(backend: &dyn VfioBackend, index: RegionIndex, region: &Region, maps_parts: bool) {
    let mut end = 0;
    for &(start, len) in &region.mappable {
        let is_paged = start.is_multiple_of(PAGE_BYTES) && len.is_multiple_of(PAGE_BYTES);
        assert!(is_paged && len > 0, "{index:?}: {region:x?}");
        assert!(start >= end, "{index:?}: {region:x?}");
        end = start.checked_add(len).expect("within the region");
        assert!(end <= region.size, "{index:?}: {region:x?}");
        let last = (end - PAGE_BYTES, PAGE_BYTES);
        let parts = [(start, len), (start, PAGE_BYTES), last];
        let parts = parts.into_iter();
        for (offset, bytes) in parts.filter(|part| maps_parts || part.0 == start) {
            let mapping = backend.map_region(index, offset, bytes);
            let is_whole = mapping.as_ref().is_ok_and(|mapping| {
                mapping.bytes() == bytes && mapping.address().is_multiple_of(PAGE_BYTES)
            });
            assert!(
                is_whole,
                "{index:?}: {bytes:#x} at {offset:#x}: {mapping:x?}"
            );
        }
    }
}

/// Nothing but whole pages within an area is mapped.
fn check_refused_mappings(backend: &dyn VfioBackend, index: RegionIndex, region: &Region) {
    let is_mappable = |offset: u64, len: u64| {
        let covers = |&(start, bytes): &(u64, u64)| {
            let end = offset.checked_add(len);
            start <= offset && end.is_some_and(|end| end <= start + bytes)
        };
        region.mappable.iter().any(covers)
    };
    let far = u64::MAX - (PAGE_BYTES - 1);
    let mut wrong = vec![(0, PAGE_BYTES), (region.size, PAGE_BYTES), (far, 0x2000)];
    for &(start, len) in &region.mappable {
        wrong.push((start, len + PAGE_BYTES));
        wrong.push((start + len, PAGE_BYTES));
        wrong.extend(start.checked_sub(PAGE_BYTES).map(|page| (page, PAGE_BYTES)));
    }
    wrong.retain(|(offset, len)| !is_mappable(*offset, *len));
    for (offset, len) in wrong {
        let refused = backend.map_region(index, offset, len).map(drop);
        assert!(
            matches!(refused, Err(BackendError::Absent(_))),
            "{index:?}: {len:#x} at {offset:#x}: {refused:?}"
        );
    }
    for &(start, _) in &region.mappable {
        for (offset, len) in [
            (start, 0),
            (start, PAGE_BYTES - 1),
            (start + 1, PAGE_BYTES - 1),
        ] {
            let refused = backend.map_region(index, offset, len);
            assert!(refused.is_err(), "{index:?}: {len:#x} at {offset:#x}");
        }
    }
}

/// What is mapped is what is read, at this place.
fn check_same(backend: &dyn VfioBackend, index: RegionIndex, offset: u64) {
    let page = offset / PAGE_BYTES * PAGE_BYTES;
    let mapping = backend.map_region(index, page, PAGE_BYTES);
    let mapping = mapping.expect("within an area");
    let mapped = mapping.read_u32(offset - page).expect("within the page");
    let read = read(backend, index, offset, 4);
    assert_eq!(
        mapped.to_le_bytes(),
        read[..],
        "{index:?} at {offset:#x}, mapped and read"
    );
}

/// Where the MSI-X table is: its BAR and the page in which it begins.
fn msix_table(backend: &dyn VfioBackend) -> Option<(u8, u64)> {
    let config = read(backend, RegionIndex::Config, 0, 64);
    if config[STATUS] & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = config[CAPABILITIES];
    for _ in 0..CAPABILITIES_MAX {
        if at < 64 {
            return None;
        }
        let head = read(backend, RegionIndex::Config, at.into(), 2);
        if head[0] == CAPABILITY_MSIX {
            let word = read(backend, RegionIndex::Config, u64::from(at) + 4, 4);
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let page = u64::from(word & !7) / PAGE_BYTES * PAGE_BYTES;
            return Some(((word & 7) as u8, page));
        }
        at = head[1];
    }
    None
}

/// What is written is what is read, in each width, and nothing beside it changes.
pub(super) fn check_memory(backend: &dyn VfioBackend, memory: Memory) {
    let Memory {
        region: index,
        offset,
        len,
        ..
    } = memory;
    let mut expected = read(backend, index, offset, len);
    let mut next = 0x11_u8;
    for width in [1, 2, 4, 8, len] {
        for at in (0..len).step_by(width).filter(|at| at + width <= len) {
            for byte in &mut expected[at..at + width] {
                next = next.wrapping_add(0x2b);
                *byte = next;
            }
            let part = &expected[at..at + width];
            let place = offset + at as u64;
            let written = backend.write(index, place, part);
            assert!(
                written.is_ok(),
                "{index:?}: {width} at {place:#x}: {written:?}"
            );
            assert_eq!(read(backend, index, place, width), part, "{place:#x}");
        }
        let singly = (offset..).take(len);
        let singly: Vec<u8> = singly
            .flat_map(|place| read(backend, index, place, 1))
            .collect();
        assert_eq!(singly, expected, "{index:?}: written by {width}");
    }
    let areas = region(backend, index).mappable;
    let is_mapped = |(start, bytes): &(u64, u64)| {
        *start <= offset && offset + len as u64 <= start + bytes && len >= 4
    };
    if areas.iter().any(is_mapped) {
        check_same(backend, index, offset);
    }
}

/// It is what the device promises, now that it was reset.
pub(super) fn check_memory_after_reset(backend: &dyn VfioBackend, memory: Memory) {
    let Memory {
        region,
        offset,
        len,
        after_reset,
    } = memory;
    if let Some(byte) = after_reset {
        let found = read(backend, region, offset, len);
        assert_eq!(found, vec![byte; len], "{region:?} after a reset");
    }
}
