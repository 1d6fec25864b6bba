//! What devices may reach by DMA.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use crate::backend::BackendError;

/// An address as a device sees it. Without a virtual IOMMU it equals the guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

/// Addresses that lead to a piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// First address.
    pub iova: Iova,
    /// Bytes, a multiple of the host's page size.
    pub len: u64,
    /// Host virtual address behind the first byte.
    pub host_address: u64,
}

/// What a device may do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaAccess {
    /// Read only: guest ROM.
    Read,
    /// Read and write: guest RAM.
    ReadWrite,
}

/// The file behind a range, for devices in other processes.
#[derive(Clone, Copy, Debug)]
pub struct DmaFile<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where in it the range's first byte is.
    pub offset: u64,
}

/// What devices may reach of guest memory. Devices of one VM may share one; each maps and unmaps
/// its own ranges, and a range is there as long as one of them has it mapped.
pub trait DmaSpace: Sync {
    /// Lets the device reach a range. `file` is what is behind it, if that is a file.
    ///
    /// # Errors
    /// [`BackendError`]; nothing is mapped then.
    fn map(
        &self,
        range: DmaRange,
        access: DmaAccess,
        file: Option<DmaFile<'_>>,
    ) -> Result<(), BackendError>;

    /// Ends that. The device can no longer reach the range when this returns.
    ///
    /// # Errors
    /// [`BackendError`].
    fn unmap(&self, range: DmaRange) -> Result<(), BackendError>;

    /// Whether a range may also be a part of a BAR that is mapped in this process, so that the VM's
    /// devices reach each other.
    fn maps_bars(&self) -> bool {
        false
    }
}

/// A range cannot be added or removed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// Empty, unaligned or past the end of the address space.
    #[error("{len:#x} bytes at iova {iova:#x} are not a range of whole pages")]
    Invalid {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// Part of it is mapped already.
    #[error("iova {iova:#x}+{len:#x} overlaps {other:#x}")]
    Overlap {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u64,
        /// First address of the range in the way.
        other: u64,
    },
    /// No such range was mapped.
    #[error("iova {0:#x} is not the start of a mapped range")]
    NotMapped(u64),
}

/// The host's page size, the granule of every mapping.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// What is mapped, so that ranges are removed exactly as they were added: type1 containers refuse
/// to unmap part of a mapping.
#[derive(Clone, Debug, Default)]
pub struct IovaMap {
    ranges: BTreeMap<Iova, DmaRange>,
}

impl IovaMap {
    /// Notes a new range.
    ///
    /// # Errors
    /// [`DmaError`] when it is no range or overlaps another.
    pub fn insert(&mut self, range: DmaRange) -> Result<(), DmaError> {
        let DmaRange {
            iova: Iova(iova),
            len,
            ..
        } = range;
        let aligned = iova.is_multiple_of(PAGE_BYTES) && len.is_multiple_of(PAGE_BYTES);
        let last = len.checked_sub(1).and_then(|len| iova.checked_add(len));
        let Some(last) = last.filter(|_| aligned) else {
            return Err(DmaError::Invalid { iova, len });
        };
        if let Some((Iova(other), below)) = self.ranges.range(..=Iova(last)).next_back()
            && other + (below.len - 1) >= iova
        {
            let other = *other;
            return Err(DmaError::Overlap { iova, len, other });
        }
        self.ranges.insert(range.iova, range);
        Ok(())
    }

    /// Forgets the range that begins at `iova` and returns it.
    ///
    /// # Errors
    /// [`DmaError::NotMapped`].
    pub fn remove(&mut self, iova: Iova) -> Result<DmaRange, DmaError> {
        self.ranges.remove(&iova).ok_or(DmaError::NotMapped(iova.0))
    }

    /// All ranges, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = &DmaRange> {
        self.ranges.values()
    }

    /// Bytes mapped, which is what a device pins.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.ranges.values().map(|range| range.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(iova: u64, len: u64) -> DmaRange {
        DmaRange {
            iova: Iova(iova),
            len,
            host_address: 0x7000_0000_0000_u64.wrapping_add(iova),
        }
    }

    #[test]
    fn ranges_are_removed_as_they_were_added() {
        let mut map = IovaMap::default();
        map.insert(range(0, 0x10_0000)).unwrap();
        map.insert(range(0x1_0000_0000, 0x2000)).unwrap();
        assert_eq!(map.mapped_bytes(), 0x10_2000);
        assert_eq!(map.remove(Iova(0x1000)), Err(DmaError::NotMapped(0x1000)));
        assert_eq!(map.remove(Iova(0)), Ok(range(0, 0x10_0000)));
        assert_eq!(map.ranges().count(), 1);
    }

    #[test]
    fn overlapping_and_impossible_ranges_are_refused() {
        let mut map = IovaMap::default();
        map.insert(range(0x4000, 0x4000)).unwrap();
        for (iova, len) in [
            (0x4000, 0x1000),
            (0x7000, 0x2000),
            (0, 0x5000),
            (0, 0x10_0000),
        ] {
            let overlap = map.insert(range(iova, len));
            assert!(
                matches!(overlap, Err(DmaError::Overlap { .. })),
                "{iova:#x}"
            );
        }
        for (iova, len) in [(0, 0), (1, 0x1000), (0, 0x1001), (u64::MAX - 0xfff, 0x2000)] {
            let invalid = map.insert(range(iova, len));
            assert!(
                matches!(invalid, Err(DmaError::Invalid { .. })),
                "{iova:#x}"
            );
        }
        map.insert(range(u64::MAX - 0xfff, 0x1000)).unwrap();
    }
}
