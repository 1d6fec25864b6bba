//! The address space that all functions of a VM share.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::memory_lock;
use super::translation::Translation;
use crate::backend::BackendError;
use crate::dma::{DmaAccess, DmaError, DmaFile, DmaRange, DmaSpace, Iova, IovaMap};

/// A VM's address space with how many of its functions have each range mapped.
pub(super) struct SharedSpace<T> {
    pub(super) translation: T,
    ranges: Mutex<Ranges>,
}

#[derive(Default)]
struct Ranges {
    map: IovaMap,
    users: BTreeMap<Iova, Users>,
}

struct Users {
    range: DmaRange,
    access: DmaAccess,
    count: usize,
}

impl<T: Translation> SharedSpace<T> {
    pub(super) fn new(translation: T) -> Self {
        let ranges = Mutex::default();
        Self {
            translation,
            ranges,
        }
    }

    fn map(&self, range: DmaRange, access: DmaAccess) -> io::Result<()> {
        let mut ranges = self.ranges.lock();
        if let Some(users) = ranges.users.get_mut(&range.iova)
            && (users.range, users.access) == (range, access)
        {
            users.count += 1;
            return Ok(());
        }
        ranges.map.insert(range).map_err(io::Error::other)?;
        if let Err(error) = self.translation.map(range, access) {
            let _ = ranges.map.remove(range.iova);
            return Err(error);
        }
        let users = Users {
            range,
            access,
            count: 1,
        };
        ranges.users.insert(range.iova, users);
        Ok(())
    }

    fn unmap(&self, range: DmaRange) -> io::Result<()> {
        let mut ranges = self.ranges.lock();
        let Some(users) = ranges.users.get_mut(&range.iova) else {
            return Err(io::Error::other(DmaError::NotMapped(range.iova.0)));
        };
        if users.count > 1 {
            users.count -= 1;
            return Ok(());
        }
        self.translation.unmap(range)?;
        ranges.users.remove(&range.iova);
        ranges.map.remove(range.iova).map_err(io::Error::other)?;
        Ok(())
    }
}

/// What one function has mapped of the shared address space. Dropping it unmaps that.
pub(super) struct FunctionDma<T: Translation> {
    shared: Arc<SharedSpace<T>>,
    own: Mutex<IovaMap>,
}

impl<T: Translation> FunctionDma<T> {
    pub(super) fn new(shared: Arc<SharedSpace<T>>) -> Self {
        let own = Mutex::default();
        Self { shared, own }
    }

    /// Unmaps everything that this function has mapped.
    pub(super) fn clear(&self) {
        for range in std::mem::take(&mut *self.own.lock()).ranges() {
            if let Err(error) = self.shared.unmap(*range) {
                let (iova, len) = (range.iova.0, range.len);
                log::warn!(iova, len, error:%; "a range stays within reach of a VM's devices");
            }
        }
    }
}

impl<T: Translation> DmaSpace for FunctionDma<T> {
    fn map(
        &self,
        range: DmaRange,
        access: DmaAccess,
        _file: Option<DmaFile<'_>>,
    ) -> Result<(), BackendError> {
        let refused = |source| BackendError::Refused {
            what: "map DMA",
            source,
        };
        let mut own = self.own.lock();
        own.insert(range)
            .map_err(|error| refused(io::Error::other(error)))?;
        let mapped = self.shared.map(range, access);
        mapped.map_err(|error| {
            let _ = own.remove(range.iova);
            refused(memory_lock::explained(error, range.len))
        })
    }

    fn unmap(&self, range: DmaRange) -> Result<(), BackendError> {
        let refused = |source| BackendError::Refused {
            what: "unmap DMA",
            source,
        };
        let other = |error: DmaError| refused(io::Error::other(error));
        let mut own = self.own.lock();
        let removed = own.remove(range.iova).map_err(other)?;
        let unmapped = match removed == range {
            true => self.shared.unmap(range),
            false => Err(io::Error::other(DmaError::NotMapped(range.iova.0))),
        };
        unmapped.or_else(|error| {
            own.insert(removed).map_err(other)?;
            Err(refused(error))
        })
    }

    fn maps_bars(&self) -> bool {
        self.shared.translation.maps_bars()
    }
}

impl<T: Translation> Drop for FunctionDma<T> {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 0x1000;

    /// What an IOMMU would know.
    #[derive(Default)]
    struct Table {
        ranges: Mutex<BTreeMap<Iova, (DmaRange, DmaAccess)>>,
        is_full: bool,
    }

    impl Translation for Table {
        fn map(&self, range: DmaRange, access: DmaAccess) -> io::Result<()> {
            if self.is_full {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let other = self.ranges.lock().insert(range.iova, (range, access));
            assert!(other.is_none(), "mapped twice");
            Ok(())
        }

        fn unmap(&self, range: DmaRange) -> io::Result<()> {
            let removed = self.ranges.lock().remove(&range.iova);
            let (removed, _) = removed.expect("it was mapped");
            assert_eq!(removed, range, "a type 1 IOMMU unmaps what was mapped");
            Ok(())
        }

        fn maps_bars(&self) -> bool {
            true
        }
    }

    fn range(iova: u64, pages: u64) -> DmaRange {
        DmaRange {
            iova: Iova(iova),
            len: pages * PAGE,
            host_address: 0x7f00_0000_0000 + iova,
        }
    }

    fn count(shared: &SharedSpace<Table>) -> usize {
        shared.translation.ranges.lock().len()
    }

    #[test]
    fn range_is_there_as_long_as_one_function_has_it() {
        let shared = Arc::new(SharedSpace::new(Table::default()));
        let [one, two] = [(); 2].map(|()| FunctionDma::new(Arc::clone(&shared)));
        let ram = range(0, 16);
        let map = |function: &FunctionDma<Table>| function.map(ram, DmaAccess::ReadWrite, None);
        map(&one).unwrap();
        map(&two).unwrap();
        assert_eq!(count(&shared), 1);
        assert!(map(&one).is_err(), "mapped twice by one function");
        one.unmap(ram).unwrap();
        assert!(one.unmap(ram).is_err(), "unmapped twice by one function");
        assert_eq!(count(&shared), 1, "the other one still has it");
        map(&one).unwrap();
        drop(two);
        assert_eq!(count(&shared), 1);
        drop(one);
        assert_eq!(count(&shared), 0);
    }

    #[test]
    fn functions_agree_on_what_is_behind_an_address() {
        let shared = Arc::new(SharedSpace::new(Table::default()));
        let [one, two] = [(); 2].map(|()| FunctionDma::new(Arc::clone(&shared)));
        one.map(range(0x10_0000, 4), DmaAccess::ReadWrite, None)
            .unwrap();
        let elsewhere = DmaRange {
            host_address: PAGE,
            ..range(0x10_0000, 4)
        };
        for (other, access) in [
            (elsewhere, DmaAccess::ReadWrite),
            (range(0x10_0000, 4), DmaAccess::Read),
            (range(0x10_0000, 2), DmaAccess::ReadWrite),
            (range(0x10_1000, 1), DmaAccess::ReadWrite),
            (range(0xf_f000, 2), DmaAccess::ReadWrite),
        ] {
            assert!(two.map(other, access, None).is_err(), "{other:?}");
        }
        assert!(two.unmap(range(0x10_0000, 4)).is_err(), "not its own");
        assert!(one.unmap(range(0x10_0000, 2)).is_err(), "a part");
        one.unmap(range(0x10_0000, 4)).unwrap();
        two.map(elsewhere, DmaAccess::Read, None).unwrap();
        assert_eq!(count(&shared), 1);
    }

    #[test]
    fn nothing_is_mapped_when_the_kernel_refuses() {
        let table = Table {
            is_full: true,
            ..Table::default()
        };
        let shared = Arc::new(SharedSpace::new(table));
        let function = FunctionDma::new(Arc::clone(&shared));
        for _ in 0..2 {
            let refused = function.map(range(0, 1), DmaAccess::Read, None);
            let Err(BackendError::Refused { source, .. }) = refused else {
                unreachable!("{refused:?}");
            };
            // Not because of what was tried before.
            assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        }
        assert!(function.unmap(range(0, 1)).is_err());
    }
}
