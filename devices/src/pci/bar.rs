//! Base address registers (PCI 3.0 section 6.2.5.1).

/// What a BAR decodes, apart from whether memory is prefetchable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// 32-bit memory.
    Memory32,
    /// 64-bit memory; takes two registers.
    Memory64,
    /// Port I/O.
    Io,
}

/// Index, kind and size of a function's BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// First register, 0 to 5.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Memory without side effects of reads.
    pub prefetchable: bool,
    /// Size in bytes, a power of two of at least 16 (memory) or 4 (I/O).
    pub size_bytes: u64,
}

/// Where a BAR is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarLocation {
    /// Which BAR.
    pub spec: BarSpec,
    /// Its first address, memory or port.
    pub address: u64,
}

/// A configuration write made a BAR appear or disappear. A moved BAR is an `Unmap`, then a `Map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarChange {
    /// The BAR is decoded from now on.
    Map(BarLocation),
    /// The BAR is no longer decoded there.
    Unmap(BarLocation),
}

/// Low bits that say what a BAR is.
const MEMORY_64: u32 = 0b0100;
const PREFETCHABLE: u32 = 0b1000;
const IO_SPACE: u32 = 0b0001;

/// A BAR's registers and what the guest has written to them.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub(super) spec: BarSpec,
    /// The address as programmed: low register in bits 31:0, high in 63:32.
    pub(super) address: u64,
}

impl Bar {
    pub(super) fn new(spec: BarSpec) -> Self {
        Self { spec, address: 0 }
    }

    /// Whether register `index` belongs to this BAR, and if so whether it is the high half.
    pub(super) fn half(&self, index: u8) -> Option<bool> {
        match index.checked_sub(self.spec.index)? {
            0 => Some(false),
            1 if self.spec.kind == BarKind::Memory64 => Some(true),
            _ => None,
        }
    }

    pub(super) fn read(&self, high: bool) -> u32 {
        if high {
            return (self.address >> 32) as u32;
        }
        let flags = match self.spec.kind {
            BarKind::Memory32 => 0,
            BarKind::Memory64 => MEMORY_64,
            BarKind::Io => IO_SPACE,
        };
        let flags = flags
            | if self.spec.prefetchable {
                PREFETCHABLE
            } else {
                0
            };
        (self.address & 0xffff_ffff) as u32 | flags
    }

    /// Address bits below the size read as zero: that is how a driver learns the size.
    pub(super) fn write(&mut self, high: bool, value: u32) {
        let (keep, new) = if high {
            (0xffff_ffff, u64::from(value) << 32)
        } else {
            (!0xffff_ffff, u64::from(value))
        };
        self.set_address(self.address & keep | new);
    }

    pub(super) fn set_address(&mut self, address: u64) {
        let width = match self.spec.kind {
            BarKind::Memory32 => 0xffff_ffff,
            BarKind::Memory64 => u64::MAX,
            BarKind::Io => 0xffff,
        };
        self.address = address & width & !(self.spec.size_bytes - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_all_ones_reveals_the_size() {
        let mut bar = Bar::new(BarSpec {
            index: 0,
            kind: BarKind::Memory64,
            prefetchable: true,
            size_bytes: 0x1_0000,
        });
        bar.write(false, 0xffff_ffff);
        bar.write(true, 0xffff_ffff);
        assert_eq!(bar.read(false), 0xffff_000c);
        assert_eq!(bar.read(true), 0xffff_ffff);
        let mut io = Bar::new(BarSpec {
            index: 2,
            kind: BarKind::Io,
            prefetchable: false,
            size_bytes: 8,
        });
        io.write(false, 0xffff_ffff);
        assert_eq!(io.read(false), 0x0000_fff9);
    }

    #[test]
    fn halves_are_found_by_register_index() {
        let bar = Bar::new(BarSpec {
            index: 2,
            kind: BarKind::Memory64,
            prefetchable: true,
            size_bytes: 0x1000,
        });
        assert_eq!(
            [1, 2, 3, 4].map(|i| bar.half(i)),
            [None, Some(false), Some(true), None]
        );
    }
}
