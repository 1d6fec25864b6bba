//! Deltas: what has changed in a page.
//!
//! A delta is a list of pieces: bytes to skip, bytes to replace (both LEB128), then the new bytes.

use super::PAGE;

/// A delta longer than this is not worth it: LZ4 does as well, and needs no old version.
pub const MAX_DELTA_BYTES: usize = 1024;

/// Unchanged bytes between two changes that are cheaper to repeat than to skip.
const MERGE_BYTES: usize = 2;

/// Bytes compared at once.
const WORD: usize = 8;

/// The delta is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the delta of a page does not fit it")]
pub struct BadDelta;

/// Appends what turns `old` into `new` to `out`; `false`, with `out` as it was, when that is more
/// than [`MAX_DELTA_BYTES`]. Pages that are equal give an empty delta.
#[must_use]
pub fn encode(old: &[u8; PAGE], new: &[u8; PAGE], out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let mut done = 0;
    let mut changes = Changes { old, new, at: 0 };
    let mut pending: Option<(usize, usize)> = None;
    loop {
        let change = changes.next();
        match (pending, change) {
            (Some((from, to)), Some((next, end))) if next - to <= MERGE_BYTES => {
                pending = Some((from, end));
                continue;
            }
            (Some((from, to)), _) => {
                put_number(out, from - done);
                put_number(out, to - from);
                out.extend_from_slice(new.get(from..to).unwrap_or_default());
                done = to;
                if out.len() - start > MAX_DELTA_BYTES {
                    out.truncate(start);
                    return false;
                }
            }
            (None, _) => {}
        }
        pending = change;
        if pending.is_none() {
            return true;
        }
    }
}

/// Ranges of bytes that differ, whole words passed over quickly.
struct Changes<'a> {
    old: &'a [u8; PAGE],
    new: &'a [u8; PAGE],
    at: usize,
}

impl Changes<'_> {
    /// XOR of the words at `at`, lowest byte first.
    fn difference(&self, at: usize) -> u64 {
        let word = |page: &[u8; PAGE]| {
            let bytes = page.get(at..).and_then(<[u8]>::first_chunk::<WORD>);
            bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        word(self.old) ^ word(self.new)
    }

    /// First byte from `from` on that differs (`changed`) or does not; the page's end without one.
    fn find(&self, from: usize, changed: bool) -> usize {
        let mut at = from;
        while at < PAGE {
            let aligned = at - at % WORD;
            let mut difference = self.difference(aligned);
            if !changed {
                // A byte of ones for each byte that is equal.
                difference = equal_bytes(difference);
            }
            let rest = difference >> (8 * (at % WORD));
            if rest != 0 {
                return at + rest.trailing_zeros() as usize / 8;
            }
            at = aligned + WORD;
        }
        PAGE
    }

    fn next(&mut self) -> Option<(usize, usize)> {
        let from = self.find(self.at, true);
        if from >= PAGE {
            return None;
        }
        let to = self.find(from, false);
        self.at = to;
        Some((from, to))
    }
}

/// Ones in every byte of `word` that is zero.
fn equal_bytes(word: u64) -> u64 {
    let bytes = word.to_le_bytes();
    u64::from_le_bytes(bytes.map(|byte| if byte == 0 { 0xff } else { 0 }))
}

/// Applies a delta to a page.
///
/// # Errors
/// [`BadDelta`]; the page is then half changed.
pub fn apply(page: &mut [u8; PAGE], delta: &[u8]) -> Result<(), BadDelta> {
    let mut rest = delta;
    let mut at = 0_usize;
    while !rest.is_empty() {
        let skip = take_number(&mut rest)?;
        let count = take_number(&mut rest)?;
        let (bytes, after) = rest.split_at_checked(count).ok_or(BadDelta)?;
        let from = at + skip;
        let target = page.get_mut(from..from + count).ok_or(BadDelta)?;
        if count == 0 {
            return Err(BadDelta);
        }
        target.copy_from_slice(bytes);
        at = from + count;
        rest = after;
    }
    Ok(())
}

/// LEB128; never more than two bytes here.
fn put_number(out: &mut Vec<u8>, number: usize) {
    let low = u8::try_from(number & 0x7f).unwrap_or(0);
    match u8::try_from(number >> 7).unwrap_or(0) {
        0 => out.push(low),
        high => out.extend_from_slice(&[low | 0x80, high]),
    }
}

fn take_number(bytes: &mut &[u8]) -> Result<usize, BadDelta> {
    let (number, rest) = match **bytes {
        [low, ref rest @ ..] if low < 0x80 => (usize::from(low), rest),
        [low, high, ref rest @ ..] if high < 0x80 => {
            (usize::from(low & 0x7f) | usize::from(high) << 7, rest)
        }
        _ => return Err(BadDelta),
    };
    *bytes = rest;
    Ok(number)
}
