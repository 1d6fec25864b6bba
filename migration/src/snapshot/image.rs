//! A snapshot's image of memory as it grows.

use std::io;
use std::ops::Range;

use super::checks::PageChecks;
use super::layout::ImageLayout;
use super::take::TakeError;
use crate::bitmap::DirtyBitmap;
use crate::codec::{PAGE, is_zero};
use crate::page::{PAGE_BYTES, PageIndex, PageRun};
use crate::ports::PageStore;

/// Where a snapshot is written to.
pub trait Image {
    /// Writes `bytes` of memory, which is all zeroes at first, at `offset`.
    ///
    /// # Errors
    /// The host's refusal.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Writes the next `bytes` of a device's state: of that whose record has this number.
    ///
    /// # Errors
    /// The host's refusal.
    fn append(&mut self, device: usize, bytes: &[u8]) -> io::Result<()>;
}

/// The image as it grows.
pub(super) struct Writer<'a> {
    pub(super) image: &'a mut dyn Image,
    pub(super) layout: ImageLayout,
    pub(super) checks: PageChecks,
    /// Pages that the image has as something else than a hole, by region.
    written: Vec<DirtyBitmap>,
    pub(super) written_bytes: u64,
    /// Of the batch at hand.
    buffer: Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Of memory that is laid out so.
    pub(super) fn new(image: &'a mut dyn Image, layout: ImageLayout) -> Self {
        let bitmap = |region: PageRun| DirtyBitmap::new(region.start, region.count);
        Self {
            checks: PageChecks::new(layout.pages()),
            written: layout.regions().into_iter().map(bitmap).collect(),
            layout,
            image,
            written_bytes: 0,
            buffer: Vec::new(),
        }
    }

    /// Reads a run and writes it.
    pub(super) fn copy(
        &mut self,
        pages: &dyn PageStore,
        run: PageRun,
        is_data: bool,
    ) -> Result<(), TakeError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let length = usize::try_from(run.bytes()).unwrap_or(usize::MAX);
        buffer.resize(length, 0);
        match is_data {
            true => pages.read(run, &mut buffer)?,
            false => buffer.fill(0),
        }
        let stored = self.store(run, &buffer);
        self.buffer = buffer;
        stored
    }

    /// Writes a run within one region. What is zero, and was never anything else, stays a hole.
    pub(super) fn store(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), TakeError> {
        let Some(first) = self.layout.position(run.start) else {
            return Ok(());
        };
        let holds = |written: &&mut DirtyBitmap| {
            let end = written.base().0 + written.pages();
            (written.base().0..end).contains(&run.start.0)
        };
        let Some(written) = self.written.iter_mut().find(holds) else {
            return Ok(());
        };
        // Neighbours that are to be written, as a range of pages within the run.
        let mut pending: Range<usize> = 0..0;
        for (page, index) in bytes.chunks(PAGE).zip(0_usize..) {
            let number = PageIndex(run.start.0 + index as u64);
            if is_zero(page) && !written.contains(number) {
                continue;
            }
            self.checks.note(first + index as u64, page);
            written.insert(PageRun {
                start: number,
                count: 1,
            });
            if pending.end != index {
                flush(self.image, first, pending, bytes, &mut self.written_bytes)?;
                pending = index..index;
            }
            pending.end = index + 1;
        }
        flush(self.image, first, pending, bytes, &mut self.written_bytes)
    }
}

/// Writes the pages `range` of a run that begins at position `first`.
fn flush(
    image: &mut dyn Image,
    first: u64,
    range: Range<usize>,
    bytes: &[u8],
    written_bytes: &mut u64,
) -> Result<(), TakeError> {
    let part = bytes.get(range.start * PAGE..range.end * PAGE);
    let part = part.unwrap_or_default();
    if part.is_empty() {
        return Ok(());
    }
    let offset = (first + range.start as u64) * PAGE_BYTES;
    image.write(offset, part).map_err(TakeError::Image)?;
    *written_bytes += part.len() as u64;
    Ok(())
}
