//! Giving guest RAM back to the host.
//!
//! A hole is punched into the file behind RAM. That drops the page from every mapping of it, those
//! of KVM and of processes that emulate devices included, and the guest finds zeroes when it
//! touches the page again. Memory that an assigned function reaches by DMA is pinned and must not
//! be discarded: the function would go on using the old page.
//!
//! `MADV_REMOVE` on our mapping does the same at the same price (measured: 6 us for a single page,
//! under 2 us per page in runs of 64 KiB and more, which is why callers join neighbours);
//! `MADV_DONTNEED` would unmap pages here and free none of the file's.

#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use devices::GuestRam;
use devices::virtio::balloon::RamReclaim;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::backing::HugePages;

/// Frees pages of guest RAM.
pub struct RamDiscard {
    ram: Arc<GuestRam>,
    page_bytes: u64,
}

impl RamDiscard {
    /// For RAM that [`super::allocate`] has made from pages of `hugepages`.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>, hugepages: Option<HugePages>) -> Self {
        Self {
            ram,
            page_bytes: hugepages.map_or(4096, HugePages::bytes),
        }
    }

    /// Frees the whole pages of `start..end`, offsets within `region`.
    fn discard_in(
        &self,
        region: &impl GuestMemoryRegion<B = devices::memory::WriteLog>,
        start: u64,
        end: u64,
    ) -> io::Result<u64> {
        let backing = region.file_offset();
        let backing = backing.ok_or_else(|| io::Error::other("RAM has no file behind it"))?;
        // Regions begin at page boundaries of the file.
        let start = start.next_multiple_of(self.page_bytes);
        let end = end / self.page_bytes * self.page_bytes;
        let Some(len) = end.checked_sub(start).filter(|len| *len > 0) else {
            return Ok(0);
        };
        let result = punch_hole(backing.file(), backing.start() + start, len);
        // Only now: a page that is harvested between mark and change would be sent as it was.
        // Also after a failure, which may come in the middle.
        let at = usize::try_from(start).map_err(io::Error::other)?;
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        region.bitmap().mark_dirty(at, bytes);
        result.map(|()| len)
    }
}

impl RamReclaim for RamDiscard {
    fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    fn discard(&self, start: GuestAddress, len: u64) -> io::Result<u64> {
        let outside = || {
            let text = format!("{len} bytes at {:#x} are not RAM", start.0);
            io::Error::new(io::ErrorKind::InvalidInput, text)
        };
        let bytes = usize::try_from(len).map_err(|_| outside())?;
        if bytes == 0 || !self.ram.check_range(start, bytes) {
            return Err(outside());
        }
        // A range of RAM may lie in two regions that adjoin.
        let end = start.0 + len;
        let mut at = start.0;
        let mut freed = 0;
        while at < end {
            let region = self.ram.find_region(GuestAddress(at)).ok_or_else(outside)?;
            let base = region.start_addr().0;
            let stop = end.min(base + region.len());
            freed += self.discard_in(region, at - base, stop - base)?;
            at = stop;
        }
        Ok(freed)
    }
}

fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let offset = libc::off64_t::try_from(offset).map_err(io::Error::other)?;
    let len = libc::off64_t::try_from(len).map_err(io::Error::other)?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // SAFETY: the descriptor is open for the call. The pages lose their contents, not their
        // mappings, and guest RAM is only ever read and written through volatile accesses.
        let result = unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, len) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests;
