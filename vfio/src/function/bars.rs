//! The BARs of an assigned function: kinds, sizes, and what of them the guest reaches directly.

use std::ops::Range;
use std::sync::Arc;

use devices::pci::{BarKind, BarSpec};

use super::FunctionError;
use crate::backend::{RegionIndex, VfioBackend};
use crate::dma::PAGE_BYTES;
use crate::kernel::RegionMapping;

/// Type 0 headers have six BARs (PCI 3.0 section 6.2.5.1).
const BARS: u8 = 6;
const BAR0: usize = 0x10;

/// A part of a BAR that is mapped here.
pub(super) struct Mapped {
    pub(super) bar: u8,
    pub(super) offset: u64,
    pub(super) memory: Arc<RegionMapping>,
}

/// What BARs a device has, by its configuration space and its regions.
pub(super) fn survey(
    backend: &dyn VfioBackend,
    config: &[u8],
) -> Result<Vec<BarSpec>, FunctionError> {
    let mut bars: Vec<BarSpec> = Vec::new();
    let mut next = 0;
    for index in 0..BARS {
        if index < next {
            continue;
        }
        let size_bytes = backend.region(RegionIndex::Bar(index))?.size;
        let register = config.get(BAR0 + 4 * usize::from(index));
        let register = register.copied().unwrap_or(0);
        if size_bytes == 0 {
            continue;
        }
        let kind = match register & 0b111 {
            flags if flags & 1 != 0 => BarKind::Io,
            0b100 => BarKind::Memory64,
            _ => BarKind::Memory32,
        };
        let spec = BarSpec {
            index,
            kind,
            prefetchable: kind != BarKind::Io && register & 0b1000 != 0,
            size_bytes,
        };
        check(spec)?;
        next = index + if kind == BarKind::Memory64 { 2 } else { 1 };
        bars.push(spec);
    }
    Ok(bars)
}

fn check(spec: BarSpec) -> Result<(), FunctionError> {
    let least = if spec.kind == BarKind::Io { 4 } else { 16 };
    let most = match spec.kind {
        BarKind::Io => 256,
        BarKind::Memory32 => 1 << 31,
        BarKind::Memory64 => 1 << 51,
    };
    let fits = (least..=most).contains(&spec.size_bytes);
    let last = spec.kind == BarKind::Memory64 && spec.index == BARS - 1;
    if !fits || !spec.size_bytes.is_power_of_two() || last {
        return Err(FunctionError::Bar {
            bar: spec.index,
            size_bytes: spec.size_bytes,
        });
    }
    Ok(())
}

/// Maps what can be mapped, but for the pages of these parts: BARs and ranges.
pub(super) fn map(
    backend: &dyn VfioBackend,
    bars: &[BarSpec],
    trapped: &[&(u8, Range<u64>)],
) -> Result<Vec<Mapped>, FunctionError> {
    let mut mapped = Vec::new();
    for spec in bars {
        // A BAR below a page may lie anywhere in one.
        if spec.kind == BarKind::Io || spec.size_bytes < PAGE_BYTES {
            continue;
        }
        let index = RegionIndex::Bar(spec.index);
        let region = backend.region(index)?;
        // What a guest may not write KVM could not show it without ending it when it does.
        if !(region.readable && region.writable) {
            continue;
        }
        let holes = trapped.iter().filter(|(bar, _)| *bar == spec.index);
        let holes: Vec<_> = holes.map(|(_, range)| range).collect();
        for (offset, len) in region.mappable {
            let end = offset.saturating_add(len).min(spec.size_bytes);
            for part in outside(offset..end, &holes) {
                let memory = backend.map_region(index, part.start, part.end - part.start)?;
                mapped.push(Mapped {
                    bar: spec.index,
                    offset: part.start,
                    memory: Arc::new(memory),
                });
            }
        }
    }
    Ok(mapped)
}

/// Whole pages of `range` that have nothing in common with `holes`.
fn outside(range: Range<u64>, holes: &[&Range<u64>]) -> Vec<Range<u64>> {
    let start = range.start.next_multiple_of(PAGE_BYTES);
    let whole = start..range.end / PAGE_BYTES * PAGE_BYTES;
    let mut parts = Vec::from([whole]);
    for hole in holes {
        let first = hole.start / PAGE_BYTES * PAGE_BYTES;
        let last = hole.end.next_multiple_of(PAGE_BYTES);
        let split = |part: Range<u64>| {
            let (below, above) = (
                part.start..part.end.min(first),
                part.start.max(last)..part.end,
            );
            [below, above]
        };
        parts = parts.into_iter().flat_map(split).collect();
    }
    parts.retain(|part| part.start < part.end);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_without_the_table_are_mapped() {
        let cases = [
            (0..0x8000, None, vec![(0, 0x8000)]),
            (
                0..0x8000,
                Some(0x2010..0x3010),
                vec![(0, 0x2000), (0x4000, 0x8000)],
            ),
            (0..0x4000, Some(0..0x20), vec![(0x1000, 0x4000)]),
            (0..0x4000, Some(0x3ff0..0x4000), vec![(0, 0x3000)]),
            (0x10..0x2010, None, vec![(0x1000, 0x2000)]),
            (0x4000..0x5000, Some(0..0x10), vec![(0x4000, 0x5000)]),
            (0..0x1000, Some(0..0x10), vec![]),
            (0x10..0x20, None, vec![]),
        ];
        for (range, hole, expected) in cases {
            let holes: Vec<_> = hole.iter().collect();
            let parts = outside(range.clone(), &holes);
            let parts: Vec<_> = parts.iter().map(|part| (part.start, part.end)).collect();
            assert_eq!(parts, expected, "{range:x?} without {hole:x?}");
        }
        let table_and_pba = [&(0x1000..0x1010), &(0x3000..0x3008)];
        let parts = outside(0..0x6000, &table_and_pba);
        assert_eq!(parts, [0..0x1000, 0x2000..0x3000, 0x4000..0x6000]);
        assert_eq!(outside(0..0x2000, &[&(0..0x10), &(0x1ff0..0x2000)]), []);
    }
}
