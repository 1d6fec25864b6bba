//! A function with two BARs, and with every kind of interrupt.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::eventfd::EventFd;

use super::ModelMigration;
use crate::backend::{BackendError, Irq, IrqKind, Region, RegionIndex, VfioBackend};
#[cfg(test)]
use crate::dma::Iova;
use crate::dma::{DmaAccess, DmaFile, DmaRange, DmaSpace, IovaMap};
use crate::kernel::RegionMapping;
use crate::migration::{MigrationFeatures, VfioMigration};

/// Of BAR 2, which has four pages, the middle two can be mapped in a model that has such.
const MAPPABLE: (u64, u64) = (0x1000, 0x2000);

/// The model.
pub struct ModelBackend {
    regions: Mutex<BTreeMap<RegionIndex, Vec<u8>>>,
    sizes: BTreeMap<RegionIndex, usize>,
    /// BAR 2, where it can be mapped.
    shared: Option<File>,
    dma: ModelDma,
    interrupts: Mutex<BTreeMap<IrqKind, Vec<EventFd>>>,
    /// Of each kind the most vectors that were ever asked for at a time, refused or not.
    asked: Mutex<BTreeMap<IrqKind, usize>>,
    resets: Mutex<u32>,
    has_reset: bool,
    unmasked: Mutex<u32>,
    line: Mutex<Line>,
    server: Arc<ModelServer>,
    migration: Option<ModelMigration>,
}

/// The legacy line.
#[derive(Default)]
struct Line {
    is_masked: bool,
    /// It was raised while it was masked.
    is_pending: bool,
}

/// What a function of another process needs.
#[derive(Default)]
struct ModelServer {
    is_lost: AtomicBool,
}

impl ModelServer {
    fn check(&self) -> Result<(), BackendError> {
        match self.is_lost.load(Ordering::Relaxed) {
            true => Err(BackendError::Server("the model is lost".to_owned())),
            false => Ok(()),
        }
    }
}

#[derive(Default)]
struct ModelDma {
    map: Mutex<IovaMap>,
    server: Arc<ModelServer>,
}

impl ModelBackend {
    /// A function whose configuration space is `config`.
    #[must_use]
    pub fn new(config: &[u8]) -> Self {
        let regions = BTreeMap::from([
            (RegionIndex::Config, config.to_vec()),
            (RegionIndex::Bar(0), vec![0; 0x1000]),
            (RegionIndex::Bar(2), vec![0; 0x4000]),
        ]);
        let server = Arc::new(ModelServer::default());
        Self {
            sizes: regions
                .iter()
                .map(|(index, bytes)| (*index, bytes.len()))
                .collect(),
            regions: Mutex::new(regions),
            shared: None,
            dma: ModelDma {
                server: Arc::clone(&server),
                ..ModelDma::default()
            },
            interrupts: Mutex::default(),
            asked: Mutex::default(),
            resets: Mutex::default(),
            has_reset: true,
            unmasked: Mutex::default(),
            line: Mutex::default(),
            server,
            migration: None,
        }
    }

    /// One with a BAR that can be mapped, in part.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn with_mapped_bar(mut self) -> io::Result<Self> {
        let (file, _) = shared_page()?;
        let size = self.sizes.get(&RegionIndex::Bar(2)).copied();
        file.set_len(size.unwrap_or(0) as u64)?;
        self.shared = Some(file);
        Ok(self)
    }

    /// One that cannot be reset.
    #[must_use]
    pub fn without_reset(mut self) -> Self {
        self.has_reset = false;
        self
    }

    /// One whose state can be taken and given: `bytes`.
    #[must_use]
    pub fn with_migration(mut self, features: MigrationFeatures, bytes: &[u8]) -> Self {
        self.migration = Some(ModelMigration::new(features, bytes));
        self
    }

    /// That interface, if it has one.
    #[must_use]
    pub fn model_migration(&self) -> Option<&ModelMigration> {
        self.migration.as_ref()
    }

    /// From now on everything fails that is asked of it: its server is gone.
    pub fn lose(&self) {
        self.server.is_lost.store(true, Ordering::Relaxed);
    }

    /// How often it was reset.
    #[must_use]
    pub fn resets(&self) -> u32 {
        *self.resets.lock()
    }

    /// How often the legacy line was let go on.
    #[must_use]
    pub fn unmasked(&self) -> u32 {
        *self.unmasked.lock()
    }

    /// Vectors of `kind` that would be signalled.
    #[must_use]
    pub fn vectors(&self, kind: IrqKind) -> usize {
        self.interrupts.lock().get(&kind).map_or(0, Vec::len)
    }

    /// The most vectors of `kind` that were ever asked for at a time, refused or not.
    #[must_use]
    pub fn vectors_asked(&self, kind: IrqKind) -> usize {
        self.asked.lock().get(&kind).copied().unwrap_or(0)
    }

    /// Signals a vector, as the device would; false when it is off, or waits for the line.
    #[must_use]
    pub fn interrupt(&self, kind: IrqKind, vector: usize) -> bool {
        let interrupts = self.interrupts.lock();
        let event = interrupts.get(&kind).and_then(|events| events.get(vector));
        let Some(event) = event else {
            return false;
        };
        if kind == IrqKind::Intx {
            let mut line = self.line.lock();
            line.is_pending = line.is_masked;
            if line.is_masked {
                return false;
            }
            line.is_masked = true;
        }
        event.write(1).is_ok()
    }

    /// What is within the device's reach: addresses and bytes.
    #[cfg(test)]
    pub(crate) fn reached(&self) -> Vec<(u64, u64)> {
        let map = self.dma.map.lock();
        map.ranges()
            .map(|range| (range.iova.0, range.len))
            .collect()
    }

    /// Takes the range that begins there out of the device's reach, however long it is.
    #[cfg(test)]
    pub(super) fn forget_dma(&self, iova: Iova) -> Result<(), BackendError> {
        let removed = self.dma.map.lock().remove(iova).map(drop);
        removed.map_err(|error| refused("unmap DMA", io::Error::other(error)))
    }

    /// The bytes behind `region` at such a place.
    fn shared_part(&self, region: RegionIndex) -> Option<&File> {
        self.shared
            .as_ref()
            .filter(|_| region == RegionIndex::Bar(2))
    }

    fn access<T>(
        &self,
        region: RegionIndex,
        offset: u64,
        len: usize,
        f: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, BackendError> {
        let mut regions = self.regions.lock();
        let bytes = regions.entry(region).or_default();
        let size = bytes.len() as u64;
        let start = usize::try_from(offset).ok();
        let part = start.and_then(|start| bytes.get_mut(start..start.checked_add(len)?));
        let part = part.ok_or(BackendError::OutsideRegion {
            region,
            offset,
            len,
            size,
        })?;
        let Some(file) = self.shared_part(region) else {
            return Ok(f(part));
        };
        let failed = |source| refused("access a region", source);
        file.read_exact_at(part, offset).map_err(failed)?;
        let result = f(part);
        file.write_all_at(part, offset).map_err(failed)?;
        Ok(result)
    }
}

impl VfioBackend for ModelBackend {
    fn region(&self, index: RegionIndex) -> Result<Region, BackendError> {
        self.server.check()?;
        let size = self.sizes.get(&index).copied().unwrap_or(0) as u64;
        Ok(Region {
            size,
            readable: size > 0,
            writable: size > 0,
            mappable: self
                .shared_part(index)
                .map_or(Vec::new(), |_| vec![MAPPABLE]),
        })
    }

    fn read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        self.server.check()?;
        self.access(index, offset, data.len(), |bytes| {
            data.copy_from_slice(bytes)
        })
    }

    fn write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        self.server.check()?;
        self.access(index, offset, data.len(), |bytes| {
            bytes.copy_from_slice(data)
        })
    }

    fn map_region(
        &self,
        index: RegionIndex,
        offset: u64,
        len: u64,
    ) -> Result<RegionMapping, BackendError> {
        self.server.check()?;
        let end = offset.checked_add(len);
        let is_within =
            offset >= MAPPABLE.0 && end.is_some_and(|end| end <= MAPPABLE.0 + MAPPABLE.1);
        let file = self.shared_part(index).filter(|_| is_within);
        let file = file.ok_or(BackendError::Absent("region that can be mapped"))?;
        let mapping = RegionMapping::new(file.as_fd(), offset, len, true);
        mapping.map_err(|source| refused("map a region", source))
    }

    fn irq(&self, kind: IrqKind) -> Result<Irq, BackendError> {
        self.server.check()?;
        let count = match kind {
            IrqKind::MsiX => 2,
            IrqKind::Msi => 4,
            IrqKind::Intx => 1,
            IrqKind::Error | IrqKind::Request => 1,
        };
        Ok(Irq {
            count,
            automasked: kind == IrqKind::Intx,
        })
    }

    fn set_irqs(&self, kind: IrqKind, events: &[&EventFd]) -> Result<(), BackendError> {
        {
            let mut asked = self.asked.lock();
            let most = asked.entry(kind).or_default();
            *most = events.len().max(*most);
        }
        let count = u32::try_from(events.len()).unwrap_or(u32::MAX);
        if count > self.irq(kind)?.count {
            self.interrupts.lock().remove(&kind);
            return Err(BackendError::Absent("interrupt vector of that number"));
        }
        let events = events.iter().map(|event| event.try_clone());
        let events = events.collect::<io::Result<Vec<_>>>();
        let events = events.map_err(|source| refused("set interrupts", source))?;
        let mut interrupts = self.interrupts.lock();
        if kind == IrqKind::Intx {
            *self.line.lock() = Line::default();
        }
        interrupts.insert(kind, events);
        Ok(())
    }

    fn unmask_intx(&self) -> Result<(), BackendError> {
        self.server.check()?;
        if self.vectors(IrqKind::Intx) == 0 {
            return Err(BackendError::Absent("legacy interrupt that is on"));
        }
        *self.unmasked.lock() += 1;
        let was_pending = std::mem::take(&mut *self.line.lock()).is_pending;
        if was_pending {
            // Whether anybody listens is not the line's affair.
            let _ = self.interrupt(IrqKind::Intx, 0);
        }
        Ok(())
    }

    fn dma(&self) -> &dyn DmaSpace {
        &self.dma
    }

    fn reset(&self) -> Result<(), BackendError> {
        if !self.has_reset {
            return Err(BackendError::Absent("reset"));
        }
        self.server.check()?;
        *self.resets.lock() += 1;
        if let Some(migration) = &self.migration {
            migration.reset();
        }
        let is_hosts = |kind: &IrqKind| matches!(kind, IrqKind::Error | IrqKind::Request);
        self.interrupts.lock().retain(|kind, _| is_hosts(kind));
        for (index, bytes) in self.regions.lock().iter_mut() {
            if *index != RegionIndex::Config {
                bytes.fill(0);
                if let Some(file) = self.shared_part(*index) {
                    let cleared = file.write_all_at(bytes, 0);
                    cleared.map_err(|source| refused("reset", source))?;
                }
            }
        }
        Ok(())
    }

    fn migration(&self) -> Option<&dyn VfioMigration> {
        let migration = self.migration.as_ref()?;
        Some(migration)
    }
}

impl DmaSpace for ModelDma {
    fn map(
        &self,
        range: DmaRange,
        _access: DmaAccess,
        _file: Option<DmaFile<'_>>,
    ) -> Result<(), BackendError> {
        self.server.check()?;
        let inserted = self.map.lock().insert(range);
        inserted.map_err(|error| refused("map DMA", io::Error::other(error)))
    }

    fn unmap(&self, range: DmaRange) -> Result<(), BackendError> {
        self.server.check()?;
        let mut map = self.map.lock();
        if !map.ranges().any(|mapped| *mapped == range) {
            let missing = io::Error::from(io::ErrorKind::NotFound);
            return Err(refused("unmap DMA", missing));
        }
        let removed = map.remove(range.iova).map(drop);
        removed.map_err(|error| refused("unmap DMA", io::Error::other(error)))
    }

    fn maps_bars(&self) -> bool {
        true
    }
}

fn refused(what: &'static str, source: io::Error) -> BackendError {
    BackendError::Refused { what, source }
}

/// A page that other processes can map: guest memory in small.
///
/// # Errors
/// The host's refusal.
pub fn shared_page() -> io::Result<(File, RegionMapping)> {
    let file = File::from(memfd_create("vfio-page", MemfdFlags::CLOEXEC)?);
    file.set_len(0x1000)?;
    let mapping = RegionMapping::new(file.as_fd(), 0, 0x1000, true)?;
    Ok((file, mapping))
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::testing::{Memory, Subject};

    #[test]
    fn model_passes_conformance() {
        let trapped = ModelBackend::new(&[0; 256]);
        let mapped = ModelBackend::new(&[0; 4096]).with_mapped_bar().unwrap();
        for model in [trapped, mapped] {
            let raise = |kind, vector: u32| {
                let _ = model.interrupt(kind, vector as usize);
            };
            let memory = |region, offset, after_reset| Memory {
                region,
                offset,
                len: 64,
                after_reset,
            };
            Subject::new(&model)
                .with_memory([
                    memory(RegionIndex::Config, 0x40, None),
                    memory(RegionIndex::Bar(0), 0xfc0, Some(0)),
                    memory(RegionIndex::Bar(2), 0x2fc0, Some(0)),
                ])
                .raised_by(&raise)
                .masking_its_line()
                .check();
        }
    }

    #[test]
    fn reset_clears_bars_and_keeps_configuration() {
        let model = ModelBackend::new(&[0xde; 256]);
        model.write(RegionIndex::Bar(0), 0x10, &[1, 2]).unwrap();
        model.reset().unwrap();
        let mut data = [9; 2];
        model.read(RegionIndex::Bar(0), 0x10, &mut data).unwrap();
        assert_eq!(data, [0; 2]);
        model.read(RegionIndex::Config, 0, &mut data).unwrap();
        assert_eq!(data, [0xde; 2]);
    }

    #[test]
    fn lost_model_refuses_everything() {
        let model = ModelBackend::new(&[0; 256]);
        model.lose();
        let (range, event) = (
            DmaRange {
                iova: Iova(0),
                len: 0x1000,
                host_address: 0,
            },
            EventFd::new(EFD_NONBLOCK).unwrap(),
        );
        let results = [
            model.region(RegionIndex::Config).map(drop),
            model.read(RegionIndex::Config, 0, &mut [0]),
            model.write(RegionIndex::Config, 0, &[0]),
            model.map_region(RegionIndex::Bar(0), 0, 0x1000).map(drop),
            model.irq(IrqKind::MsiX).map(drop),
            model.set_irqs(IrqKind::MsiX, &[&event]),
            model.unmask_intx(),
            model.dma().map(range, DmaAccess::Read, None),
            model.dma().unmap(range),
            model.reset(),
        ];
        for result in results {
            assert!(matches!(result, Err(BackendError::Server(_))), "{result:?}");
        }
    }
}
