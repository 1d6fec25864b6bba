//! Where frames begin in a stream of bytes.

use crate::wire::batch::Batch;
use crate::wire::frame::{FrameHeader, FrameKind, HEADER_BYTES};

/// [`crate::PAGE_BYTES`] as a length.
const PAGE: usize = 4096;

/// Follows a stream of frames byte by byte. Raw pages count as part of their frame.
#[derive(Debug, Default)]
pub(super) struct FrameCounter {
    frame: u32,
    offset: usize,
    /// Header and payload so far.
    bytes: Vec<u8>,
    /// Bytes of the frame, as far as is known.
    length: Option<usize>,
    /// Whether they include the raw pages.
    is_whole: bool,
}

impl FrameCounter {
    /// The place of the byte that comes next: its frame and its offset there.
    pub(super) fn place(&self) -> (u32, usize) {
        (self.frame, self.offset)
    }

    pub(super) fn step(&mut self, byte: u8) {
        self.offset += 1;
        if !self.is_whole {
            self.bytes.push(byte);
        }
        if self.offset == HEADER_BYTES {
            let header = self.header();
            self.length = header.map(|header| HEADER_BYTES + header.payload_bytes as usize);
        }
        if self.length == Some(self.offset) && !self.is_whole {
            self.length = Some(self.offset + self.raw_bytes());
            self.is_whole = true;
        }
        if self.length == Some(self.offset) {
            *self = Self {
                frame: self.frame + 1,
                ..Self::default()
            };
        }
    }

    fn header(&self) -> Option<FrameHeader> {
        FrameHeader::decode(self.bytes.first_chunk()?).ok()
    }

    /// Bytes of pages that follow the payload.
    fn raw_bytes(&self) -> usize {
        let is_pages = |header: FrameHeader| header.kind == FrameKind::Pages;
        if !self.header().is_some_and(is_pages) {
            return 0;
        }
        let payload = self.bytes.get(HEADER_BYTES..).unwrap_or_default();
        let batch = Batch::decode(payload);
        batch.map_or(0, |(batch, _)| batch.pages_behind() * PAGE)
    }
}
