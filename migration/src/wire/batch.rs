//! Frames of pages.
//!
//! The payload: first page (u64), number of runs (u16), number of LZ4 blocks (u16), check sum of
//! the raw pages (u32); then per run its kind (u8), a zero (u8), its start as a distance from the
//! first page (u16) and its count (u16); then the length of each LZ4 block (u32); then the LZ4
//! blocks; then per delta page its length (u16) and the delta. All little-endian. The raw pages
//! follow the frame, and the live ones those.
//!
//! An LZ4 block holds [`LZ4_BLOCK_PAGES`] of the batch's LZ4 pages in order, wherever they lie;
//! the last one holds the rest.

use super::frame::FrameError;
use crate::page::{PageIndex, PageRun};

/// Pages in one batch at most.
pub const BATCH_PAGES: u64 = 64;

/// Pages in one LZ4 block: LZ4 looks back 64 KiB.
pub const LZ4_BLOCK_PAGES: usize = 16;

/// Bytes before the runs.
const FIXED_BYTES: usize = 16;
const RUN_BYTES: usize = 6;

/// How a page travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageKind {
    /// All zeroes: nothing follows.
    Zero = 0,
    /// As it is, behind the frame.
    Raw = 1,
    /// In an LZ4 block.
    Lz4 = 2,
    /// As changes against the version that was sent before.
    Delta = 3,
    /// As it is, behind the frame, too, but straight out of the memory of a guest that may be
    /// writing to it: no check sum holds for it. From version 2 on.
    Live = 4,
}

/// Pages in a row that travel alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRun {
    /// How.
    pub kind: PageKind,
    /// Distance from the batch's first page.
    pub start: u16,
    /// How many, at least 1.
    pub count: u16,
}

/// The table of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The page that runs count from.
    pub base: PageIndex,
    /// Ascending, not overlapping, within [`BATCH_PAGES`].
    pub runs: Vec<BatchRun>,
    /// Bytes of each LZ4 block.
    pub blocks: Vec<u32>,
    /// CRC-32 of the raw pages, 0 when there are none.
    pub raw_crc: u32,
}

impl Batch {
    /// Pages of one kind.
    #[must_use]
    pub fn pages_of(&self, kind: PageKind) -> usize {
        let runs = self.runs.iter().filter(|run| run.kind == kind);
        runs.map(|run| usize::from(run.count)).sum()
    }

    /// All pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.count)).sum()
    }

    /// Pages that follow the frame.
    #[must_use]
    pub fn pages_behind(&self) -> usize {
        self.pages_of(PageKind::Raw) + self.pages_of(PageKind::Live)
    }

    /// Runs of one kind as pages of guest memory.
    pub fn page_runs(&self, kind: PageKind) -> impl Iterator<Item = PageRun> {
        let runs = self.runs.iter().filter(move |run| run.kind == kind);
        runs.map(|run| PageRun {
            start: PageIndex(self.base.0 + u64::from(run.start)),
            count: u64::from(run.count),
        })
    }

    /// Appends the table to a payload; blocks and deltas come after it.
    pub fn encode(&self, payload: &mut Vec<u8>) {
        let count = |length: usize| u16::try_from(length).unwrap_or(u16::MAX).to_le_bytes();
        payload.extend_from_slice(&self.base.0.to_le_bytes());
        payload.extend_from_slice(&count(self.runs.len()));
        payload.extend_from_slice(&count(self.blocks.len()));
        payload.extend_from_slice(&self.raw_crc.to_le_bytes());
        for run in &self.runs {
            payload.extend_from_slice(&[run.kind as u8, 0]);
            payload.extend_from_slice(&run.start.to_le_bytes());
            payload.extend_from_slice(&run.count.to_le_bytes());
        }
        for block in &self.blocks {
            payload.extend_from_slice(&block.to_le_bytes());
        }
    }

    /// Reads a table; returns it with what follows it in the payload.
    ///
    /// # Errors
    /// [`FrameError::Invalid`] for whatever a batch cannot be.
    pub fn decode(payload: &[u8]) -> Result<(Self, &[u8]), FrameError> {
        let invalid = |text: &str| FrameError::Invalid(format!("Pages: {text}"));
        let short = || invalid("its table is cut short");
        let (fixed, rest) = payload
            .split_first_chunk::<FIXED_BYTES>()
            .ok_or_else(short)?;
        let [b0, b1, b2, b3, b4, b5, b6, b7, r0, r1, k0, k1, c @ ..] = *fixed;
        let base = PageIndex(u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]));
        if PageRun::new(base, BATCH_PAGES).is_none() {
            return Err(invalid(
                "its first page is past the end of the address space",
            ));
        }
        let run_count = usize::from(u16::from_le_bytes([r0, r1]));
        let block_count = usize::from(u16::from_le_bytes([k0, k1]));
        let (table, rest) = rest
            .split_at_checked(run_count * RUN_BYTES)
            .ok_or_else(short)?;
        let runs = decode_runs(table)?;
        let (lengths, rest) = rest.split_at_checked(block_count * 4).ok_or_else(short)?;
        let blocks = lengths.as_chunks::<4>().0.iter();
        let batch = Self {
            base,
            runs,
            blocks: blocks.map(|bytes| u32::from_le_bytes(*bytes)).collect(),
            raw_crc: u32::from_le_bytes(c),
        };
        let wanted = batch.pages_of(PageKind::Lz4).div_ceil(LZ4_BLOCK_PAGES);
        if batch.blocks.len() != wanted {
            let found = batch.blocks.len();
            let text = format!("{found} LZ4 blocks, its pages fill {wanted}");
            return Err(invalid(&text));
        }
        Ok((batch, rest))
    }
}

fn decode_runs(table: &[u8]) -> Result<Vec<BatchRun>, FrameError> {
    let mut runs = Vec::with_capacity(table.len() / RUN_BYTES);
    let mut next = 0;
    for bytes in table.as_chunks::<RUN_BYTES>().0 {
        let [kind, zero, s0, s1, c0, c1] = *bytes;
        let start = u16::from_le_bytes([s0, s1]);
        let count = u16::from_le_bytes([c0, c1]);
        let kind = match (kind, zero) {
            (0, 0) => PageKind::Zero,
            (1, 0) => PageKind::Raw,
            (2, 0) => PageKind::Lz4,
            (3, 0) => PageKind::Delta,
            (4, 0) => PageKind::Live,
            _ => {
                let text = format!("Pages: a run of kind {kind}/{zero}");
                return Err(FrameError::Invalid(text));
            }
        };
        let end = u64::from(start) + u64::from(count);
        if count == 0 || u64::from(start) < next || end > BATCH_PAGES {
            let text = format!("Pages: a run of {count} pages at {start} behind {next}");
            return Err(FrameError::Invalid(text));
        }
        next = end;
        runs.push(BatchRun { kind, start, count });
    }
    Ok(runs)
}
