//! The balloon as the machine's owner sees it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::PAGE_BYTES;
use super::config::ConfigSpace;
use super::state::BalloonStateV1;
use super::stats::{BalloonStats, StatsSample};
use crate::virtio::interrupt::VirtioInterrupt;

/// A target that no guest could reach.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Nothing would be left of the guest.
    #[error("balloon target of {bytes} bytes: the guest has {ram_bytes} bytes of memory")]
    TooLarge {
        /// The target.
        bytes: u64,
        /// The guest's memory.
        ram_bytes: u64,
    },
    /// It is not a whole number of pages.
    #[error("balloon target of {0} bytes is not a multiple of 4096")]
    Unaligned(u64),
}

#[derive(Default)]
struct Inner {
    target_pages: u32,
    /// Target that the driver was told of, or will find when it looks for the first time.
    announced_pages: u32,
    actual_pages: u32,
    /// `actual_pages` as the last event had it.
    reported_pages: u32,
    poison: u32,
    stats: Option<StatsSample>,
    /// The driver's configuration interrupt while the device is active.
    interrupt: Option<Arc<VirtioInterrupt>>,
}

impl Inner {
    fn announce(&mut self) {
        if let Some(interrupt) = &self.interrupt
            && self.announced_pages != self.target_pages
        {
            self.announced_pages = self.target_pages;
            interrupt.config_changed();
        }
    }
}

/// What the device, its thread and the owner share.
pub(super) struct Shared {
    ram_bytes: u64,
    /// Tells the worker that the driver has set `actual`.
    actual_event: EventFd,
    /// Held for moments. Interrupt routes are the only locks taken under it.
    inner: Mutex<Inner>,
}

impl Shared {
    pub(super) fn new(ram_bytes: u64) -> io::Result<Self> {
        Ok(Self {
            ram_bytes,
            actual_event: EventFd::new(EFD_NONBLOCK)?,
            inner: Mutex::default(),
        })
    }

    pub(super) fn actual_event(&self) -> &EventFd {
        &self.actual_event
    }

    /// A driver runs, or does so no longer.
    pub(super) fn connect(&self, interrupt: Option<Arc<VirtioInterrupt>>) {
        let mut inner = self.inner.lock();
        inner.interrupt = interrupt;
        inner.announce();
    }

    pub(super) fn config(&self) -> ConfigSpace {
        let inner = self.inner.lock();
        ConfigSpace::new(inner.target_pages, inner.actual_pages, inner.poison)
    }

    /// The driver's word; a number beyond the guest's memory counts as all of it.
    pub(super) fn set_actual_pages(&self, pages: u32) {
        self.inner.lock().actual_pages = pages.min(self.ram_pages());
        // The counter saturating means that the worker has a signal it has not yet seen.
        let _ = self.actual_event.write(1);
    }

    /// What the driver has said since the last call, if that is worth telling: it is there, or
    /// has come closer by an eighth of the guest's memory. Drivers report each megabyte.
    pub(super) fn take_new_actual_bytes(&self) -> Option<u64> {
        let mut inner = self.inner.lock();
        let pages = inner.actual_pages;
        let moved = pages.abs_diff(inner.reported_pages);
        let arrived = pages == inner.target_pages && moved > 0;
        if !arrived && moved <= self.ram_pages() / 8 {
            return None;
        }
        inner.reported_pages = pages;
        Some(u64::from(pages) * PAGE_BYTES)
    }

    pub(super) fn set_poison(&self, poison: u32) {
        self.inner.lock().poison = poison;
    }

    pub(super) fn poison(&self) -> u32 {
        self.inner.lock().poison
    }

    pub(super) fn set_stats(&self, stats: BalloonStats) {
        self.inner.lock().stats = Some(StatsSample {
            stats,
            taken_at: Instant::now(),
        });
    }

    /// A new driver begins with an empty balloon and reads the target when it starts.
    pub(super) fn reset(&self) {
        let mut inner = self.inner.lock();
        inner.announced_pages = inner.target_pages;
        inner.actual_pages = 0;
        inner.poison = 0;
        inner.stats = None;
    }

    pub(super) fn save(&self) -> BalloonStateV1 {
        let inner = self.inner.lock();
        BalloonStateV1 {
            target_pages: inner.target_pages,
            actual_pages: inner.actual_pages,
            poison: inner.poison,
        }
    }

    /// Takes over a checked state: its target is the one that the operator has set last.
    pub(super) fn restore(&self, state: &BalloonStateV1) {
        let mut inner = self.inner.lock();
        inner.target_pages = state.target_pages;
        inner.announced_pages = state.target_pages;
        inner.actual_pages = state.actual_pages;
        inner.reported_pages = state.actual_pages;
        inner.poison = state.poison;
    }

    /// The guest's memory in pages; the device's registers end at 16 TiB.
    pub(super) fn ram_pages(&self) -> u32 {
        u32::try_from(self.ram_bytes / PAGE_BYTES).unwrap_or(u32::MAX)
    }
}

/// Sets the balloon's target and shows what became of it. Usable from any thread, while the
/// machine runs or not.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl BalloonHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Asks the guest to give up memory until `bytes` are out, or to take some back. How soon it
    /// follows, and whether, is up to the guest.
    ///
    /// # Errors
    /// [`TargetError`] when `bytes` are not whole pages or not less than the guest's memory.
    pub fn set_target_bytes(&self, bytes: u64) -> Result<(), TargetError> {
        let ram_bytes = self.shared.ram_bytes;
        if !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(TargetError::Unaligned(bytes));
        }
        let pages = u32::try_from(bytes / PAGE_BYTES);
        let pages = pages.ok().filter(|_| bytes < ram_bytes || bytes == 0);
        let target_pages = pages.ok_or(TargetError::TooLarge { bytes, ram_bytes })?;
        let mut inner = self.shared.inner.lock();
        inner.target_pages = target_pages;
        inner.announce();
        Ok(())
    }

    /// What the guest is asked to give up.
    #[must_use]
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.shared.inner.lock().target_pages) * PAGE_BYTES
    }

    /// What the guest says it has given up.
    #[must_use]
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.shared.inner.lock().actual_pages) * PAGE_BYTES
    }

    /// The latest statistics; `None` when the guest has given none.
    #[must_use]
    pub fn stats(&self) -> Option<StatsSample> {
        self.shared.inner.lock().stats.clone()
    }
}
