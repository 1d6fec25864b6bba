//! What the device may reach of memory.

use std::fs::File;
use std::os::fd::AsFd;

use devices::pci::HostMemory;

use crate::backend::{BackendError, VfioBackend};
use crate::dma::{DmaAccess, DmaFile, DmaRange, Iova};
use crate::kernel::RegionMapping;
use crate::testing::shared_page;

const BASE: u64 = 0x10_0000;

/// A page that is mapped.
pub(super) struct Mapped<'a> {
    backend: &'a dyn VfioBackend,
    file: File,
    page: RegionMapping,
}

impl Mapped<'_> {
    fn range(&self, iova: u64) -> DmaRange {
        DmaRange {
            iova: Iova(iova),
            len: self.page.bytes(),
            host_address: self.page.address(),
        }
    }

    fn map(&self, iova: u64) -> Result<(), BackendError> {
        let file = DmaFile {
            file: self.file.as_fd(),
            offset: 0,
        };
        let dma = self.backend.dma();
        dma.map(self.range(iova), DmaAccess::ReadWrite, Some(file))
    }

    /// It is mapped, once, and is unmapped once, as it was mapped.
    pub(super) fn check_and_unmap(self) {
        let dma = self.backend.dma();
        assert!(self.map(BASE).is_err(), "mapped twice");
        let longer = DmaRange {
            len: 2 * self.page.bytes(),
            ..self.range(BASE)
        };
        let other = self.range(BASE + self.page.bytes());
        for wrong in [longer, other] {
            assert!(dma.unmap(wrong).is_err(), "{wrong:x?} was not mapped");
        }
        assert!(self.map(BASE).is_err(), "a refusal has unmapped it");
        dma.unmap(self.range(BASE)).expect("it is mapped");
        assert!(dma.unmap(self.range(BASE)).is_err(), "unmapped twice");
    }
}

pub(super) fn map_one(backend: &dyn VfioBackend) -> Mapped<'_> {
    let (file, page) = shared_page().expect("room for a page");
    let mapped = Mapped {
        backend,
        file,
        page,
    };
    mapped.map(BASE).expect("a free range");
    mapped
}

pub(super) fn check(backend: &dyn VfioBackend) {
    // What was unmapped is free again.
    for _ in 0..2 {
        map_one(backend).check_and_unmap();
    }
    // Two apart from each other.
    let first = map_one(backend);
    first.map(BASE + first.page.bytes()).expect("a free range");
    let second = first.range(BASE + first.page.bytes());
    backend.dma().unmap(second).expect("mapped above");
    first.check_and_unmap();
}
