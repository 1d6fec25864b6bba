//! A backend in plain memory: a function with two BARs and two MSI-X vectors.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::pci::HostMemory;
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::backend::{BackendError, Irq, IrqKind, Region, RegionIndex, VfioBackend, VfioMigration};
use crate::dma::{DmaAccess, DmaFile, DmaRange, DmaSpace, Iova, IovaMap};
use crate::kernel::RegionMapping;

/// The model.
pub struct ModelBackend {
    regions: Mutex<BTreeMap<RegionIndex, Vec<u8>>>,
    sizes: BTreeMap<RegionIndex, usize>,
    dma: ModelDma,
    interrupts: Mutex<BTreeMap<IrqKind, Vec<EventFd>>>,
    /// Of each kind the most vectors that were ever asked for at a time, refused or not.
    asked: Mutex<BTreeMap<IrqKind, usize>>,
    resets: Mutex<u32>,
    has_reset: bool,
    unmasked: Mutex<u32>,
    server: Arc<ModelServer>,
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
            dma: ModelDma {
                server: Arc::clone(&server),
                ..ModelDma::default()
            },
            interrupts: Mutex::default(),
            asked: Mutex::default(),
            resets: Mutex::default(),
            has_reset: true,
            unmasked: Mutex::default(),
            server,
        }
    }

    /// One that cannot be reset.
    #[must_use]
    pub fn without_reset(mut self) -> Self {
        self.has_reset = false;
        self
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
        self.server.check()?;
        let size = self.sizes.get(&index).copied().unwrap_or(0) as u64;
        Ok(Region {
            size,
            readable: size > 0,
            writable: size > 0,
            mappable: Vec::new(),
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

    fn map_region(&self, _: RegionIndex, _: u64, _: u64) -> Result<RegionMapping, BackendError> {
        self.server.check()?;
        Err(BackendError::Absent("region that can be mapped"))
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
            return Err(BackendError::Absent("interrupt vector of that number"));
        }
        let events = events.iter().map(|event| event.try_clone());
        let events = events.collect::<io::Result<Vec<_>>>();
        let events = events.map_err(|source| refused("set interrupts", source))?;
        self.interrupts.lock().insert(kind, events);
        Ok(())
    }

    fn unmask_intx(&self) -> Result<(), BackendError> {
        self.server.check()?;
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
        self.server.check()?;
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
        self.server.check()?;
        let inserted = self.map.lock().insert(range);
        inserted.map_err(|error| refused("map DMA", io::Error::other(error)))
    }

    fn unmap(&self, range: DmaRange) -> Result<(), BackendError> {
        self.server.check()?;
        let removed = self.map.lock().remove(range.iova);
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
    let file = File::from(memfd_create("vfio-page", MemfdFlags::CLOEXEC)?);
    file.set_len(0x1000)?;
    let mapping = RegionMapping::new(file.as_fd(), 0, 0x1000, true)?;
    Ok((file, mapping))
}

/// What every backend must do, checked over any of them. `backend` is fresh.
///
/// # Panics
/// When the backend breaks the contract.
pub fn conformance(backend: &dyn VfioBackend) {
    check_regions(backend);
    let kind = check_interrupts(backend);
    let mut header = [0; 4];
    let read = |data: &mut [u8]| backend.read(RegionIndex::Config, 0, data);
    read(&mut header).expect("who made it");
    check_dma(backend);
    if let Some(kind) = kind {
        signal(backend, kind);
    }
    backend.reset().expect("a reset");
    let mut again = [0; 4];
    read(&mut again).expect("it is still there");
    assert_eq!(again, header, "another device after a reset");
    // Interrupts are off, which nothing need turn off, and can be turned on again.
    if let Some(kind) = kind {
        let event = signal(backend, kind);
        backend.set_irqs(kind, &[]).expect("on above");
        assert!(event.read().is_err(), "nothing was asked of the device");
    }
    check_dma(backend);
}

/// Who accesses what is not there is refused before the device is asked.
fn check_regions(backend: &dyn VfioBackend) {
    let config = backend
        .region(RegionIndex::Config)
        .expect("every function has one");
    assert!(config.size >= 64, "a configuration header has 64 bytes");
    let mut bytes = [0; 2];
    for offset in [config.size - 1, config.size, u64::MAX] {
        let read = backend.read(RegionIndex::Config, offset, &mut bytes);
        let write = backend.write(RegionIndex::Config, offset, &bytes);
        for outside in [read, write] {
            assert!(
                matches!(outside, Err(BackendError::OutsideRegion { .. })),
                "{offset:#x}: {outside:?}"
            );
        }
    }
    let absent = backend
        .region(RegionIndex::Bar(5))
        .expect("asking is allowed");
    if absent.size == 0 {
        assert!(backend.read(RegionIndex::Bar(5), 0, &mut bytes).is_err());
        assert!(backend.write(RegionIndex::Bar(5), 0, &bytes).is_err());
    }
}

/// Vectors: one more than there are, and none. A kind that has any.
fn check_interrupts(backend: &dyn VfioBackend) -> Option<IrqKind> {
    let event = EventFd::new(EFD_NONBLOCK).expect("an event");
    let kinds = [IrqKind::MsiX, IrqKind::Intx, IrqKind::Msi];
    let counts = kinds.map(|kind| {
        let count = backend.irq(kind).expect("asking is allowed").count;
        let many = vec![&event; count as usize + 1];
        assert!(
            matches!(backend.set_irqs(kind, &many), Err(BackendError::Absent(_))),
            "{kind:?}: more than the {count} that there are"
        );
        backend.set_irqs(kind, &[]).expect("it is off");
        (kind, count)
    });
    let found = counts.into_iter().find(|(_, count)| *count > 0);
    found.map(|(kind, _)| kind)
}

/// The first vector of `kind` signals the event that this gives back.
fn signal(backend: &dyn VfioBackend, kind: IrqKind) -> EventFd {
    let event = EventFd::new(EFD_NONBLOCK).expect("an event");
    let first = backend.set_irqs(kind, &[&event]);
    assert!(first.is_ok(), "the first vector of {kind:?}: {first:?}");
    event
}

/// A range is mapped once and unmapped once.
fn check_dma(backend: &dyn VfioBackend) {
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
