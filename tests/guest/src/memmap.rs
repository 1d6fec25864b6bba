//! Free memory, from the boot memory map.

/// Regions kept at most.
pub const MAX_REGIONS: usize = 32;

/// A stretch of guest-physical memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub base: u64,
    /// Bytes.
    pub len: u64,
}

impl Region {
    /// The first byte behind the region.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.len)
    }

    /// The part inside `base..end`, shrunk to whole multiples of `align`; `None` if nothing is left.
    #[must_use]
    pub fn clip(&self, base: u64, end: u64, align: u64) -> Option<Self> {
        let first = self.base.max(base).checked_next_multiple_of(align)?;
        let last = self.end().min(end) / align * align;
        (first < last).then(|| Self {
            base: first,
            len: last - first,
        })
    }
}

/// A short list of regions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Regions {
    list: [Region; MAX_REGIONS],
    len: usize,
}

impl Regions {
    /// Adds a region; `false` if the list is full.
    pub fn push(&mut self, region: Region) -> bool {
        match self.list.get_mut(self.len) {
            Some(slot) => {
                *slot = region;
                self.len += 1;
                true
            }
            None => false,
        }
    }

    /// The regions, in the order they were added.
    #[must_use]
    pub fn as_slice(&self) -> &[Region] {
        &self.list[..self.len]
    }

    /// Bytes in all regions.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.as_slice().iter().map(|region| region.len).sum()
    }

    /// The parts of all regions inside `base..end`, in whole multiples of `align`.
    #[must_use]
    pub fn clip(&self, base: u64, end: u64, align: u64) -> Self {
        let mut clipped = Self::default();
        for part in self
            .as_slice()
            .iter()
            .filter_map(|region| region.clip(base, end, align))
        {
            // A clipped list is never longer than the list.
            clipped.push(part);
        }
        clipped
    }

    /// The region that holds `address`.
    #[must_use]
    pub fn containing(&self, address: u64) -> Option<Region> {
        self.as_slice()
            .iter()
            .copied()
            .find(|region| region.base <= address && address < region.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_regions() -> Regions {
        let mut regions = Regions::default();
        assert!(regions.push(Region {
            base: 0,
            len: 0x9_fc00
        }));
        assert!(regions.push(Region {
            base: 0x10_0000,
            len: 0x3ff0_0000
        }));
        regions
    }

    #[test]
    fn clipping_keeps_whole_pages_inside_the_bounds() {
        let clipped = two_regions().clip(0x1234, 0x20_0000, 4096);
        assert_eq!(
            clipped.as_slice(),
            [
                Region {
                    base: 0x2000,
                    len: 0x9_d000
                },
                Region {
                    base: 0x10_0000,
                    len: 0x10_0000
                }
            ]
        );
        assert_eq!(clipped.total(), 0x19_d000);
    }

    #[test]
    fn nothing_is_left_of_a_region_outside_or_below_one_unit() {
        assert_eq!(
            Region {
                base: 0x1800,
                len: 0x1000
            }
            .clip(0, u64::MAX, 4096),
            None
        );
        assert_eq!(
            Region {
                base: 0x1000,
                len: 0x1000
            }
            .clip(0x2000, u64::MAX, 4096),
            None
        );
        assert_eq!(
            Region {
                base: u64::MAX - 10,
                len: 10
            }
            .clip(0, u64::MAX, 4096),
            None
        );
    }

    #[test]
    fn region_is_found_by_address() {
        let regions = two_regions();
        assert_eq!(regions.containing(0x10_0000), Some(regions.as_slice()[1]));
        assert_eq!(regions.containing(0x9_fc00), None);
    }

    #[test]
    fn full_list_refuses() {
        let mut regions = Regions::default();
        for base in 0..MAX_REGIONS as u64 {
            assert!(regions.push(Region { base, len: 1 }));
        }
        assert!(!regions.push(Region::default()));
    }
}
