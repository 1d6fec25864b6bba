//! Parts of a device's regions in this process.

#![expect(unsafe_code)]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

use devices::pci::HostMemory;

use crate::dma::PAGE_BYTES;

/// Pages of a device's region, mapped until this is dropped. They are the device's own: nothing in
/// this process reads or writes them, guests do.
#[derive(Debug)]
pub struct RegionMapping {
    address: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

// SAFETY: the mapping is not tied to a thread, and there is no access to it through this type.
unsafe impl Send for RegionMapping {}
// SAFETY: as above.
unsafe impl Sync for RegionMapping {}

impl RegionMapping {
    /// Maps `len` bytes at `offset` of `file`; both must be whole pages.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn new(file: BorrowedFd<'_>, offset: u64, len: u64, writable: bool) -> io::Result<Self> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        // The kernel rounds a length up, and would map what nobody asked for.
        if !len.is_multiple_of(PAGE_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = usize::try_from(len).map_err(invalid)?;
        let bytes = NonZeroUsize::new(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = libc::off_t::try_from(offset).map_err(invalid)?;
        let access = match writable {
            true => libc::PROT_READ | libc::PROT_WRITE,
            false => libc::PROT_READ,
        };
        // SAFETY: a new mapping at an address that the kernel chooses touches no other memory; the
        // descriptor is open.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes.get(),
                access,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self {
            address,
            len: bytes,
        })
    }

    /// An aligned word, as a guest would read it; `None` where there is none. The device must answer
    /// there.
    #[cfg(any(test, feature = "testing"))]
    #[must_use]
    pub fn read_u32(&self, offset: u64) -> Option<u32> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(size_of::<u32>())?;
        if !offset.is_multiple_of(size_of::<u32>()) || end > self.len.get() {
            return None;
        }
        // SAFETY: the word lies within the mapping, which is there as long as this is.
        let word = unsafe { self.address.byte_add(offset).cast::<u32>() };
        // SAFETY: as above, and it is aligned, as the mapping is; volatile, as others write it.
        Some(unsafe { word.read_volatile() })
    }
}

impl HostMemory for RegionMapping {
    fn address(&self) -> u64 {
        self.address.as_ptr().addr() as u64
    }

    fn bytes(&self) -> u64 {
        self.len.get() as u64
    }
}

impl Drop for RegionMapping {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `new` and nobody else unmaps it.
        unsafe { libc::munmap(self.address.as_ptr(), self.len.get()) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn only_whole_pages_of_files_are_mapped() {
        let file = File::open("/proc/self/exe").unwrap();
        let mapping = RegionMapping::new(file.as_fd(), 0x1000, 0x1000, false).unwrap();
        assert_eq!((mapping.bytes(), mapping.address() % 0x1000), (0x1000, 0));
        for (offset, len) in [(0, 0), (0, 1), (1, 0x1000), (u64::MAX, 0x1000)] {
            assert!(RegionMapping::new(file.as_fd(), offset, len, false).is_err());
        }
    }

    #[test]
    fn aligned_words_within_are_read() {
        let file = File::open("/proc/self/exe").unwrap();
        let mapping = RegionMapping::new(file.as_fd(), 0, 0x1000, false).unwrap();
        assert_eq!(mapping.read_u32(0), Some(u32::from_le_bytes(*b"\x7fELF")));
        assert!(mapping.read_u32(0xffc).is_some());
        for outside in [1, 0xffe, 0x1000, u64::MAX - 3] {
            assert_eq!(mapping.read_u32(outside), None);
        }
    }
}
