//! The port behind an entropy device.

use std::io;

/// A source of random bytes.
pub trait Entropy: Send + Sync {
    /// Fills a prefix of `buf` and returns its length, at least 1, without waiting.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when the source has nothing now and is worth asking again;
    /// any other error means that it is of no more use.
    fn fill(&self, buf: &mut [u8]) -> io::Result<usize>;
}
