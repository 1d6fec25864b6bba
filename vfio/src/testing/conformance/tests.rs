//! The suite finds what is wrong: backends that break one promise each.

use std::panic::{AssertUnwindSafe, catch_unwind};

use vmm_sys_util::eventfd::EventFd;

use super::{Memory, Subject};
use crate::backend::{BackendError, Irq, IrqKind, Region, RegionIndex, VfioBackend};
use crate::dma::{DmaAccess, DmaFile, DmaRange, DmaSpace, Iova};
use crate::kernel::RegionMapping;
use crate::migration::VfioMigration;
use crate::testing::ModelBackend;

/// What a backend does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Nothing,
    // Regions.
    ConfigDependsOnWidth,
    LastByteIsAnother,
    OutsideIsRead,
    OutsideIsWritten,
    OutsideIsToldWrongly,
    AbsentRegionIsReadable,
    RegionsChange,
    WriteIsLost,
    WideWriteIsTorn,
    WriteSpills,
    AreaIsNoPages,
    AreaIsNotMapped,
    TooMuchIsMapped,
    LessIsMapped,
    AnotherPageIsMapped,
    // Interrupts.
    TooManyVectorsExist,
    TooManyAreAccepted,
    TooManyLeaveItOn,
    FirstVectorOnly,
    VectorsAreSwapped,
    OldListStays,
    OffIsOn,
    OffTwiceIsRefused,
    UnmaskIsLost,
    ResetLeavesThemOn,
    ResetEndsNotices,
    // The rest.
    ResetKeepsMemory,
    ResetIsRefused,
    ResetTakesMemoryAway,
    MapsTwice,
    UnmapsTwice,
    UnmapsAnything,
}

/// Each of them, and what the suite says of it.
const ALL: [(Fault, &str); 32] = [
    (Fault::ConfigDependsOnWidth, "2 at 0x0"),
    (Fault::LastByteIsAnother, "the last byte"),
    (Fault::OutsideIsRead, "2 at 0xfff: Ok"),
    (Fault::OutsideIsWritten, "2 at 0xfff: Ok"),
    (Fault::OutsideIsToldWrongly, "size: 4097"),
    (Fault::AbsentRegionIsReadable, "is absent"),
    (Fault::RegionsChange, "has changed"),
    (Fault::WriteIsLost, "0x40"),
    (Fault::WideWriteIsTorn, "0x40"),
    (Fault::WriteSpills, "written by 2"),
    (Fault::AreaIsNoPages, "mappable: [(1000, 1fff)]"),
    (Fault::AreaIsNotMapped, "0x2000 at 0x1000: Err"),
    (Fault::TooMuchIsMapped, "0x1000 at 0x0: Ok"),
    (Fault::LessIsMapped, "0x2000 at 0x1000: Ok"),
    (Fault::AnotherPageIsMapped, "mapped and read"),
    (Fault::TooManyVectorsExist, "count: 33"),
    (Fault::TooManyAreAccepted, "more than the 1 that there are"),
    (Fault::TooManyLeaveItOn, "is heard elsewhere"),
    (Fault::FirstVectorOnly, "vector 3 is heard"),
    (Fault::VectorsAreSwapped, "vector 3 is heard"),
    (Fault::OldListStays, "vector 0 is heard"),
    (Fault::OffIsOn, "is heard elsewhere"),
    (Fault::OffTwiceIsRefused, "0 vectors: Err"),
    (Fault::UnmaskIsLost, "raised meanwhile is heard"),
    (Fault::ResetLeavesThemOn, "is heard elsewhere"),
    (Fault::ResetEndsNotices, "Request: vector 0 is heard"),
    (Fault::ResetKeepsMemory, "after a reset"),
    (Fault::ResetIsRefused, "a reset: Absent"),
    (Fault::ResetTakesMemoryAway, "mapped twice"),
    (Fault::MapsTwice, "mapped twice"),
    (Fault::UnmapsTwice, "unmapped twice"),
    (Fault::UnmapsAnything, "was not mapped"),
];

const BAR0: RegionIndex = RegionIndex::Bar(0);
const BAR2: RegionIndex = RegionIndex::Bar(2);
const PAGE: u64 = 0x1000;
/// The suite's own.
const MAPPED: u64 = 0x10_0000;

struct Broken {
    model: ModelBackend,
    fault: Fault,
    asked: parking_lot::Mutex<u64>,
}

impl Broken {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }
}

impl VfioBackend for Broken {
    fn region(&self, index: RegionIndex) -> Result<Region, BackendError> {
        let mut region = self.model.region(index)?;
        region.readable |= self.is(Fault::AbsentRegionIsReadable);
        let mut asked = self.asked.lock();
        *asked += 1;
        if self.is(Fault::RegionsChange) && index == BAR0 {
            region.size += *asked;
        }
        if self.is(Fault::AreaIsNoPages) {
            region.mappable.iter_mut().for_each(|area| area.1 -= 1);
        }
        Ok(region)
    }

    fn read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        let is_config = index == RegionIndex::Config;
        if let Err(error) = self.model.read(index, offset, data) {
            return match (self.is(Fault::OutsideIsRead), error) {
                (true, _) => Ok(()),
                (
                    false,
                    BackendError::OutsideRegion {
                        region,
                        offset,
                        len,
                        size,
                    },
                ) => Err(BackendError::OutsideRegion {
                    region,
                    offset,
                    len,
                    size: size + u64::from(self.is(Fault::OutsideIsToldWrongly)),
                }),
                (false, error) => Err(error),
            };
        }
        let is_skewed = self.is(Fault::ConfigDependsOnWidth) && data.len() == 2;
        let is_last = self.is(Fault::LastByteIsAnother) && offset == 0xfff;
        if is_config && (is_skewed || is_last) {
            data[0] ^= 1;
        }
        Ok(())
    }

    fn write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        let is_bar = index == BAR0;
        if is_bar && self.is(Fault::WriteIsLost) {
            let mut data = data.to_vec();
            return self.model.read(index, offset, &mut data);
        }
        if is_bar && self.is(Fault::WideWriteIsTorn) && data.len() == 8 && offset < 0x1000 - 8 {
            return self.model.write(index, offset, &data[..4]);
        }
        let written = self.model.write(index, offset, data);
        if is_bar && self.is(Fault::WriteSpills) && data.len() == 2 {
            self.model.write(index, offset ^ 4, &[0])?;
        }
        match self.is(Fault::OutsideIsWritten) {
            true => Ok(()),
            false => written,
        }
    }

    fn map_region(
        &self,
        index: RegionIndex,
        offset: u64,
        len: u64,
    ) -> Result<RegionMapping, BackendError> {
        if self.is(Fault::AreaIsNotMapped) {
            return Err(BackendError::Absent("part that can be mapped"));
        }
        let mapping = self.model.map_region(index, offset, len);
        match (self.fault, &mapping) {
            (Fault::TooMuchIsMapped, Err(_)) if index == BAR2 => {
                self.model.map_region(index, PAGE, PAGE)
            }
            (Fault::LessIsMapped, Ok(_)) => self.model.map_region(index, offset, PAGE),
            (Fault::AnotherPageIsMapped, Ok(_)) if len == PAGE => {
                self.model.map_region(index, offset ^ 0x3000, len)
            }
            _ => mapping,
        }
    }

    fn irq(&self, kind: IrqKind) -> Result<Irq, BackendError> {
        let mut irq = self.model.irq(kind)?;
        if self.is(Fault::TooManyVectorsExist) && kind == IrqKind::Msi {
            irq.count = 33;
        }
        Ok(irq)
    }

    fn set_irqs(&self, kind: IrqKind, events: &[&EventFd]) -> Result<(), BackendError> {
        let most = self.model.irq(kind)?.count as usize;
        let is_on = self.model.vectors(kind) > 0;
        match self.fault {
            Fault::TooManyAreAccepted if events.len() > most => {
                self.model.set_irqs(kind, &events[..most])
            }
            Fault::TooManyLeaveItOn if events.len() > most => {
                Err(BackendError::Absent("interrupt vector of that number"))
            }
            Fault::FirstVectorOnly if events.len() > 1 && events.len() <= most => {
                self.model.set_irqs(kind, &events[..1])
            }
            Fault::VectorsAreSwapped if events.len() > 1 && events.len() <= most => {
                let turned: Vec<_> = events.iter().rev().copied().collect();
                self.model.set_irqs(kind, &turned)
            }
            Fault::OldListStays if is_on && events.len() == 1 => Ok(()),
            Fault::OffIsOn if events.is_empty() => Ok(()),
            Fault::OffTwiceIsRefused if events.is_empty() && !is_on => {
                Err(BackendError::Absent("interrupt that is on"))
            }
            _ => self.model.set_irqs(kind, events),
        }
    }

    fn unmask_intx(&self) -> Result<(), BackendError> {
        match self.is(Fault::UnmaskIsLost) {
            true => Ok(()),
            false => self.model.unmask_intx(),
        }
    }

    fn dma(&self) -> &dyn DmaSpace {
        self
    }

    fn reset(&self) -> Result<(), BackendError> {
        let mut kept = [0; 0x1000];
        self.model.read(BAR0, 0, &mut kept)?;
        match self.fault {
            Fault::ResetIsRefused => return Err(BackendError::Absent("reset")),
            Fault::ResetLeavesThemOn => return Ok(()),
            Fault::ResetEndsNotices => self.model.set_irqs(IrqKind::Request, &[])?,
            // Interrupts are reset while nothing is mapped.
            Fault::ResetTakesMemoryAway => drop(self.model.forget_dma(Iova(MAPPED))),
            _ => {}
        }
        self.model.reset()?;
        match self.is(Fault::ResetKeepsMemory) {
            true => self.model.write(BAR0, 0, &kept),
            false => Ok(()),
        }
    }

    fn migration(&self) -> Option<&dyn VfioMigration> {
        None
    }
}

impl DmaSpace for Broken {
    fn map(
        &self,
        range: DmaRange,
        access: DmaAccess,
        file: Option<DmaFile<'_>>,
    ) -> Result<(), BackendError> {
        let mapped = self.model.dma().map(range, access, file);
        match self.is(Fault::MapsTwice) {
            true => Ok(()),
            false => mapped,
        }
    }

    fn unmap(&self, range: DmaRange) -> Result<(), BackendError> {
        let unmapped = self.model.dma().unmap(range);
        match self.fault {
            Fault::UnmapsTwice if range.len == PAGE && range.iova == Iova(MAPPED) => Ok(()),
            Fault::UnmapsAnything if unmapped.is_err() => self.model.forget_dma(range.iova),
            _ => unmapped,
        }
    }
}

fn run(fault: Fault) {
    let backend = Broken {
        model: ModelBackend::new(&[0; 4096]).with_mapped_bar().unwrap(),
        fault,
        asked: parking_lot::Mutex::default(),
    };
    // The page that is mapped instead of another one is another one.
    backend.model.write(BAR2, 2 * PAGE, b"other").unwrap();
    let raise = |kind, vector: u32| {
        let _ = backend.model.interrupt(kind, vector as usize);
    };
    let memory = Memory {
        region: BAR0,
        offset: 0x40,
        len: 64,
        after_reset: Some(0),
    };
    Subject::new(&backend)
        .with_memory([memory])
        .raised_by(&raise)
        .masking_its_line()
        .check();
}

#[test]
fn suite_finds_each_fault() {
    run(Fault::Nothing);
    for (fault, expected) in ALL {
        let found = catch_unwind(AssertUnwindSafe(|| run(fault)));
        let said = found.expect_err(&format!("{fault:?} passes"));
        let said = match said.downcast::<String>() {
            Ok(said) => *said,
            Err(said) => said
                .downcast_ref::<&str>()
                .map_or("", |said| said)
                .to_owned(),
        };
        assert!(said.contains(expected), "{fault:?}: {said}");
    }
}
