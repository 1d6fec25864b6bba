//! Where BARs may lie, and who lies where.

use std::collections::BTreeMap;

use super::bar::BarKind;

/// A range of guest addresses for BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
}

impl Window {
    pub(super) fn contains(&self, address: u64, len: u64) -> bool {
        let last = len.checked_sub(1).and_then(|l| address.checked_add(l));
        address >= self.base && last.is_some_and(|last| last - self.base < self.len)
    }
}

/// Where BARs may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarWindows {
    /// Below 4 GiB.
    pub memory32: Window,
    /// Above RAM.
    pub memory64: Window,
    /// Ports.
    pub io: Window,
}

/// Who has which addresses of the windows.
pub(super) struct Allocator {
    memory32: Taken,
    memory64: Taken,
    io: Taken,
}

/// The taken parts of a window: first address and bytes of each.
pub(super) struct Taken {
    window: Window,
    parts: BTreeMap<u64, u64>,
}

impl Taken {
    fn of(window: Window) -> Self {
        let parts = BTreeMap::new();
        Self { window, parts }
    }

    /// The lowest free multiple of `size`.
    pub(super) fn take(&mut self, size: u64) -> Option<u64> {
        let mut address = self.window.base.checked_next_multiple_of(size)?;
        for (base, len) in &self.parts {
            if address.checked_add(size)? <= *base {
                break;
            }
            if address < base + len {
                address = (base + len).checked_next_multiple_of(size)?;
            }
        }
        if !self.window.contains(address, size) {
            return None;
        }
        self.parts.insert(address, size);
        Some(address)
    }
}

impl Allocator {
    pub(super) fn new(windows: BarWindows) -> Self {
        Self {
            memory32: Taken::of(windows.memory32),
            memory64: Taken::of(windows.memory64),
            io: Taken::of(windows.io),
        }
    }

    pub(super) fn of(&mut self, kind: BarKind) -> &mut Taken {
        match kind {
            BarKind::Memory32 => &mut self.memory32,
            BarKind::Memory64 => &mut self.memory64,
            BarKind::Io => &mut self.io,
        }
    }

    pub(super) fn give_back(&mut self, placed: &[(BarKind, u64)]) {
        for (kind, address) in placed {
            self.of(*kind).parts.remove(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_free_address_is_taken_and_given_back() {
        let window = Window {
            base: 0x1800,
            len: 0x4000,
        };
        let mut taken = Taken::of(window);
        assert_eq!(taken.take(0x1000), Some(0x2000));
        assert_eq!(taken.take(0x800), Some(0x1800), "what alignment had left");
        assert_eq!(taken.take(0x2000), None, "0x4000 would end behind it");
        assert_eq!(taken.take(0x1000), Some(0x3000));
        taken.parts.remove(&0x2000);
        assert_eq!(taken.take(0x800), Some(0x2000));
        assert_eq!(taken.take(0x1000), Some(0x4000));
        assert_eq!(taken.take(0x800), Some(0x2800));
        assert_eq!(taken.take(0x800), Some(0x5000));
        assert_eq!(taken.take(0x800), None);
        assert_eq!(taken.take(1 << 63), None);
    }
}
