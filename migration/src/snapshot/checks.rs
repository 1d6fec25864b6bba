//! Check sums of the image, so that damage is found where it is read.
//!
//! A chunk's check sum is that of its pages' check sums. So pages that are written anew, one by
//! one, need no reading of their neighbours. They find accidents, not forgeries.

use crate::codec::PAGE;
use crate::page::PAGE_BYTES;

/// Pages per check sum: as much as is read at once when a page is wanted.
pub const CHUNK_PAGES: u64 = CHUNK as u64;

/// The same in bytes.
pub const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_BYTES;

/// The same as [`CHUNK_PAGES`], as a length.
const CHUNK: usize = 16;

/// A chunk of the image is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "memory is damaged: bytes {start} to {end} have check sum {found:#010x} instead of {expected:#010x}"
)]
pub struct DamagedChunk {
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
    /// As computed.
    pub found: u32,
    /// As recorded.
    pub expected: u32,
}

fn of_pages(pages: &[u32]) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    for page in pages {
        hash.update(&page.to_le_bytes());
    }
    hash.finalize()
}

fn of_zero_page() -> u32 {
    crc32fast::hash(&[0; PAGE])
}

/// Check sums of pages as they are written.
#[derive(Clone, Debug)]
pub struct PageChecks(Vec<u32>);

impl PageChecks {
    /// Of an image of `pages` pages, all zeroes.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let pages = usize::try_from(pages).unwrap_or(usize::MAX);
        Self(vec![of_zero_page(); pages])
    }

    /// The page at `position` is `bytes` now.
    pub fn note(&mut self, position: u64, bytes: &[u8]) {
        let index = usize::try_from(position).unwrap_or(usize::MAX);
        if let Some(check) = self.0.get_mut(index) {
            *check = crc32fast::hash(bytes);
        }
    }

    /// The chunks' check sums.
    #[must_use]
    pub fn seal(&self) -> ChunkChecks {
        ChunkChecks(self.0.chunks(CHUNK).map(of_pages).collect())
    }
}

/// Check sums of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkChecks(pub(super) Vec<u32>);

impl ChunkChecks {
    /// Compares chunk `index` with `bytes`, which are the whole chunk.
    ///
    /// # Errors
    /// [`DamagedChunk`].
    pub fn verify(&self, index: u64, bytes: &[u8]) -> Result<(), DamagedChunk> {
        let pages: Vec<_> = bytes.chunks(PAGE).map(crc32fast::hash).collect();
        self.compare(index, &pages)
    }

    /// Compares chunk `index`, of `pages` pages, with zeroes.
    ///
    /// # Errors
    /// [`DamagedChunk`].
    pub fn verify_zero(&self, index: u64, pages: u64) -> Result<(), DamagedChunk> {
        let pages = usize::try_from(pages.min(CHUNK_PAGES)).unwrap_or(CHUNK);
        self.compare(index, &vec![of_zero_page(); pages])
    }

    fn compare(&self, index: u64, pages: &[u32]) -> Result<(), DamagedChunk> {
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        let expected = self.0.get(at).copied().unwrap_or(0);
        let found = of_pages(pages);
        if found == expected && at < self.0.len() {
            return Ok(());
        }
        let start = index.saturating_mul(CHUNK_BYTES);
        Err(DamagedChunk {
            start,
            end: start.saturating_add(pages.len() as u64 * PAGE_BYTES),
            found,
            expected,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_found_and_located() {
        let mut checks = PageChecks::new(20);
        let page = |value: u8| vec![value; PAGE];
        checks.note(3, &page(7));
        checks.note(17, &page(1));
        checks.note(17, &page(9));
        let sealed = checks.seal();
        let mut first = vec![0; CHUNK * PAGE];
        first.splice(3 * PAGE..4 * PAGE, page(7));
        let mut second = vec![0; 4 * PAGE];
        second.splice(PAGE..2 * PAGE, page(9));
        assert_eq!(sealed.verify(0, &first), Ok(()));
        assert_eq!(sealed.verify(1, &second), Ok(()));
        for at in [0, 3 * PAGE, 4 * PAGE - 1, first.len() - 1] {
            first[at] ^= 0x10;
            let error = sealed.verify(0, &first).unwrap_err();
            assert_eq!((error.start, error.end), (0, CHUNK_BYTES), "{at}");
            first[at] ^= 0x10;
        }
        let error = sealed.verify_zero(1, 4).unwrap_err();
        assert_eq!((error.start, error.end), (65_536, 81_920));
        assert!(sealed.verify(0, &second).is_err(), "a chunk elsewhere");
        assert!(sealed.verify(2, &[]).is_err(), "a chunk that is none");
    }

    #[test]
    fn untouched_memory_is_zeroes() {
        let sealed = PageChecks::new(18).seal();
        assert_eq!(sealed.verify_zero(0, 16), Ok(()));
        assert_eq!(sealed.verify_zero(1, 2), Ok(()));
        assert_eq!(sealed.verify(1, &[0; 2 * PAGE]), Ok(()));
        assert!(sealed.verify_zero(1, 16).is_err());
    }
}
