//! Which parts of guest memory hold data.

#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

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
