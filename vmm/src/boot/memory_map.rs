//! The memory map that both boot protocols pass on, in e820 terms.

use crate::memory::{ECAM_BASE, ECAM_BYTES, Layout};

/// End of conventional memory; above lie firmware areas.
const CONVENTIONAL_END: u64 = 0xa_0000;
/// Start of extended memory.
const EXTENDED_START: u64 = 0x10_0000;

/// What a range is (ACPI 6.5 section 15, table 15.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    pub(super) base: u64,
    pub(super) len: u64,
    pub(super) kind: RangeKind,
}

pub(super) fn memory_map(layout: &Layout) -> Vec<MapEntry> {
    let range = |base, end, kind| MapEntry {
        base,
        len: end - base,
        kind,
    };
    let mut map = vec![
        range(0, CONVENTIONAL_END, RangeKind::Ram),
        range(CONVENTIONAL_END, EXTENDED_START, RangeKind::Reserved),
        range(EXTENDED_START, layout.low_ram_end(), RangeKind::Ram),
        range(ECAM_BASE, ECAM_BASE + ECAM_BYTES, RangeKind::Reserved),
    ];
    let high = layout.ram().iter().skip(1);
    map.extend(high.map(|ram| range(ram.base, ram.base + ram.len, RangeKind::Ram)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_is_sorted_and_counts_all_ram_but_the_firmware_area() {
        let layout = Layout::new(5 << 30, 4096, 40).unwrap();
        let map = memory_map(&layout);
        assert!(
            map.windows(2)
                .all(|pair| pair[0].base + pair[0].len <= pair[1].base)
        );
        let ram: u64 = map
            .iter()
            .filter(|entry| entry.kind == RangeKind::Ram)
            .map(|entry| entry.len)
            .sum();
        assert_eq!(ram, (5 << 30) - (EXTENDED_START - CONVENTIONAL_END));
    }
}
