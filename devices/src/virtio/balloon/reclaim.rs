//! The port through which memory goes back to the host.

use std::io;

use vm_memory::GuestAddress;

/// Frees host memory behind guest RAM.
pub trait RamReclaim: Send + Sync {
    /// Size of the pages that back RAM, a power of two of at least 4096. Only whole ones can be
    /// freed.
    fn page_bytes(&self) -> u64;

    /// Frees the whole pages within `len` bytes from `start`; they read as zeroes afterwards and
    /// count as written for a migration. Returns how many bytes were freed, or were free.
    ///
    /// # Errors
    /// The range is not RAM, or the host's answer.
    fn discard(&self, start: GuestAddress, len: u64) -> io::Result<u64>;
}
