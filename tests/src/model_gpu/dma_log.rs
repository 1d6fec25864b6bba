//! The log of what the device writes to guest memory: `VFIO_USER_DEVICE_FEATURE` with
//! `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, `STOP` and `REPORT`.
//!
//! It is the client's, as mappings and interrupts are: a reset leaves it on. A page is noted once its write
//! is done, by the same thread and before anybody else has a turn, so that a write that a client can see is
//! in the next report.

use std::collections::BTreeSet;
use std::ops::Range;

use rustix::io::Errno;

use super::migration::{FEATURE_MASK, GET, SET, reply};
use super::wire::{Fields, TRANSFER_MAX};

/// Bytes of the pages that it logs by, whatever is asked for.
const PAGE: u64 = 4096;
/// Ranges that it logs: as many as the kernel takes.
const RANGES_MAX: u32 = 256;
/// Pages in a word of a bitmap, and their number's bits.
const WORD_BITS: u64 = 64;
const WORD_BYTES: u64 = 8;
/// Bytes before a report's bitmap.
const HEAD_BYTES: u64 = 32;

// `struct vfio_device_feature`, what can be asked with it.
pub(super) const START: u32 = 6;
pub(super) const STOP: u32 = 7;
pub(super) const REPORT: u32 = 8;

/// How well a device keeps the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DmaLogging {
    /// As it should.
    #[default]
    On,
    /// It has none.
    Off,
    /// It loses writes: those to every second page, the ones with odd numbers.
    Lossy,
}

/// The log.
#[derive(Debug)]
pub(super) struct Log {
    kind: DmaLogging,
    started: Option<Started>,
}

#[derive(Debug)]
struct Started {
    /// Empty: all addresses.
    ranges: Vec<Range<u64>>,
    /// Numbers of pages. Each was written, so there are no more than guest memory has.
    written: BTreeSet<u64>,
}

impl Started {
    fn has(&self, page: u64) -> bool {
        let within = |range: &Range<u64>| range.contains(&(page * PAGE));
        self.ranges.is_empty() || self.ranges.iter().any(within)
    }
}

impl Log {
    pub(super) fn new(kind: DmaLogging) -> Self {
        Self {
            kind,
            started: None,
        }
    }

    /// What can be asked of a feature; 0 where there is none.
    pub(super) fn can(&self, feature: u32) -> u32 {
        match feature {
            _ if self.kind == DmaLogging::Off => 0,
            START | STOP => SET,
            REPORT => GET,
            _ => 0,
        }
    }

    /// Ends it for a client that has left.
    pub(super) fn forget(&mut self) {
        self.started = None;
    }

    /// Notes that bytes were written, of which there are some.
    pub(super) fn note(&mut self, address: u64, len: usize) {
        let Some(started) = &mut self.started else {
            return;
        };
        let last = address.saturating_add((len as u64).saturating_sub(1));
        for page in address / PAGE..=last / PAGE {
            let is_lost = self.kind == DmaLogging::Lossy && page % 2 == 1;
            if started.has(page) && !is_lost {
                started.written.insert(page);
            }
        }
    }

    /// Answers a message that asks for one of the features, with no more bytes than it has room for.
    pub(super) fn answer(
        &mut self,
        room: u32,
        flags: u32,
        fields: Fields<'_>,
    ) -> Result<Vec<u8>, Errno> {
        match flags & FEATURE_MASK {
            START => self.start(flags, fields),
            // Without data, and none to end.
            STOP if self.started.take().is_some() => Ok(reply(flags, &[])),
            REPORT => self.report(room, flags, fields),
            _ => Err(Errno::INVAL),
        }
    }

    fn start(&mut self, flags: u32, mut fields: Fields<'_>) -> Result<Vec<u8>, Errno> {
        let (page_size, count, reserved) = (fields.u64()?, fields.u32()?, fields.u32()?);
        if count > RANGES_MAX {
            return Err(Errno::TOOBIG);
        }
        if !page_size.is_power_of_two() || self.started.is_some() {
            return Err(Errno::INVAL);
        }
        let told = fields.rest();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for _ in 0..count {
            let (start, len) = (fields.u64()?, fields.u64()?);
            let end = start.checked_add(len).ok_or(Errno::OVERFLOW)?;
            let is_paged = start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
            let overlaps = |other: &Range<u64>| start < other.end && other.start < end;
            if len == 0 || !is_paged || ranges.iter().any(overlaps) {
                return Err(Errno::INVAL);
            }
            ranges.push(start..end);
        }
        if !fields.rest().is_empty() {
            return Err(Errno::INVAL);
        }
        self.started = Some(Started {
            ranges,
            written: BTreeSet::new(),
        });
        let words = [&count.to_le_bytes()[..], &reserved.to_le_bytes()].concat();
        let body = [&PAGE.to_le_bytes()[..], &words, told].concat();
        Ok(reply(flags, &body))
    }

    fn report(&mut self, room: u32, flags: u32, mut fields: Fields<'_>) -> Result<Vec<u8>, Errno> {
        let (iova, len, page_size) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let started = self.started.as_mut().ok_or(Errno::INVAL)?;
        let end = iova.checked_add(len).ok_or(Errno::OVERFLOW)?;
        let is_paged = iova.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
        if page_size < PAGE || !page_size.is_power_of_two() || !is_paged {
            return Err(Errno::INVAL);
        }
        let words = len.div_ceil(page_size).div_ceil(WORD_BITS);
        let bitmap_bytes = words * WORD_BYTES;
        if bitmap_bytes > TRANSFER_MAX.into() || HEAD_BYTES + bitmap_bytes > room.into() {
            return Err(Errno::TOOBIG);
        }
        let mut bitmap = vec![0_u64; usize::try_from(words).map_err(|_| Errno::TOOBIG)?];
        let mut asked = started.written.split_off(&(iova / PAGE));
        started.written.append(&mut asked.split_off(&(end / PAGE)));
        for page in asked {
            let bit = (page * PAGE - iova) / page_size;
            let word = usize::try_from(bit / WORD_BITS).unwrap_or(usize::MAX);
            if let Some(word) = bitmap.get_mut(word) {
                *word |= 1 << (bit % WORD_BITS);
            }
        }
        let head = [iova, len, page_size].into_iter();
        let body: Vec<u8> = head.chain(bitmap).flat_map(u64::to_le_bytes).collect();
        Ok(reply(flags, &body))
    }
}
