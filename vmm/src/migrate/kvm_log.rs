//! KVM's dirty log as a tracker, and the union of several trackers.

use std::io;
use std::sync::Arc;

use devices::GuestRam;
use devices::virtio::vhost_user::VhostUserHandle;
use migration::ports::{DirtyTracker, PortError};
use migration::{DirtyBitmap, PAGE_BYTES, PageIndex, PageRun};
use parking_lot::Mutex;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::device_stream::{DeviceLog, Named};
use super::{ServerLogTracker, WriteLogTracker};
use crate::kvm::{DirtyLog, KvmError};

/// Pages per word of the log.
const WORD_PAGES: u64 = 64;

/// Logs what vCPUs write.
pub struct KvmLogTracker {
    log: DirtyLog,
    slots: Vec<Slot>,
}

struct Slot {
    number: u32,
    pages: PageRun,
    /// Pages that were harvested and not re-armed yet. One lock is held at a time, and across no
    /// call of the kernel.
    harvested: Mutex<Vec<u64>>,
}

impl KvmLogTracker {
    /// The tracker over `log`.
    #[must_use]
    pub fn new(log: DirtyLog) -> Self {
        let regions = log.memory().iter().zip(0..);
        let slot = |(region, number): (&_, u32)| {
            let start = PageIndex::containing(GuestMemoryRegion::start_addr(region).raw_value());
            let pages = PageRun::new(start, GuestMemoryRegion::len(region) / PAGE_BYTES)?;
            Some(Slot {
                number,
                pages,
                harvested: Mutex::default(),
            })
        };
        Self {
            slots: regions.filter_map(slot).collect(),
            log,
        }
    }

    fn slot(&self, run: PageRun) -> Result<&Slot, PortError> {
        let holds =
            |slot: &&Slot| slot.pages.start.0 <= run.start.0 && run.end().0 <= slot.pages.end().0;
        self.slots.iter().find(holds).ok_or_else(|| outside(run))
    }
}

fn outside(run: PageRun) -> PortError {
    PortError::OutsideMemory {
        start: run.start.0,
        end: run.end().0,
    }
}

fn port_error(error: KvmError) -> PortError {
    match error {
        KvmError::Ioctl { what, source } => PortError::Host { what, source },
        other => PortError::Host {
            what: "dirty log",
            source: io::Error::other(other),
        },
    }
}

impl DirtyTracker for KvmLogTracker {
    fn start(&self) -> Result<(), PortError> {
        for slot in &self.slots {
            slot.harvested.lock().clear();
        }
        self.log.set_enabled(true).map_err(port_error)
    }

    fn harvest(&self, bitmap: &mut DirtyBitmap) -> Result<(), PortError> {
        let (base, pages) = (bitmap.base(), bitmap.pages());
        let outside = PortError::OutsideMemory {
            start: base.0,
            end: base.0.saturating_add(pages),
        };
        let wanted = PageRun::new(base, pages);
        let slot = self.slots.iter().find(|slot| Some(slot.pages) == wanted);
        let slot = slot.ok_or(outside)?;
        let bytes = usize::try_from(slot.pages.bytes()).unwrap_or(usize::MAX);
        let read = self.log.read(slot.number, bytes).map_err(port_error)?;
        for (word, more) in bitmap.words_mut().iter_mut().zip(&read) {
            *word |= more;
        }
        if self.log.is_manual() {
            // What is still there from before is set in the log, too: nothing has cleared it.
            *slot.harvested.lock() = read;
        }
        Ok(())
    }

    fn rearm(&self, run: PageRun) -> Result<(), PortError> {
        if !self.log.is_manual() {
            return Ok(());
        }
        let slot = self.slot(run)?;
        let first_page = run.start.0 - slot.pages.start.0;
        let ends_well = run.count.is_multiple_of(WORD_PAGES) || run.end() == slot.pages.end();
        if !first_page.is_multiple_of(WORD_PAGES) || !ends_well {
            let what = "re-arm pages that do not begin or end with a word of the dirty log";
            let source = io::ErrorKind::InvalidInput.into();
            return Err(PortError::Host { what, source });
        }
        let pages = u32::try_from(run.count).map_err(|_| outside(run))?;
        let words = index(first_page)..index(first_page + run.count.next_multiple_of(WORD_PAGES));
        // Taken, not copied: cleared once more, a page that was written since would be lost.
        let taken: Vec<_> = match slot.harvested.lock().get_mut(words.clone()) {
            Some(words) => words.iter_mut().map(std::mem::take).collect(),
            // Nothing was harvested yet.
            None => return Ok(()),
        };
        if taken.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let cleared = self.log.clear(slot.number, first_page, pages, &taken);
        cleared.map_err(|error| {
            let mut harvested = slot.harvested.lock();
            let words = harvested.get_mut(words).into_iter().flatten();
            for (word, taken) in words.zip(&taken) {
                *word |= taken;
            }
            port_error(error)
        })
    }

    fn stop(&self) -> Result<(), PortError> {
        self.log.set_enabled(false).map_err(port_error)
    }
}

/// Number of the word that has a page.
fn index(page: u64) -> usize {
    usize::try_from(page / WORD_PAGES).unwrap_or(usize::MAX)
}

/// Several logs as one: a page counts as written when any of them says so.
pub struct UnionTracker {
    trackers: Vec<Box<dyn DirtyTracker>>,
}

impl UnionTracker {
    /// Everybody who writes to `memory`: vCPUs, the VMM, and the vhost-user servers `servers`.
    #[must_use]
    pub fn of_machine(
        log: DirtyLog,
        memory: &Arc<GuestRam>,
        servers: Vec<VhostUserHandle>,
    ) -> Self {
        Self::new(vec![
            Box::new(KvmLogTracker::new(log)),
            Box::new(WriteLogTracker::new(Arc::clone(memory))),
            Box::new(ServerLogTracker::new(Arc::clone(memory), servers)),
        ])
    }

    /// The same with what assigned devices write.
    #[must_use]
    pub(super) fn with_devices(mut self, devices: &[Named], memory: &GuestRam) -> Self {
        for device in devices {
            let log = DeviceLog::new(device.clone(), memory);
            self.trackers.push(Box::new(log));
        }
        self
    }

    /// The union of `trackers`.
    #[must_use]
    pub fn new(trackers: Vec<Box<dyn DirtyTracker>>) -> Self {
        Self { trackers }
    }
}

impl DirtyTracker for UnionTracker {
    /// All start or none.
    fn start(&self) -> Result<(), PortError> {
        for (tracker, started) in self.trackers.iter().zip(0..) {
            if let Err(error) = tracker.start() {
                for tracker in self.trackers.iter().take(started) {
                    if let Err(error) = tracker.stop() {
                        log::error!(error:% = error; "dirty log could not be stopped again");
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn harvest(&self, bitmap: &mut DirtyBitmap) -> Result<(), PortError> {
        let mut each = self.trackers.iter();
        each.try_for_each(|tracker| tracker.harvest(bitmap))
    }

    fn rearm(&self, run: PageRun) -> Result<(), PortError> {
        let mut each = self.trackers.iter();
        each.try_for_each(|tracker| tracker.rearm(run))
    }

    /// All are stopped, also when one fails; the first error is told.
    fn stop(&self) -> Result<(), PortError> {
        let stopped = self.trackers.iter().map(|tracker| tracker.stop());
        stopped.fold(Ok(()), Result::and)
    }
}

#[cfg(test)]
mod tests;
