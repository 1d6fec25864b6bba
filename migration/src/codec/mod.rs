//! Pages as bytes: what makes them fewer, and what undoes it.
//!
//! | module | what is in it |
//! |---|---|
//! | [`adapt`] | which encoding suits link and CPU |
//! | [`delta`] | changes of a page against its version sent before |
//! | [`cache`] | the versions sent before, in bounded memory |
//! | [`encoder`] | classifies the pages of a batch and encodes them |
//! | [`decoder`] | the other way, from a peer that may lie |

pub mod adapt;
pub mod cache;
pub mod decoder;
pub mod delta;
pub mod encoder;

pub use adapt::{Adaptive, BatchFacts};
pub use cache::DeltaCache;
pub use decoder::{DecodeError, Decoder};
pub use encoder::{Encoder, Encoding};

/// [`crate::PAGE_BYTES`] as a length.
pub(crate) const PAGE: usize = 4096;

/// Bytes of a batch's pages at most.
pub(crate) const BATCH_BYTES: usize = 64 * PAGE;
const _: () = assert!(BATCH_BYTES as u64 == crate::wire::batch::BATCH_PAGES * crate::PAGE_BYTES);

/// Whether a page is all zeroes.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    let (chunks, rest) = page.as_chunks::<64>();
    let is_clear = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all | byte) == 0;
    // The first words settle nearly every page that is not.
    chunks.iter().all(|chunk| is_clear(chunk)) && is_clear(rest)
}
