//! Address space for PCI BARs that the firmware left unassigned.

use crate::memmap::Region;

/// Hands out naturally aligned pieces of a window, upward.
#[derive(Clone, Copy, Debug)]
pub struct BarWindow {
    next: u64,
    end: u64,
}

impl BarWindow {
    /// A window over `region`.
    #[must_use]
    pub fn new(region: Region) -> Self {
        Self {
            next: region.base,
            end: region.end(),
        }
    }

    /// An address for a BAR of `size` bytes (a power of two); `None` if the window has no room.
    pub fn take(&mut self, size: u64) -> Option<u64> {
        let base = self.next.checked_next_multiple_of(size.max(1))?;
        let end = base.checked_add(size)?;
        (end <= self.end).then(|| {
            self.next = end;
            base
        })
    }

    /// Keeps the window clear of an address range that is in use: later pieces lie behind it.
    pub fn avoid(&mut self, used: Region) {
        if used.base < self.end && used.end() > self.next {
            self.next = used.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_disjoint_and_inside() {
        let mut window = BarWindow::new(Region {
            base: 0xc000_1000,
            len: 0x1_0000,
        });
        assert_eq!(window.take(0x1000), Some(0xc000_1000));
        assert_eq!(window.take(0x4000), Some(0xc000_4000));
        assert_eq!(window.take(0x1000), Some(0xc000_8000));
        assert_eq!(window.take(0x1_0000), None);
        assert_eq!(window.take(0x8000), None);
        assert_eq!(window.take(0x4000), Some(0xc000_c000));
    }

    #[test]
    fn used_ranges_are_stepped_over_and_foreign_ones_ignored() {
        let mut window = BarWindow::new(Region {
            base: 0x1000,
            len: 0xf000,
        });
        window.avoid(Region {
            base: 0x2_0000,
            len: 0x1000,
        });
        window.avoid(Region {
            base: 0,
            len: 0x1000,
        });
        assert_eq!(window.take(0x1000), Some(0x1000));
        window.avoid(Region {
            base: 0x3000,
            len: 0x1000,
        });
        assert_eq!(window.take(0x1000), Some(0x4000));
    }
}
