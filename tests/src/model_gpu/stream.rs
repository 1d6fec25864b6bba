//! The form of a state: a stream of records.
//!
//! [`MAGIC`] and the bytes of video memory; then records, each an offset and a length of 64 bits and as many
//! bytes: whole pages of video memory, as often as they were written, and at last, with the offset [`REST`],
//! what else there is, as JSON. Whoever gives one is not trusted.

use std::io;

use super::pages::{PAGE, Pages};
use super::vram::Vram;

const MAGIC: [u8; 8] = *b"DGPUMIG2";
/// The offset of what is no video memory.
const REST: u64 = u64::MAX;
/// Bytes of the beginning, and before each record.
pub(super) const HEAD_BYTES: usize = 16;
/// Bytes of JSON that are taken; a state has some 20 KiB.
const REST_MAX: u64 = 256 << 10;

pub(super) fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

fn head(offset: u64, len: u64) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..8].copy_from_slice(&offset.to_le_bytes());
    head[8..].copy_from_slice(&len.to_le_bytes());
    head
}

/// A state on its way out.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// What could not be given yet.
    pending: Vec<u8>,
    /// Nothing comes behind that.
    has_ended: bool,
}

impl Outgoing {
    pub(super) fn new(vram: &Vram) -> Self {
        Self {
            pending: head(u64::from_le_bytes(MAGIC), vram.bytes()).to_vec(),
            has_ended: false,
        }
    }

    /// Bytes that wait.
    pub(super) fn pending(&self) -> u64 {
        self.pending.len() as u64
    }

    /// Gives the next bytes; returns how many. `rest`, if it is known by now, comes behind the last of
    /// video memory.
    pub(super) fn read(
        &mut self,
        vram: &mut Vram,
        rest: impl Fn() -> io::Result<Option<Vec<u8>>>,
        mut room: &mut [u8],
    ) -> io::Result<usize> {
        let all = room.len();
        loop {
            let count = self.pending.len().min(room.len());
            let (place, behind) = room.split_at_mut(count);
            for (slot, byte) in place.iter_mut().zip(self.pending.drain(..count)) {
                *slot = byte;
            }
            room = behind;
            if room.is_empty() || self.has_ended {
                break;
            }
            let fit = room.len().saturating_sub(HEAD_BYTES) as u64 / PAGE;
            // A client that asks for little has the rest of a page wait.
            let is_small = fit == 0;
            if is_small && room.len() < all {
                break;
            }
            let Some(run) = vram.written().and_then(|pages| pages.take(fit.max(1))) else {
                let Some(rest) = rest()? else {
                    break;
                };
                self.pending.extend(head(REST, rest.len() as u64));
                self.pending.extend(rest);
                self.has_ended = true;
                continue;
            };
            let len = run.end - run.start;
            let bytes = usize::try_from(len).map_err(|_| invalid())?;
            if is_small {
                self.pending.extend(head(run.start, len));
                self.pending.resize(HEAD_BYTES + bytes, 0);
                vram.read(run.start, &mut self.pending[HEAD_BYTES..])?;
            } else {
                let (place, behind) = room.split_at_mut(HEAD_BYTES + bytes);
                place[..HEAD_BYTES].copy_from_slice(&head(run.start, len));
                vram.read(run.start, &mut place[HEAD_BYTES..])?;
                room = behind;
            }
        }
        Ok(all - room.len())
    }
}

/// Where in the stream the next byte is.
#[derive(Debug)]
enum Place {
    Beginning,
    Record,
    Vram { offset: u64, left: u64 },
    Rest { left: u64 },
    End,
}

/// A state that comes in.
#[derive(Debug)]
pub(super) struct Incoming {
    place: Place,
    /// A head as far as it has come.
    head: Vec<u8>,
    rest: Vec<u8>,
    /// Which pages have come.
    seen: Pages,
}

impl Incoming {
    pub(super) fn new(vram: &Vram) -> Self {
        Self {
            place: Place::Beginning,
            head: Vec::new(),
            rest: Vec::new(),
            seen: Pages::none(vram.bytes()),
        }
    }

    /// Takes the next bytes.
    pub(super) fn write(&mut self, vram: &mut Vram, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let wanted = match self.place {
                Place::Beginning | Place::Record => (HEAD_BYTES - self.head.len()) as u64,
                Place::Vram { left, .. } | Place::Rest { left } => left,
                Place::End => return Err(invalid()),
            };
            let count = usize::try_from(wanted).map_or(data.len(), |wanted| wanted.min(data.len()));
            let (part, behind) = data.split_at(count);
            data = behind;
            let taken = part.len() as u64;
            match &mut self.place {
                Place::Beginning | Place::Record => {
                    self.head.extend(part);
                    self.begin_record(vram)?;
                }
                Place::Vram { offset, left } => {
                    vram.write(*offset, part)?;
                    (*offset, *left) = (*offset + taken, *left - taken);
                    if *left == 0 {
                        self.place = Place::Record;
                    }
                }
                Place::Rest { left } => {
                    self.rest.extend(part);
                    *left -= taken;
                    if *left == 0 {
                        self.place = Place::End;
                    }
                }
                Place::End => return Err(invalid()),
            }
        }
        Ok(())
    }

    /// Reads a head, if all of it has come.
    fn begin_record(&mut self, vram: &Vram) -> io::Result<()> {
        let (words, _) = self.head.as_chunks::<8>();
        let &[first, second] = words else {
            return Ok(());
        };
        let (offset, len) = (u64::from_le_bytes(first), u64::from_le_bytes(second));
        self.head.clear();
        self.place = match self.place {
            Place::Beginning if first == MAGIC && len == vram.bytes() => Place::Record,
            Place::Beginning => return Err(invalid()),
            _ if offset == REST && (1..=REST_MAX).contains(&len) => Place::Rest { left: len },
            _ => {
                let end = offset.checked_add(len).ok_or_else(invalid)?;
                let is_paged = offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
                if len == 0 || !is_paged || end > vram.bytes() {
                    return Err(invalid());
                }
                // The stream does not end before these bytes.
                self.seen.insert(offset, len);
                Place::Vram { offset, left: len }
            }
        };
        Ok(())
    }

    /// What is no video memory, once the stream has come to its end with all pages.
    pub(super) fn rest(&self) -> Option<&[u8]> {
        let is_whole = matches!(self.place, Place::End) && self.seen.is_full();
        is_whole.then_some(&self.rest)
    }
}
