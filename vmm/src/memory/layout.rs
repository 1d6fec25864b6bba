//! The guest-physical address map.
//!
//! ```text
//! 0                      RAM, up to 3 GiB
//! 0xc000_0000            32-bit BAR window
//! 0xe000_0000            ECAM, 256 buses
//! 0xfec0_0000            I/O APIC
//! 0xfee0_0000            local APICs
//! 0x1_0000_0000          the rest of RAM
//! next 1 GiB boundary    64-bit BAR window, up to the end of the physical address space
//! ```

use devices::pci::{BarWindows, Window};

const GIB: u64 = 1 << 30;

/// End of RAM below the hole.
const LOW_RAM_END: u64 = 3 * GIB;
/// Start of RAM above the hole.
const HIGH_RAM_START: u64 = 4 * GIB;
/// The 32-bit BAR window.
const MEMORY32: Window = Window {
    base: LOW_RAM_END,
    len: ECAM_BASE - LOW_RAM_END,
};
/// PCIe configuration space of 256 buses.
pub(crate) const ECAM_BASE: u64 = 0xe000_0000;
pub(crate) const ECAM_BYTES: u64 = 256 << 20;
/// I/O APIC registers.
pub(crate) const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Local APIC registers, KVM's.
pub(crate) const LOCAL_APIC_BASE: u64 = 0xfee0_0000;
/// Page table and three TSS pages that KVM keeps in the guest's address space on Intel hosts
/// without "unrestricted guest" (Documentation/virt/kvm/api.rst, 4.35 and 4.36).
pub(crate) const KVM_IDENTITY_MAP_BASE: u64 = 0xfffb_c000;
pub(crate) const KVM_TSS_BASE: usize = 0xfffb_d000;
/// I/O BAR window.
const IO: Window = Window {
    base: 0xc000,
    len: 0x1000,
};

/// Smallest guest: firmware tables, kernel and a little room.
const MIN_RAM: u64 = 16 << 20;

/// A contiguous piece of RAM and where it lies in the backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// Offset within the backing file.
    pub file_offset: u64,
}

/// The memory size cannot be laid out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Too small for any guest.
    #[error("memory of {0} bytes is too small, at least 16 MiB are needed")]
    TooSmall(u64),
    /// Not a multiple of the backing page size.
    #[error("memory of {bytes} bytes is not a multiple of the page size, {page_bytes} bytes")]
    Unaligned {
        /// The size asked for.
        bytes: u64,
        /// The backing page size.
        page_bytes: u64,
    },
    /// RAM and a BAR window do not fit into the CPU's physical address space.
    #[error("memory of {bytes} bytes does not fit into {address_bits} physical address bits")]
    TooLarge {
        /// The size asked for.
        bytes: u64,
        /// The CPU's physical address bits.
        address_bits: u8,
    },
}

/// Where RAM and windows lie, computed from the memory size alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    ram: Vec<RamRange>,
    memory64: Window,
}

impl Layout {
    /// Lays out `bytes` of RAM in pages of `page_bytes` under `address_bits` of physical address.
    ///
    /// # Errors
    /// [`LayoutError`] when the size is too small, unaligned or too large.
    pub fn new(bytes: u64, page_bytes: u64, address_bits: u8) -> Result<Self, LayoutError> {
        if bytes < MIN_RAM {
            return Err(LayoutError::TooSmall(bytes));
        }
        if !bytes.is_multiple_of(page_bytes) {
            return Err(LayoutError::Unaligned { bytes, page_bytes });
        }
        let too_large = LayoutError::TooLarge {
            bytes,
            address_bits,
        };
        let low = bytes.min(LOW_RAM_END);
        let mut ram = vec![RamRange {
            base: 0,
            len: low,
            file_offset: 0,
        }];
        let mut end = HIGH_RAM_START;
        if bytes > low {
            end = end.checked_add(bytes - low).ok_or(too_large)?;
            ram.push(RamRange {
                base: HIGH_RAM_START,
                len: bytes - low,
                file_offset: low,
            });
        }
        let limit = 1_u64
            .checked_shl(u32::from(address_bits))
            .unwrap_or(u64::MAX);
        let window = end.checked_next_multiple_of(GIB);
        let memory64 = window
            .filter(|base| *base < limit)
            .map(|base| Window {
                base,
                len: limit - base,
            })
            .ok_or(LayoutError::TooLarge {
                bytes,
                address_bits,
            })?;
        Ok(Self { ram, memory64 })
    }

    /// RAM, ascending.
    #[must_use]
    pub fn ram(&self) -> &[RamRange] {
        &self.ram
    }

    /// Windows for PCI BARs.
    #[must_use]
    pub fn bar_windows(&self) -> BarWindows {
        BarWindows {
            memory32: MEMORY32,
            memory64: self.memory64,
            io: IO,
        }
    }

    /// End of RAM below 4 GiB.
    #[must_use]
    pub fn low_ram_end(&self) -> u64 {
        self.ram.first().map_or(0, |range| range.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_guest_has_one_range_and_a_window_above_4_gib() {
        let layout = Layout::new(512 << 20, 4096, 40).unwrap();
        assert_eq!(layout.ram().len(), 1);
        assert_eq!(layout.low_ram_end(), 512 << 20);
        let window = layout.bar_windows().memory64;
        assert_eq!((window.base, window.base + window.len), (4 * GIB, 1 << 40));
    }

    #[test]
    fn memory_past_the_hole_continues_at_4_gib() {
        let layout = Layout::new(6 * GIB + 4096, 4096, 40).unwrap();
        let high = layout.ram()[1];
        assert_eq!(high.base, 4 * GIB);
        assert_eq!(high.len, 3 * GIB + 4096);
        assert_eq!(high.file_offset, 3 * GIB);
        assert_eq!(layout.bar_windows().memory64.base, 8 * GIB);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert_eq!(
            Layout::new(4096, 4096, 40),
            Err(LayoutError::TooSmall(4096))
        );
        let odd = Layout::new((64 << 20) + 1, 4096, 40);
        assert!(matches!(odd, Err(LayoutError::Unaligned { .. })));
        for bytes in [1 << 40, u64::MAX - 4095] {
            let large = Layout::new(bytes, 4096, 40);
            assert!(
                matches!(large, Err(LayoutError::TooLarge { .. })),
                "{bytes:#x}"
            );
        }
    }
}
