//! From a frame to pages.

use std::io::Read;

use super::{BATCH_BYTES, PAGE, delta};
use crate::bitmap::DirtyBitmap;
use crate::page::{PageIndex, PageRun};
use crate::ports::{Channel, PageStore, PortError};
use crate::wire::batch::{BATCH_PAGES, Batch, LZ4_BLOCK_PAGES, PageKind};
use crate::wire::frame::{FrameError, FrameReader};

/// Pages could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The frame is damaged or not valid.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The pages are not guest memory.
    #[error(transparent)]
    Memory(#[from] PortError),
}

impl DecodeError {
    /// The connection broke: what has come of it is right, and the rest may come on another.
    #[must_use]
    pub fn is_broken_link(&self) -> bool {
        matches!(self, Self::Frame(FrameError::Io(_) | FrameError::Closed))
    }
}

fn invalid(text: impl Into<String>) -> DecodeError {
    FrameError::Invalid(format!("Pages: {}", text.into())).into()
}

/// Decodes batches of one connection into guest memory.
pub struct Decoder {
    /// Pages that were written, by region: the others are still holes.
    written: Vec<DirtyBitmap>,
    /// Pages of the batch on their way; never gets shorter, so that it is not cleared each time.
    buffer: Vec<u8>,
}

impl Decoder {
    /// A decoder into memory of these regions, which nobody has touched yet.
    #[must_use]
    pub fn new(regions: &[PageRun]) -> Self {
        let bitmap = |region: &PageRun| DirtyBitmap::new(region.start, region.count);
        Self {
            written: regions.iter().map(bitmap).collect(),
            buffer: vec![0; BATCH_BYTES],
        }
    }

    /// A decoder into memory of which nothing is known: zeroes are written, too.
    #[must_use]
    pub fn into_used(regions: &[PageRun]) -> Self {
        let mut decoder = Self::new(regions);
        decoder.written.iter_mut().for_each(DirtyBitmap::fill);
        decoder
    }

    /// Takes over the batch of `payload`; its raw pages follow in `reader`. Returns how many pages
    /// came.
    ///
    /// # Errors
    /// [`DecodeError`]; memory is then of no use.
    pub fn decode(
        &mut self,
        payload: &[u8],
        (reader, from): (&mut FrameReader, &mut (impl Read + ?Sized)),
        store: &dyn PageStore,
    ) -> Result<u64, DecodeError> {
        let batch = self.take_payload(payload, store)?;
        for kind in [PageKind::Raw, PageKind::Live] {
            self.take_behind(&batch, kind, (reader, from), store)?;
        }
        Ok(batch.pages())
    }

    /// The same from a connection: live pages go from its socket to memory where both can.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_from(
        &mut self,
        payload: &[u8],
        (reader, channel): (&mut FrameReader, &mut (impl Channel + ?Sized)),
        store: &dyn PageStore,
    ) -> Result<u64, DecodeError> {
        let batch = self.take_payload(payload, store)?;
        self.take_behind(&batch, PageKind::Raw, (reader, channel), store)?;
        let direct = store.direct().filter(|memory| memory.prefers_receive());
        match (direct, channel.socket()) {
            (Some(memory), Some(socket)) if reader.is_drained() => {
                let runs: Vec<_> = batch.page_runs(PageKind::Live).collect();
                for run in &runs {
                    self.region_of(*run)?.insert(*run);
                }
                memory.receive(&runs, socket).map_err(FrameError::Io)?;
            }
            _ => self.take_behind(&batch, PageKind::Live, (reader, channel), store)?,
        }
        Ok(batch.pages())
    }

    /// What is in the frame itself.
    fn take_payload(
        &mut self,
        payload: &[u8],
        store: &dyn PageStore,
    ) -> Result<Batch, DecodeError> {
        let (batch, rest) = Batch::decode(payload)?;
        let rest = self.take_blocks(&batch, rest, store)?;
        self.take_deltas(&batch, rest, store)?;
        self.take_zeroes(&batch, store)?;
        Ok(batch)
    }

    fn region_of(&mut self, run: PageRun) -> Result<&mut DirtyBitmap, PortError> {
        let region = self.written.iter_mut().find(|region| contains(region, run));
        region.ok_or(PortError::OutsideMemory {
            start: run.start.0,
            end: run.end().0,
        })
    }

    fn take_blocks<'a>(
        &mut self,
        batch: &Batch,
        mut rest: &'a [u8],
        store: &dyn PageStore,
    ) -> Result<&'a [u8], DecodeError> {
        let mut left = batch.pages_of(PageKind::Lz4);
        let bytes = left * PAGE;
        let mut target = self.buffer.get_mut(..bytes).unwrap_or_default();
        for length in &batch.blocks {
            let pages = left.min(LZ4_BLOCK_PAGES);
            let (block, after) = rest
                .split_at_checked(*length as usize)
                .ok_or_else(|| invalid("an LZ4 block is cut short"))?;
            let (out, others) = target
                .split_at_mut_checked(pages * PAGE)
                .unwrap_or_default();
            let unpacked = lz4_flex::block::decompress_into(block, out)
                .map_err(|error| invalid(format!("an LZ4 block: {error}")))?;
            if unpacked != pages * PAGE {
                return Err(invalid(format!("an LZ4 block of {unpacked} bytes")));
            }
            (rest, target, left) = (after, others, left - pages);
        }
        let mut bytes = self.buffer.get(..bytes).unwrap_or_default();
        for run in batch.page_runs(PageKind::Lz4) {
            let (pages, others) = bytes.split_at_checked(length(run)).unwrap_or_default();
            store.write(run, pages)?;
            mark(&mut self.written, run);
            bytes = others;
        }
        Ok(rest)
    }

    fn take_deltas(
        &mut self,
        batch: &Batch,
        mut rest: &[u8],
        store: &dyn PageStore,
    ) -> Result<(), DecodeError> {
        let cut = || invalid("a delta is cut short");
        let mut page = [0; PAGE];
        for run in batch.page_runs(PageKind::Delta) {
            for number in run.start.0..run.end().0 {
                let (length, after) = rest.split_first_chunk().ok_or_else(cut)?;
                let length = usize::from(u16::from_le_bytes(*length));
                let (bytes, after) = after.split_at_checked(length).ok_or_else(cut)?;
                rest = after;
                let at = PageRun {
                    start: PageIndex(number),
                    count: 1,
                };
                store.read(at, &mut page)?;
                delta::apply(&mut page, bytes).map_err(|error| invalid(error.to_string()))?;
                store.write(at, &page)?;
                mark(&mut self.written, at);
            }
        }
        match rest.len() {
            0 => Ok(()),
            more => Err(invalid(format!("{more} bytes behind its end"))),
        }
    }

    /// Memory that nobody has written reads as zeroes already, and stays a hole.
    fn take_zeroes(&mut self, batch: &Batch, store: &dyn PageStore) -> Result<(), DecodeError> {
        for run in batch.page_runs(PageKind::Zero) {
            let used: Vec<_> = self.region_of(run)?.runs_within(run).collect();
            for used in used {
                let zeroes = self.buffer.get_mut(..length(used)).unwrap_or_default();
                zeroes.fill(0);
                store.write(used, zeroes)?;
            }
        }
        Ok(())
    }

    /// Pages of one kind behind the frame.
    fn take_behind(
        &mut self,
        batch: &Batch,
        kind: PageKind,
        (reader, from): (&mut FrameReader, &mut (impl Read + ?Sized)),
        store: &dyn PageStore,
    ) -> Result<(), DecodeError> {
        let pages = batch.pages_of(kind);
        if pages == 0 {
            return Ok(());
        }
        let mut bytes = self.buffer.get_mut(..pages * PAGE).unwrap_or_default();
        reader.read_raw(from, bytes)?;
        if kind == PageKind::Raw {
            check(bytes, batch.raw_crc)?;
        }
        for run in batch.page_runs(kind) {
            let (pages, others) = bytes.split_at_mut_checked(length(run)).unwrap_or_default();
            store.write(run, pages)?;
            mark(&mut self.written, run);
            bytes = others;
        }
        Ok(())
    }
}

fn check(pages: &[u8], expected: u32) -> Result<(), FrameError> {
    let found = crc32fast::hash(pages);
    match found == expected {
        true => Ok(()),
        false => Err(FrameError::Damaged {
            what: "pages",
            found,
            expected,
        }),
    }
}

/// Bytes of a run within a batch.
fn length(run: PageRun) -> usize {
    debug_assert!(run.count <= BATCH_PAGES);
    usize::try_from(run.bytes()).unwrap_or(usize::MAX)
}

fn contains(region: &DirtyBitmap, run: PageRun) -> bool {
    let end = region.base().0 + region.pages();
    region.base() <= run.start && run.end().0 <= end
}

fn mark(written: &mut [DirtyBitmap], run: PageRun) {
    let region = written.iter_mut().find(|region| contains(region, run));
    if let Some(region) = region {
        region.insert(run);
    }
}
