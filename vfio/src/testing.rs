//! A backend in plain memory: a function with two BARs and two MSI-X vectors.

use std::collections::BTreeMap;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use crate::backend::{BackendError, Irq, IrqKind, Region, RegionIndex, VfioBackend, VfioMigration};
use crate::dma::{DmaAccess, DmaRange, IovaMap};

/// The model.
pub struct ModelBackend {
    regions: Mutex<BTreeMap<RegionIndex, Vec<u8>>>,
    sizes: BTreeMap<RegionIndex, usize>,
    dma: IovaMap,
    vectors: u32,
    resets: u32,
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
        Self {
            sizes: regions
                .iter()
                .map(|(index, bytes)| (*index, bytes.len()))
                .collect(),
            regions: Mutex::new(regions),
            dma: IovaMap::default(),
            vectors: 0,
            resets: 0,
        }
    }

    /// How often it was reset.
    #[must_use]
    pub fn resets(&self) -> u32 {
        self.resets
    }

    fn access<T>(
        &self,
        region: RegionIndex,
        offset: u64,
        len: usize,
        f: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, BackendError> {
        let mut regions = self.regions.lock().expect("no test thread panicked");
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

    fn irq(&self, kind: IrqKind) -> Result<Irq, BackendError> {
        let count = if kind == IrqKind::MsiX { 2 } else { 0 };
        Ok(Irq {
            count,
            automasked: false,
        })
    }

    fn set_irqs(&mut self, kind: IrqKind, events: &[&EventFd]) -> Result<(), BackendError> {
        let count = u32::try_from(events.len()).unwrap_or(u32::MAX);
        if count > self.irq(kind)?.count {
            return Err(BackendError::Absent("interrupt vector of that number"));
        }
        self.vectors = count;
        Ok(())
    }

    fn map_dma(&mut self, range: DmaRange, _access: DmaAccess) -> Result<(), BackendError> {
        self.dma
            .insert(range)
            .map_err(|error| BackendError::Refused {
                what: "map DMA",
                source: std::io::Error::other(error),
            })
    }

    fn unmap_dma(&mut self, range: DmaRange) -> Result<(), BackendError> {
        let removed = self.dma.remove(range.iova);
        removed.map(drop).map_err(|error| BackendError::Refused {
            what: "unmap DMA",
            source: std::io::Error::other(error),
        })
    }

    fn reset(&mut self) -> Result<(), BackendError> {
        self.resets += 1;
        self.vectors = 0;
        let mut regions = self.regions.lock().expect("no test thread panicked");
        for (index, bytes) in regions.iter_mut() {
            if *index != RegionIndex::Config {
                bytes.fill(0);
            }
        }
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn VfioMigration> {
        None
    }
}

/// What every backend must do, checked over any of them. `backend` is fresh.
///
/// # Panics
/// When the backend breaks the contract.
pub fn conformance(backend: &mut dyn VfioBackend) {
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
    let range = DmaRange {
        iova: crate::dma::Iova(0x10_0000),
        len: 0x1000,
        host_address: 0x7000_0000_0000,
    };
    backend
        .map_dma(range, DmaAccess::ReadWrite)
        .expect("a free range");
    assert!(
        backend.map_dma(range, DmaAccess::ReadWrite).is_err(),
        "mapped twice"
    );
    backend.unmap_dma(range).expect("mapped above");
    assert!(backend.unmap_dma(range).is_err(), "unmapped twice");
    backend.reset().expect("a reset");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_passes_conformance() {
        conformance(&mut ModelBackend::new(&[0; 256]));
    }

    #[test]
    fn reset_clears_bars_and_keeps_configuration() {
        let mut model = ModelBackend::new(&[0xde; 256]);
        model.write(RegionIndex::Bar(0), 0x10, &[1, 2]).unwrap();
        model.reset().unwrap();
        let mut data = [9; 2];
        model.read(RegionIndex::Bar(0), 0x10, &mut data).unwrap();
        assert_eq!(data, [0; 2]);
        model.read(RegionIndex::Config, 0, &mut data).unwrap();
        assert_eq!(data, [0xde; 2]);
    }
}
