//! Address ranges and who answers them, for port I/O and MMIO alike.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

/// Answers guest accesses within one range of a bus.
///
/// Called on vCPU threads, several at once, so implementations lock inside and return soon.
/// Offsets are relative to the range, so that a device never learns where it is mapped.
pub trait IoHandler: Send + Sync {
    /// Fills `data` (1, 2, 4 or 8 bytes) from `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data` (1, 2, 4 or 8 bytes) written at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range could not be added.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Part of the range is taken.
    #[error("{bus}: {base:#x}+{len:#x} overlaps {other_base:#x}+{other_len:#x}")]
    Overlap {
        /// The bus's name.
        bus: &'static str,
        /// First address wanted.
        base: u64,
        /// Length wanted.
        len: u64,
        /// First address of the range in the way.
        other_base: u64,
        /// Its length.
        other_len: u64,
    },
    /// The range is empty or goes past the end of the address space.
    #[error("{bus}: {base:#x}+{len:#x} is not a range")]
    Invalid {
        /// The bus's name.
        bus: &'static str,
        /// First address wanted.
        base: u64,
        /// Length wanted.
        len: u64,
    },
}

struct Range {
    len: u64,
    handler: Arc<dyn IoHandler>,
}

/// A map from addresses to handlers.
///
/// Accesses that no single range covers read as all ones and write nowhere, as on hardware.
pub struct Bus {
    name: &'static str,
    ranges: RwLock<BTreeMap<u64, Range>>,
    unclaimed: AtomicU64,
}

impl Bus {
    /// An empty bus; `name` is for messages.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            ranges: RwLock::new(BTreeMap::new()),
            unclaimed: AtomicU64::new(0),
        }
    }

    /// Gives `[base, base + len)` to `handler`.
    ///
    /// # Errors
    /// [`BusError`] when the range is empty, wraps or overlaps another one.
    pub fn insert(&self, base: u64, len: u64, handler: Arc<dyn IoHandler>) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|l| base.checked_add(l));
        let Some(last) = last else {
            let bus = self.name;
            return Err(BusError::Invalid { bus, base, len });
        };
        let mut ranges = self.ranges.write();
        if let Some((&other_base, other)) = ranges.range(..=last).next_back()
            && other_base + (other.len - 1) >= base
        {
            return Err(BusError::Overlap {
                bus: self.name,
                base,
                len,
                other_base,
                other_len: other.len,
            });
        }
        ranges.insert(base, Range { len, handler });
        Ok(())
    }

    /// Takes the range that begins at `base` away. False when there is none.
    pub fn remove(&self, base: u64) -> bool {
        let mut ranges = self.ranges.write();
        ranges.remove(&base).is_some()
    }

    /// Guest read of `data.len()` bytes at `addr`.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        match self.find(addr, data.len()) {
            Some((handler, offset)) => handler.read(offset, data),
            None => {
                data.fill(0xff);
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Guest write of `data` at `addr`.
    pub fn write(&self, addr: u64, data: &[u8]) {
        match self.find(addr, data.len()) {
            Some((handler, offset)) => handler.write(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// How many accesses no device answered.
    #[must_use]
    pub fn unclaimed_accesses(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    /// The handler is cloned out so that the lock is not held while it works: a configuration
    /// write may move BARs on this same bus.
    fn find(&self, addr: u64, len: usize) -> Option<(Arc<dyn IoHandler>, u64)> {
        let ranges = self.ranges.read();
        let (base, range) = ranges.range(..=addr).next_back()?;
        let offset = addr - base;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= range.len).then(|| (Arc::clone(&range.handler), offset))
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl IoHandler for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn handlers_hear_offsets() {
        let bus = Bus::new("mmio");
        let device = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x1008, &mut data);
        assert_eq!(data, [8; 4]);
        bus.write(0x100c, &[1, 2, 3, 4]);
        assert_eq!(*device.0.lock(), [(12, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn unclaimed_and_straddling_accesses_read_all_ones() {
        let bus = Bus::new("mmio");
        bus.insert(0x1000, 0x10, Arc::new(Recorder::default()))
            .unwrap();
        for addr in [0xfff, 0x100e, 0x1010, u64::MAX] {
            let mut data = [0; 4];
            bus.read(addr, &mut data);
            assert_eq!(data, [0xff; 4], "{addr:#x}");
        }
        assert_eq!(bus.unclaimed_accesses(), 4);
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let bus = Bus::new("pio");
        let device: Arc<dyn IoHandler> = Arc::new(Recorder::default());
        bus.insert(0x10, 0x10, device.clone()).unwrap();
        for (base, len) in [
            (0x10, 1),
            (0x1f, 1),
            (0x0, 0x11),
            (0x0, 0x100),
            (0x18, 0x20),
        ] {
            let overlap = bus.insert(base, len, device.clone());
            assert!(
                matches!(overlap, Err(BusError::Overlap { .. })),
                "{base:#x}+{len:#x}"
            );
        }
        for (base, len) in [(0x0, 0), (u64::MAX, 2)] {
            let invalid = bus.insert(base, len, device.clone());
            assert!(
                matches!(invalid, Err(BusError::Invalid { .. })),
                "{base:#x}+{len:#x}"
            );
        }
        bus.insert(0x0, 0x10, device.clone()).unwrap();
        bus.insert(0x20, 1, device.clone()).unwrap();
        bus.insert(u64::MAX, 1, device.clone()).unwrap();
        assert!(bus.remove(0x10));
        assert!(!bus.remove(0x10));
        bus.insert(0x18, 8, device).unwrap();
    }
}
