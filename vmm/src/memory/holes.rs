//! Which parts of guest memory hold data.

#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use parking_lot::Mutex;

/// Ranges of `file` within `[start, start + len)` that hold data, ascending. The rest are holes,
/// found without touching them (lseek(2), `SEEK_DATA` and `SEEK_HOLE`).
///
/// # Errors
/// The kernel's refusal.
pub fn data_ranges(file: &File, start: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
    let end = start + len;
    let mut ranges = Vec::new();
    let mut at = start;
    while at < end {
        let Some(data) = seek(file, at, libc::SEEK_DATA)? else {
            break;
        };
        if data >= end {
            break;
        }
        let hole = seek(file, data, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
        ranges.push(data..hole);
        at = hole;
    }
    Ok(ranges)
}

/// Data ranges at least this long are worth remembering.
const WORTHWHILE_BYTES: u64 = 1 << 20;

/// Answers the same question chunk by chunk. The kernel finds the end of a range by walking all of
/// it, so a long range is walked once and remembered. What was data and is given back later still
/// counts as data, and reads as zeroes; holes are looked at anew each time.
#[derive(Debug, Default)]
pub struct DataMap {
    /// Ascending, not overlapping.
    known: Mutex<Vec<Range<u64>>>,
}

impl DataMap {
    /// As [`data_ranges`].
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn ranges(&self, file: &File, start: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
        let end = start + len;
        let mut ranges = Vec::new();
        let mut at = start;
        while at < end {
            let until = match self.known_until(at) {
                Some(until) => until,
                None => {
                    let Some(data) = seek(file, at, libc::SEEK_DATA)? else {
                        break;
                    };
                    if data > at {
                        at = data;
                        continue;
                    }
                    let hole = seek(file, at, libc::SEEK_HOLE)?.unwrap_or(end);
                    self.remember(at..hole);
                    hole
                }
            };
            ranges.push(at..until.min(end));
            at = until;
        }
        Ok(ranges)
    }

    /// The end of the known range that `at` lies in.
    fn known_until(&self, at: u64) -> Option<u64> {
        let known = self.known.lock();
        let after = known.partition_point(|range| range.start <= at);
        let range = known.get(after.checked_sub(1)?)?;
        range.contains(&at).then_some(range.end)
    }

    fn remember(&self, range: Range<u64>) {
        if range.end.saturating_sub(range.start) < WORTHWHILE_BYTES {
            return;
        }
        let mut known = self.known.lock();
        // Others may have found parts of it meanwhile.
        let first = known.partition_point(|old| old.end < range.start);
        let last = known.partition_point(|old| old.start <= range.end);
        let joined = known.drain(first..last.max(first)).fold(range, |all, old| {
            all.start.min(old.start)..all.end.max(old.end)
        });
        known.insert(first, joined);
    }
}

/// `None`: there is nothing further in the file.
fn seek(file: &File, from: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = libc::off64_t::try_from(from).map_err(io::Error::other)?;
    // SAFETY: a plain call on a descriptor that we hold; the position is used by nobody else.
    let position = unsafe { libc::lseek64(file.as_raw_fd(), offset, whence) };
    if let Ok(position) = u64::try_from(position) {
        return Ok(Some(position));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn chunk_by_chunk_gives_what_the_kernel_says_also_after_more_was_written() {
        let path = std::env::temp_dir().join(format!("drover-holes-{}", std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true);
        let file = file.open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.set_len(32 << 20).unwrap();
        let fill = |at: u64, len: usize| file.write_all_at(&vec![1; len], at).unwrap();
        fill(1 << 20, 5 << 20);
        fill(9 << 20, 4096);
        let map = DataMap::default();
        let chunk = 2 << 20;
        let check = || {
            for start in (0..32 << 20).step_by(chunk) {
                let (start, len) = (start as u64, chunk as u64);
                let expected = data_ranges(&file, start, len).unwrap();
                assert_eq!(
                    map.ranges(&file, start, len).unwrap(),
                    expected,
                    "{start:#x}"
                );
            }
        };
        check();
        assert_eq!(*map.known.lock(), vec![1 << 20..6 << 20]);
        fill(6 << 20, 2 << 20);
        fill(20 << 20, 8192);
        fill(0, 1 << 20);
        check();
    }

    #[test]
    fn overlapping_finds_are_joined() {
        let map = DataMap::default();
        let mib = |from: u64, to: u64| from << 20..to << 20;
        for range in [
            mib(4, 8),
            mib(20, 30),
            mib(6, 10),
            mib(0, 2),
            mib(10, 12),
            mib(1, 21),
        ] {
            map.remember(range);
        }
        assert_eq!(*map.known.lock(), vec![mib(0, 30)]);
        map.remember(40 << 20..(40 << 20) + 4096);
        assert_eq!(map.known_until(40 << 20), None);
        assert_eq!(map.known_until(0), Some(30 << 20));
        assert_eq!(map.known_until(30 << 20), None);
    }
}
