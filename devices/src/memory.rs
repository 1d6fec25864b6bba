//! Guest RAM as devices see it, and the log of what the VMM itself writes there.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// Guest RAM: volatile access only; every write passes a [`WriteLog`].
pub type GuestRam = GuestMemoryMmap<WriteLog>;

/// Bytes per log bit: the guest's page size, whatever backs the memory.
pub const LOG_PAGE_BYTES: usize = 4096;

/// Pages that the VMM has written since the last harvest, one bit each.
///
/// KVM's dirty log sees what vCPUs write; what devices write on the guest's behalf is found here.
/// While switched off, and that is whenever no migration runs, a write costs one load.
#[derive(Debug, Default)]
pub struct WriteLog {
    enabled: AtomicBool,
    pages: usize,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl WriteLog {
    /// Starts logging, with no page marked.
    pub fn enable(&self) {
        let words = self.words.get_or_init(|| {
            let count = self.pages.div_ceil(64);
            (0..count).map(|_| AtomicU64::new(0)).collect()
        });
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        self.enabled.store(true, Ordering::SeqCst);
    }

    /// Stops logging.
    pub fn disable(&self) {
        self.enabled.store(false, Ordering::SeqCst);
    }

    /// Moves the marks into `bitmap` (page 0 is bit 0 of word 0), adding to what is there.
    pub fn harvest(&self, bitmap: &mut [u64]) {
        let words = self.words.get().map_or(&[][..], |words| words);
        for (target, word) in bitmap.iter_mut().zip(words) {
            *target |= word.swap(0, Ordering::AcqRel);
        }
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if !self.enabled.load(Ordering::Relaxed) || len == 0 {
            return;
        }
        let Some(words) = self.words.get() else {
            return;
        };
        let last = offset.saturating_add(len - 1) / LOG_PAGE_BYTES;
        for page in offset / LOG_PAGE_BYTES..=last.min(self.pages.saturating_sub(1)) {
            if let Some(word) = words.get(page / 64) {
                word.fetch_or(1 << (page % 64), Ordering::AcqRel);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / LOG_PAGE_BYTES;
        let word = self.words.get().and_then(|words| words.get(page / 64));
        word.is_some_and(|word| word.load(Ordering::Acquire) & 1 << (page % 64) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for WriteLog {
    fn with_len(len: usize) -> Self {
        Self {
            enabled: AtomicBool::new(false),
            pages: len.div_ceil(LOG_PAGE_BYTES),
            words: OnceLock::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    #[test]
    fn only_writes_while_enabled_are_logged_and_harvest_clears() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0x10_0000), 0x10_0000)]).unwrap();
        let region = ram.find_region(GuestAddress(0x10_0000)).unwrap();
        let log = region.get_mmap();
        ram.write_slice(&[1], GuestAddress(0x10_0000)).unwrap();
        log.bitmap().enable();
        ram.write_slice(&[1; 4097], GuestAddress(0x10_1fff))
            .unwrap();
        ram.read_slice(&mut [0; 8], GuestAddress(0x10_9000))
            .unwrap();
        let mut bitmap = [0, 1 << 63, 0, 0];
        log.bitmap().harvest(&mut bitmap);
        assert_eq!(bitmap, [0b110, 1 << 63, 0, 0]);
        log.bitmap().disable();
        ram.write_slice(&[1], GuestAddress(0x10_0000)).unwrap();
        let mut bitmap = [0; 4];
        log.bitmap().harvest(&mut bitmap);
        assert_eq!(bitmap, [0; 4]);
        assert_eq!(region.len(), 0x10_0000);
    }

    #[test]
    fn marks_outside_the_region_are_ignored() {
        let log = WriteLog::with_len(0x3000);
        log.enable();
        log.mark_dirty(0x2fff, usize::MAX);
        log.mark_dirty(usize::MAX, 5);
        assert!(log.dirty_at(0x2000) && !log.dirty_at(0x1000) && !log.dirty_at(usize::MAX));
    }
}
