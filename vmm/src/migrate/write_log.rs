//! The VMM's own writes as a dirty log.

use std::sync::Arc;

use devices::GuestRam;
use migration::ports::{DirtyTracker, PortError};
use migration::{DirtyBitmap, PageRun};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Logs what devices write to guest RAM on the guest's behalf. KVM's own log does not see that.
pub struct WriteLogTracker {
    memory: Arc<GuestRam>,
}

impl WriteLogTracker {
    /// The log of `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuestRam>) -> Self {
        Self { memory }
    }
}

impl DirtyTracker for WriteLogTracker {
    fn start(&self) -> Result<(), PortError> {
        for region in self.memory.iter() {
            region.get_mmap().bitmap().enable();
        }
        Ok(())
    }

    fn harvest(&self, bitmap: &mut DirtyBitmap) -> Result<(), PortError> {
        let base = bitmap.base();
        let region = base
            .gpa()
            .and_then(|gpa| self.memory.find_region(GuestAddress(gpa)));
        let region = region.ok_or(PortError::OutsideMemory {
            start: base.0,
            end: base.0,
        })?;
        region.get_mmap().bitmap().harvest(bitmap.words_mut());
        Ok(())
    }

    /// A harvest has cleared the marks already.
    fn rearm(&self, _: PageRun) -> Result<(), PortError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), PortError> {
        for region in self.memory.iter() {
            region.get_mmap().bitmap().disable();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use migration::PageIndex;
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn device_writes_between_start_and_stop_are_harvested_once() {
        let ranges = [(GuestAddress(0x10_0000), 0x10_0000)];
        let memory = Arc::new(GuestRam::from_ranges(&ranges).unwrap());
        let tracker = WriteLogTracker::new(Arc::clone(&memory));
        let harvest = |tracker: &WriteLogTracker| {
            let mut bitmap = DirtyBitmap::new(PageIndex(0x100), 0x100);
            tracker.harvest(&mut bitmap).unwrap();
            bitmap
                .runs()
                .map(|run| (run.start.0, run.count))
                .collect::<Vec<_>>()
        };
        memory.write_obj(1_u8, GuestAddress(0x10_0000)).unwrap();
        tracker.start().unwrap();
        memory.write_obj(1_u64, GuestAddress(0x10_2ffc)).unwrap();
        assert_eq!(harvest(&tracker), [(0x102, 2)]);
        assert_eq!(harvest(&tracker), []);
        tracker.stop().unwrap();
        memory.write_obj(1_u8, GuestAddress(0x10_0000)).unwrap();
        assert_eq!(harvest(&tracker), []);
    }
}
