//! BARs within reach of the VM's other devices: what one writes to an address of another's BAR goes
//! there without passing through memory.

use devices::pci::{BarChange, BarLocation, HostMemory};

use super::bars::Mapped;
use crate::backend::VfioBackend;
use crate::dma::{DmaAccess, DmaRange, Iova};

/// What of a function's BARs is within reach at present.
#[derive(Default)]
pub(super) struct Shared {
    /// Whether it is wanted.
    pub(super) is_on: bool,
    /// By BAR.
    ranges: Vec<(u8, DmaRange)>,
}

impl Shared {
    /// Keeps up with where the guest places BARs.
    pub(super) fn follow(
        &mut self,
        changes: &[BarChange],
        mapped: &[Mapped],
        backend: &dyn VfioBackend,
    ) {
        if !self.is_on {
            return;
        }
        for change in changes {
            match change {
                BarChange::Map(location) => self.show(location, mapped, backend),
                BarChange::Unmap(location) => self.hide(Some(location.spec.index), backend),
            }
        }
    }

    fn show(&mut self, location: &BarLocation, mapped: &[Mapped], backend: &dyn VfioBackend) {
        let bar = location.spec.index;
        self.hide(Some(bar), backend);
        for part in mapped.iter().filter(|part| part.bar == bar) {
            let range = DmaRange {
                iova: Iova(location.address.wrapping_add(part.offset)),
                len: part.memory.bytes(),
                host_address: part.memory.address(),
            };
            match backend.dma().map(range, DmaAccess::ReadWrite, None) {
                Ok(()) => self.ranges.push((bar, range)),
                // Guests place BARs anywhere for a moment, also over memory.
                Err(error) => {
                    let address = range.iova.0;
                    log::debug!(bar, address, error:%; "a BAR is not within reach of other devices");
                }
            }
        }
    }

    /// Ends it for one BAR, or for all: before they are no longer mapped here.
    pub(super) fn hide(&mut self, bar: Option<u8>, backend: &dyn VfioBackend) {
        self.ranges.retain(|(of, range)| {
            let is_meant = bar.is_none_or(|bar| bar == *of);
            if is_meant && let Err(error) = backend.dma().unmap(*range) {
                log::warn!(bar = of, error:%; "a BAR stays within reach of other devices");
            }
            !is_meant
        });
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use devices::pci::{BarKind, BarSpec};
    use parking_lot::Mutex;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::backend::{BackendError, Irq, IrqKind, Region, RegionIndex};
    use crate::dma::{DmaFile, DmaSpace, IovaMap};
    use crate::kernel::RegionMapping;
    use crate::migration::VfioMigration;

    /// Addresses that devices can reach.
    #[derive(Default)]
    struct Space(Mutex<IovaMap>);

    impl DmaSpace for Space {
        fn map(
            &self,
            range: DmaRange,
            _: DmaAccess,
            _: Option<DmaFile<'_>>,
        ) -> Result<(), BackendError> {
            let inserted = self.0.lock().insert(range);
            inserted.map_err(|_| BackendError::Absent("room"))
        }

        fn unmap(&self, range: DmaRange) -> Result<(), BackendError> {
            let removed = self.0.lock().remove(range.iova);
            removed.map(drop).map_err(|_| BackendError::Absent("range"))
        }
    }

    /// Nothing but such addresses.
    #[derive(Default)]
    struct Backend(Space);

    const NOTHING: BackendError = BackendError::Absent("thing");

    impl VfioBackend for Backend {
        fn region(&self, _: RegionIndex) -> Result<Region, BackendError> {
            Err(NOTHING)
        }
        fn read(&self, _: RegionIndex, _: u64, _: &mut [u8]) -> Result<(), BackendError> {
            Err(NOTHING)
        }
        fn write(&self, _: RegionIndex, _: u64, _: &[u8]) -> Result<(), BackendError> {
            Err(NOTHING)
        }
        fn map_region(
            &self,
            _: RegionIndex,
            _: u64,
            _: u64,
        ) -> Result<RegionMapping, BackendError> {
            Err(NOTHING)
        }
        fn irq(&self, _: IrqKind) -> Result<Irq, BackendError> {
            Err(NOTHING)
        }
        fn set_irqs(&self, _: IrqKind, _: &[&EventFd]) -> Result<(), BackendError> {
            Err(NOTHING)
        }
        fn unmask_intx(&self) -> Result<(), BackendError> {
            Err(NOTHING)
        }
        fn dma(&self) -> &dyn DmaSpace {
            &self.0
        }
        fn reset(&self) -> Result<(), BackendError> {
            Err(NOTHING)
        }
        fn migration(&self) -> Option<&dyn VfioMigration> {
            None
        }
    }

    /// BAR 2 of four pages, of which the first and the last two are mapped.
    fn mapped() -> Vec<Mapped> {
        let file = File::open("/proc/self/exe").unwrap();
        let part = |offset, len| Mapped {
            bar: 2,
            offset,
            memory: Arc::new(
                RegionMapping::new(std::os::fd::AsFd::as_fd(&file), offset, len, false).unwrap(),
            ),
        };
        vec![part(0, 0x1000), part(0x2000, 0x2000)]
    }

    fn at(index: u8, address: u64) -> BarLocation {
        BarLocation {
            spec: BarSpec {
                index,
                kind: BarKind::Memory64,
                prefetchable: true,
                size_bytes: 0x4000,
            },
            address,
        }
    }

    fn reached(backend: &Backend) -> Vec<(u64, u64)> {
        let map = backend.0.0.lock();
        map.ranges()
            .map(|range| (range.iova.0, range.len))
            .collect()
    }

    #[test]
    fn what_is_mapped_is_within_reach_where_the_guest_has_placed_it() {
        let (backend, mapped) = (Backend::default(), mapped());
        let memory = DmaRange {
            iova: Iova(0),
            len: 0x10_0000,
            host_address: 0x7f00_0000_0000,
        };
        backend.0.map(memory, DmaAccess::ReadWrite, None).unwrap();
        let mut shared = Shared::default();
        let follow = |shared: &mut Shared, changes: &[BarChange]| {
            shared.follow(changes, &mapped, &backend);
            reached(&backend)[1..].to_vec()
        };
        let there = [BarChange::Map(at(2, 0x8000_0000))];
        assert_eq!(follow(&mut shared, &there), [], "nobody wants it");
        shared.is_on = true;
        let expected = [(0x8000_0000, 0x1000), (0x8000_2000, 0x2000)];
        assert_eq!(follow(&mut shared, &there), expected);
        let elsewhere = [
            BarChange::Unmap(at(2, 0x8000_0000)),
            BarChange::Map(at(0, 0x8000_0000)),
            BarChange::Map(at(2, 0x9000_0000)),
        ];
        let expected = [(0x9000_0000, 0x1000), (0x9000_2000, 0x2000)];
        assert_eq!(follow(&mut shared, &elsewhere), expected);
        let over_memory = follow(&mut shared, &[BarChange::Map(at(2, 0xf_e000))]);
        assert_eq!(over_memory, [(0x10_0000, 0x2000)]);
        follow(&mut shared, &there);
        shared.hide(None, &backend);
        assert_eq!(reached(&backend), [(0, 0x10_0000)]);
    }
}
