//! From pages to a frame.

use std::ops::Range;

use super::cache::DeltaCache;
use super::{PAGE, delta, is_zero};
use crate::page::{PageIndex, PageRun};
use crate::progress::PageMix;
use crate::wire::batch::{Batch, BatchRun, LZ4_BLOCK_PAGES, PageKind};
use crate::wire::frame::{FrameHeader, FrameKind, HEADER_BYTES};

/// What pages that are not zero are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As they are: the least work.
    Raw,
    /// LZ4 in blocks.
    Lz4,
    /// Changes against the version sent before where it is known, LZ4 otherwise.
    Delta,
}

/// A block that does not get smaller than this many sixteenths of itself travels as it is.
const WORTHWHILE_SIXTEENTHS: usize = 15;

/// After so many blocks in a row that were not worth it ...
const PATIENCE_BLOCKS: u32 = 4;

/// ... only one block of so many is tried.
const PROBE_INTERVAL_BLOCKS: u32 = 16;

/// ... and where whole batches can be left alone, one of so many.
const PROBE_INTERVAL_BATCHES: u32 = 16;

/// Encodes batches of one connection.
pub struct Encoder {
    cache: DeltaCache,
    /// Whether pages that the cache does not know are put there.
    remember: bool,
    /// The same for those that go as they are.
    keep_raw: bool,
    table: Batch,
    /// What follows the table: blocks, then deltas.
    blocks: Vec<u8>,
    deltas: Vec<u8>,
    /// Input of the block that is being made.
    block: Vec<u8>,
    /// Blocks in a row that were not worth it.
    futile_blocks: u32,
    /// Batches since the last one that was tried, see [`Self::expects_nothing`].
    skipped_batches: u32,
}

/// A page's place in the batch and its bytes' place in the buffer.
#[derive(Clone, Copy)]
struct Place {
    at: u16,
    offset: usize,
}

impl Encoder {
    /// An encoder that remembers at most `cache_bytes` of pages.
    #[must_use]
    pub fn new(cache_bytes: u64) -> Self {
        Self {
            cache: DeltaCache::new(cache_bytes),
            remember: false,
            keep_raw: false,
            table: Batch {
                base: PageIndex(0),
                runs: Vec::new(),
                blocks: Vec::new(),
                raw_crc: 0,
            },
            blocks: Vec::new(),
            deltas: Vec::new(),
            block: Vec::with_capacity(LZ4_BLOCK_PAGES * PAGE),
            futile_blocks: 0,
            skipped_batches: 0,
        }
    }

    /// A new round begins; `remember` tells whether its pages are kept for deltas in later ones.
    pub fn begin_round(&mut self, round: u32, remember: bool) {
        self.cache.begin_round(round);
        self.remember = remember;
    }

    /// Whether pages that are to go as they are ([`Encoding::Raw`]) are kept, too.
    pub fn keep_raw(&mut self, keep: bool) {
        self.keep_raw = keep;
    }

    /// Whether this round keeps pages that go as they are.
    #[must_use]
    pub fn keeps_raw(&self) -> bool {
        self.remember && self.keep_raw
    }

    /// Bytes that the cache holds.
    #[must_use]
    pub fn cache_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Whether an older version of any page of `runs` is known.
    #[must_use]
    pub fn knows_any(&self, runs: &[PageRun]) -> bool {
        let mut pages = runs.iter().flat_map(|run| run.start.0..run.end().0);
        self.cache.bytes() > 0 && pages.any(|page| self.cache.contains(PageIndex(page)))
    }

    /// Whether trying to make pages smaller of which no older version is known is not worth it: the
    /// last ones did not get smaller. Now and then it says no all the same, to see whether that is
    /// still so.
    pub fn expects_nothing(&mut self) -> bool {
        if self.futile_blocks < PATIENCE_BLOCKS {
            return false;
        }
        self.skipped_batches = (self.skipped_batches + 1) % PROBE_INTERVAL_BATCHES;
        if self.skipped_batches == 0 {
            self.futile_blocks = self.futile_blocks.next_multiple_of(PROBE_INTERVAL_BLOCKS);
        }
        self.skipped_batches != 0
    }

    /// Encodes the pages of `runs`, whose contents lie one after the other in `pages`, and of
    /// `zeroes`, as a frame appended to `out`. The frame is to be followed by the returned ranges
    /// of `pages`.
    ///
    /// All runs lie within 64 pages from `base`.
    pub fn encode(
        &mut self,
        base: PageIndex,
        (runs, pages): (&[PageRun], &[u8]),
        zeroes: &[PageRun],
        encoding: Encoding,
        out: &mut Vec<u8>,
    ) -> (PageMix, Vec<Range<usize>>) {
        self.table.base = base;
        self.table.blocks.clear();
        self.blocks.clear();
        self.deltas.clear();
        let mut kinds = [None; 64];
        for run in zeroes {
            for page in run.start.0..run.end().0 {
                self.cache.remove(PageIndex(page));
                set(&mut kinds, offset_in_batch(base, page), PageKind::Zero);
            }
        }
        let mut waiting = Vec::new();
        let numbers = runs.iter().flat_map(|run| run.start.0..run.end().0);
        for ((number, bytes), offset) in numbers
            .zip(pages.as_chunks::<PAGE>().0)
            .zip((0..).step_by(PAGE))
        {
            let at = offset_in_batch(base, number);
            let kind = self.classify(PageIndex(number), bytes, encoding);
            if kind == PageKind::Lz4 {
                waiting.push(Place { at, offset });
            }
            set(&mut kinds, at, kind);
        }
        self.compress(&waiting, pages, &mut kinds);
        let raw = raw_ranges(runs, base, &kinds);
        let counts = self.finish(&kinds, (&raw, pages), out);
        (counts, raw)
    }

    /// The frame, appended to `out`, of pages that are to follow it straight out of memory
    /// ([`PageKind::Live`]), and of `zeroes`. What is sent of them is not known, so no later
    /// version can be told by its changes.
    ///
    /// All runs lie within 64 pages from `base`.
    pub fn encode_live(
        &mut self,
        base: PageIndex,
        live: &[PageRun],
        zeroes: &[PageRun],
        out: &mut Vec<u8>,
    ) -> PageMix {
        self.table.base = base;
        self.table.blocks.clear();
        self.blocks.clear();
        self.deltas.clear();
        let mut kinds = [None; 64];
        for (runs, kind) in [(live, PageKind::Live), (zeroes, PageKind::Zero)] {
            for page in runs.iter().flat_map(|run| run.start.0..run.end().0) {
                if self.cache.bytes() > 0 {
                    self.cache.remove(PageIndex(page));
                }
                set(&mut kinds, offset_in_batch(base, page), kind);
            }
        }
        self.finish(&kinds, (&[], &[]), out)
    }

    fn classify(&mut self, page: PageIndex, bytes: &[u8; PAGE], encoding: Encoding) -> PageKind {
        let known = self.cache.contains(page);
        if is_zero(bytes) {
            self.cache.remove(page);
            return PageKind::Zero;
        }
        let mut kind = match encoding {
            Encoding::Raw => PageKind::Raw,
            Encoding::Lz4 | Encoding::Delta => PageKind::Lz4,
        };
        if encoding == Encoding::Delta
            && let Some(old) = self.cache.get(page)
        {
            let start = self.deltas.len();
            self.deltas.extend_from_slice(&[0; 2]);
            if delta::encode(old, bytes, &mut self.deltas) {
                let length = u16::try_from(self.deltas.len() - start - 2).unwrap_or(0);
                if let Some(place) = self.deltas.get_mut(start..start + 2) {
                    place.copy_from_slice(&length.to_le_bytes());
                }
                kind = PageKind::Delta;
            } else {
                self.deltas.truncate(start);
            }
        }
        match encoding {
            Encoding::Delta if known || self.remember => self.cache.put(page, bytes),
            Encoding::Raw if self.keep_raw && (known || self.remember) => {
                self.cache.put(page, bytes);
            }
            // What the cache has is no longer what the destination has.
            _ if known => self.cache.remove(page),
            _ => {}
        }
        kind
    }

    /// Makes blocks of the waiting pages; those that are not worth it become raw.
    fn compress(&mut self, waiting: &[Place], pages: &[u8], kinds: &mut [Option<PageKind>; 64]) {
        for places in waiting.chunks(LZ4_BLOCK_PAGES) {
            let futile = self.futile_blocks;
            let skipped =
                futile >= PATIENCE_BLOCKS && !futile.is_multiple_of(PROBE_INTERVAL_BLOCKS);
            let worthwhile = !skipped && self.compress_block(places, pages);
            if worthwhile {
                self.futile_blocks = 0;
            } else {
                self.futile_blocks = futile.wrapping_add(1);
                for place in places {
                    set(kinds, place.at, PageKind::Raw);
                }
            }
        }
    }

    fn compress_block(&mut self, places: &[Place], pages: &[u8]) -> bool {
        self.block.clear();
        for place in places {
            let page = pages.get(place.offset..place.offset + PAGE);
            self.block.extend_from_slice(page.unwrap_or_default());
        }
        let start = self.blocks.len();
        let room = lz4_flex::block::get_maximum_output_size(self.block.len());
        self.blocks.resize(start + room, 0);
        let target = self.blocks.get_mut(start..).unwrap_or_default();
        let length = lz4_flex::block::compress_into(&self.block, target).unwrap_or(usize::MAX);
        let worthwhile = length < self.block.len() / 16 * WORTHWHILE_SIXTEENTHS;
        self.blocks.truncate(match worthwhile {
            true => start + length,
            false => start,
        });
        if worthwhile {
            self.table
                .blocks
                .push(u32::try_from(length).unwrap_or(u32::MAX));
        }
        worthwhile
    }

    fn finish(
        &mut self,
        kinds: &[Option<PageKind>; 64],
        (raw, pages): (&[Range<usize>], &[u8]),
        out: &mut Vec<u8>,
    ) -> PageMix {
        let mut crc = crc32fast::Hasher::new();
        for range in raw {
            crc.update(pages.get(range.clone()).unwrap_or_default());
        }
        self.table.raw_crc = crc.finalize();
        let mut counts = PageMix::default();
        self.table.runs.clear();
        for (kind, at) in kinds.iter().zip(0_u16..) {
            let Some(kind) = *kind else { continue };
            match kind {
                PageKind::Zero => counts.zero += 1,
                PageKind::Raw | PageKind::Live => counts.raw += 1,
                PageKind::Lz4 => counts.lz4 += 1,
                PageKind::Delta => counts.delta += 1,
            }
            match self.table.runs.last_mut() {
                Some(run) if run.kind == kind && run.start + run.count == at => run.count += 1,
                _ => self.table.runs.push(BatchRun {
                    kind,
                    start: at,
                    count: 1,
                }),
            }
        }
        let start = out.len();
        out.extend_from_slice(&[0; HEADER_BYTES]);
        self.table.encode(out);
        out.extend_from_slice(&self.blocks);
        out.extend_from_slice(&self.deltas);
        let payload = out.get(start + HEADER_BYTES..).unwrap_or_default();
        let header = FrameHeader::of(FrameKind::Pages, payload)
            .expect("64 pages, none longer than it was, are shorter than the limit");
        if let Some(place) = out.get_mut(start..start + HEADER_BYTES) {
            place.copy_from_slice(&header.encode());
        }
        counts
    }
}

fn offset_in_batch(base: PageIndex, page: u64) -> u16 {
    u16::try_from(page - base.0).unwrap_or(u16::MAX)
}

fn set(kinds: &mut [Option<PageKind>; 64], at: u16, kind: PageKind) {
    if let Some(place) = kinds.get_mut(usize::from(at)) {
        *place = Some(kind);
    }
}

/// Where the raw pages lie in the buffer, neighbours joined.
fn raw_ranges(
    runs: &[PageRun],
    base: PageIndex,
    kinds: &[Option<PageKind>; 64],
) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let numbers = runs.iter().flat_map(|run| run.start.0..run.end().0);
    for (number, offset) in numbers.zip((0..).step_by(PAGE)) {
        let at = usize::from(offset_in_batch(base, number));
        if kinds.get(at) != Some(&Some(PageKind::Raw)) {
            continue;
        }
        match ranges.last_mut() {
            Some(range) if range.end == offset => range.end += PAGE,
            _ => ranges.push(offset..offset + PAGE),
        }
    }
    ranges
}
