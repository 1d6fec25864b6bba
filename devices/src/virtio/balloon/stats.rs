//! What the guest says about its memory (section 5.5.6.3).

use std::time::{Duration, Instant};

use serde::Serialize;

/// Size of `struct virtio_balloon_stat`: a 16-bit tag and a 64-bit value, packed.
const STAT_BYTES: usize = 10;
/// More than the tags there are; a buffer beyond that is not read.
pub(super) const MAX_STATS_BYTES: usize = 64 * STAT_BYTES;

/// Statistics of a guest's memory. A guest gives those that it has, and nobody checks them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BalloonStats {
    /// Bytes swapped in.
    pub swap_in_bytes: Option<u64>,
    /// Bytes swapped out.
    pub swap_out_bytes: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Memory used for nothing at all.
    pub free_bytes: Option<u64>,
    /// All memory that the guest has.
    pub total_bytes: Option<u64>,
    /// Estimate of what new programs could use without swapping.
    pub available_bytes: Option<u64>,
    /// Memory that caches files and could be reclaimed.
    pub disk_cache_bytes: Option<u64>,
    /// Huge pages allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    pub hugetlb_failures: Option<u64>,
    /// Processes killed for lack of memory.
    pub oom_kills: Option<u64>,
    /// Allocations that had to wait.
    pub allocation_stalls: Option<u64>,
    /// Pages scanned in the background.
    pub background_scans: Option<u64>,
    /// Pages scanned by allocations that waited.
    pub direct_scans: Option<u64>,
    /// Pages reclaimed in the background.
    pub background_reclaims: Option<u64>,
    /// Pages reclaimed by allocations that waited.
    pub direct_reclaims: Option<u64>,
}

impl BalloonStats {
    /// Reads an array of `struct virtio_balloon_stat`. Unknown tags are skipped, and so is an
    /// incomplete last entry.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        let (entries, _) = bytes.as_chunks::<STAT_BYTES>();
        for [tag_low, tag_high, value @ ..] in entries {
            let tag = u16::from_le_bytes([*tag_low, *tag_high]);
            if let Some(field) = stats.field(tag) {
                *field = Some(u64::from_le_bytes(*value));
            }
        }
        stats
    }

    /// The field of a tag, `VIRTIO_BALLOON_S_SWAP_IN` and so on.
    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in_bytes,
            1 => &mut self.swap_out_bytes,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_bytes,
            5 => &mut self.total_bytes,
            6 => &mut self.available_bytes,
            7 => &mut self.disk_cache_bytes,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            10 => &mut self.oom_kills,
            11 => &mut self.allocation_stalls,
            12 => &mut self.background_scans,
            13 => &mut self.direct_scans,
            14 => &mut self.background_reclaims,
            15 => &mut self.direct_reclaims,
            _ => return None,
        })
    }
}

/// Statistics and when the guest gave them.
#[derive(Clone, Debug)]
pub struct StatsSample {
    /// What the guest said.
    pub stats: BalloonStats,
    pub(super) taken_at: Instant,
}

impl StatsSample {
    /// Time since the guest gave them.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.taken_at.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn known_tags_are_taken_in_any_order_and_others_skipped() {
        let bytes = [entry(15, 3), entry(99, 1), entry(4, 1 << 40), entry(0, 7)].concat();
        let expected = BalloonStats {
            direct_reclaims: Some(3),
            free_bytes: Some(1 << 40),
            swap_in_bytes: Some(7),
            ..BalloonStats::default()
        };
        assert_eq!(BalloonStats::parse(&bytes), expected);
    }

    #[test]
    fn each_known_tag_has_a_field_of_its_own() {
        let bytes: Vec<u8> = (0..16).flat_map(|tag| entry(tag, tag.into())).collect();
        let text = format!("{:?}", BalloonStats::parse(&bytes));
        for value in 0..16 {
            assert!(text.contains(&format!("Some({value})")), "{value}: {text}");
        }
    }

    #[test]
    fn incomplete_entries_are_skipped() {
        let bytes = [entry(2, 5), entry(3, 6)].concat();
        for len in 0..bytes.len() {
            let stats = BalloonStats::parse(&bytes[..len]);
            assert_eq!(stats.major_faults.is_some(), len >= 10, "{len}");
            assert_eq!(stats.minor_faults, None, "{len}");
        }
    }
}
