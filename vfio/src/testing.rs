//! A backend in plain memory: a function with two BARs and two MSI-X vectors.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::{env, io};

use devices::pci::HostMemory;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use crate::backend::{BackendError, Irq, IrqKind, Region, RegionIndex, VfioBackend, VfioMigration};
use crate::dma::{DmaAccess, DmaFile, DmaRange, DmaSpace, Iova, IovaMap};
use crate::kernel::RegionMapping;

/// The model.
pub struct ModelBackend {
    regions: Mutex<BTreeMap<RegionIndex, Vec<u8>>>,
    sizes: BTreeMap<RegionIndex, usize>,
    dma: ModelDma,
    interrupts: Mutex<BTreeMap<IrqKind, Vec<EventFd>>>,
    resets: Mutex<u32>,
    has_reset: bool,
    unmasked: Mutex<u32>,
    is_lost: AtomicBool,
}

#[derive(Default)]
struct ModelDma(Mutex<IovaMap>);

impl ModelBackend {
    /// A function whose configuration space is `config`.
    #[must_use]
    pub fn new(config: &[u8]) -> Self {
        let regions = BTreeMap::from([
            (RegionIndex::Config, config.to_vec()),
            (RegionIndex::Bar(0), vec![0; 0x1000]),
            (RegionIndex::Bar(2), vec![0; 0x4000]),
        ]);
        Self {
            sizes: regions
                .iter()
                .map(|(index, bytes)| (*index, bytes.len()))
                .collect(),
            regions: Mutex::new(regions),
            dma: ModelDma::default(),
            interrupts: Mutex::default(),
            resets: Mutex::default(),
            has_reset: true,
            unmasked: Mutex::default(),
            is_lost: AtomicBool::new(false),
        }
    }

    /// One that cannot be reset.
    #[must_use]
    pub fn without_reset(mut self) -> Self {
        self.has_reset = false;
        self
    }

    /// From now on it cannot be reset: its server is gone.
    pub fn lose(&self) {
        self.is_lost.store(true, Ordering::Relaxed);
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

    /// Signals a vector, as the device would; false when it is off.
    #[must_use]
    pub fn interrupt(&self, kind: IrqKind, vector: usize) -> bool {
        let interrupts = self.interrupts.lock();
        let event = interrupts.get(&kind).and_then(|events| events.get(vector));
        event.is_some_and(|event| event.write(1).is_ok())
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
        part.map(f).ok_or(BackendError::OutsideRegion {
            region,
            offset,
            len,
            size,
        })
    }
}

impl VfioBackend for ModelBackend {
    fn region(&self, index: RegionIndex) -> Result<Region, BackendError> {
        let size = self.sizes.get(&index).copied().unwrap_or(0) as u64;
        Ok(Region {
            size,
            readable: size > 0,
            writable: size > 0,
            mappable: Vec::new(),
        })
    }

    fn read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> Result<(), BackendError> {
        self.access(index, offset, data.len(), |bytes| {
            data.copy_from_slice(bytes)
        })
    }

    fn write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> Result<(), BackendError> {
        self.access(index, offset, data.len(), |bytes| {
            bytes.copy_from_slice(data)
        })
    }

    fn map_region(&self, _: RegionIndex, _: u64, _: u64) -> Result<RegionMapping, BackendError> {
        Err(BackendError::Absent("region that can be mapped"))
    }

    fn irq(&self, kind: IrqKind) -> Result<Irq, BackendError> {
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
        let count = u32::try_from(events.len()).unwrap_or(u32::MAX);
        if count > self.irq(kind)?.count {
            return Err(BackendError::Absent("interrupt vector of that number"));
        }
        let events = events.iter().map(|event| event.try_clone());
        let events = events.collect::<io::Result<Vec<_>>>();
        let events = events.map_err(|source| refused("set interrupts", source))?;
        self.interrupts.lock().insert(kind, events);
        Ok(())
    }

    fn unmask_intx(&self) -> Result<(), BackendError> {
        *self.unmasked.lock() += 1;
        Ok(())
    }

    fn dma(&self) -> &dyn DmaSpace {
        &self.dma
    }

    fn reset(&self) -> Result<(), BackendError> {
        if !self.has_reset {
            return Err(BackendError::Absent("reset"));
        }
        if self.is_lost.load(Ordering::Relaxed) {
            return Err(BackendError::Server("the model is lost".to_owned()));
        }
        *self.resets.lock() += 1;
        let is_hosts = |kind: &IrqKind| matches!(kind, IrqKind::Error | IrqKind::Request);
        self.interrupts.lock().retain(|kind, _| is_hosts(kind));
        for (index, bytes) in self.regions.lock().iter_mut() {
            if *index != RegionIndex::Config {
                bytes.fill(0);
            }
        }
        Ok(())
    }

    fn migration(&self) -> Option<&dyn VfioMigration> {
        None
    }
}

impl DmaSpace for ModelDma {
    fn map(
        &self,
        range: DmaRange,
        _access: DmaAccess,
        _file: Option<DmaFile<'_>>,
    ) -> Result<(), BackendError> {
        let inserted = self.0.lock().insert(range);
        inserted.map_err(|error| refused("map DMA", io::Error::other(error)))
    }

    fn unmap(&self, range: DmaRange) -> Result<(), BackendError> {
        let removed = self.0.lock().remove(range.iova);
        let removed = removed.map(drop);
        removed.map_err(|error| refused("unmap DMA", io::Error::other(error)))
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
    static PAGES: AtomicU32 = AtomicU32::new(0);
    let number = PAGES.fetch_add(1, Ordering::Relaxed);
    let path = env::temp_dir().join(format!("vfio-page-{}-{number}", std::process::id()));
    let file = File::create_new(&path)?;
    drop(file);
    let file = File::options().read(true).write(true).open(&path)?;
    fs::remove_file(&path)?;
    file.set_len(0x1000)?;
    let mapping = RegionMapping::new(file.as_fd(), 0, 0x1000, true)?;
    Ok((file, mapping))
}

/// What every backend must do, checked over any of them. `backend` is fresh.
///
/// # Panics
/// When the backend breaks the contract.
pub fn conformance(backend: &dyn VfioBackend) {
    let config = backend
        .region(RegionIndex::Config)
        .expect("every function has one");
    assert!(config.size >= 64, "a configuration header has 64 bytes");
    let mut byte = [0];
    for offset in [config.size, u64::MAX] {
        let outside = backend.read(RegionIndex::Config, offset, &mut byte);
        assert!(
            matches!(outside, Err(BackendError::OutsideRegion { .. })),
            "{offset:#x}"
        );
    }
    let absent = backend
        .region(RegionIndex::Bar(5))
        .expect("asking is allowed");
    if absent.size == 0 {
        assert!(backend.read(RegionIndex::Bar(5), 0, &mut byte).is_err());
    }
    let (memory, page) = shared_page().expect("room for a page");
    let range = DmaRange {
        iova: Iova(0x10_0000),
        len: 0x1000,
        host_address: page.address(),
    };
    let file = Some(DmaFile {
        file: memory.as_fd(),
        offset: 0,
    });
    let map = || backend.dma().map(range, DmaAccess::ReadWrite, file);
    map().expect("a free range");
    assert!(map().is_err(), "mapped twice");
    backend.dma().unmap(range).expect("mapped above");
    assert!(backend.dma().unmap(range).is_err(), "unmapped twice");
    backend.reset().expect("a reset");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_passes_conformance() {
        conformance(&ModelBackend::new(&[0; 256]));
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
}
