//! Copies between guest segments and host bytes, and views of parts of a chain.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::queue::{Segment, Segments};
use crate::GuestRam;

/// Bytes in all segments. A chain never has more than 4 GiB.
#[must_use]
pub fn total_len(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// The segments that make up `len` bytes from `offset`; fewer when there are not so many.
#[must_use]
pub fn part(segments: &[Segment], offset: u64, len: u64) -> Segments {
    let mut skip = offset;
    let mut left = len;
    let mut result = Segments::new();
    for segment in segments {
        let available = u64::from(segment.len);
        if skip >= available {
            skip -= available;
            continue;
        }
        let take = (available - skip).min(left);
        if take == 0 {
            break;
        }
        result.push(Segment {
            addr: GuestAddress(segment.addr.0 + skip),
            // `take` is at most the segment's own u32 length.
            len: u32::try_from(take).unwrap_or(u32::MAX),
        });
        left -= take;
        skip = 0;
    }
    result
}

/// Copies from `segments`, starting at `offset`, into `buf`. Returns how many bytes there were.
///
/// # Errors
/// [`GuestMemoryError`] when a segment is not RAM.
pub fn read(
    memory: &GuestRam,
    segments: &[Segment],
    offset: u64,
    buf: &mut [u8],
) -> Result<usize, GuestMemoryError> {
    let mut done = 0;
    for segment in part(segments, offset, buf.len() as u64) {
        let len = segment.len as usize;
        if let Some(target) = buf.get_mut(done..done + len) {
            memory.read_slice(target, segment.addr)?;
            done += len;
        }
    }
    Ok(done)
}

/// Copies `buf` into `segments` from `offset` on. Returns how many bytes fitted.
///
/// # Errors
/// [`GuestMemoryError`] when a segment is not RAM.
pub fn write(
    memory: &GuestRam,
    segments: &[Segment],
    offset: u64,
    buf: &[u8],
) -> Result<usize, GuestMemoryError> {
    let mut done = 0;
    for segment in part(segments, offset, buf.len() as u64) {
        let len = segment.len as usize;
        if let Some(source) = buf.get(done..done + len) {
            memory.write_slice(source, segment.addr)?;
            done += len;
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENTS: [Segment; 3] = [
        Segment {
            addr: GuestAddress(0x1000),
            len: 4,
        },
        Segment {
            addr: GuestAddress(0x2000),
            len: 0,
        },
        Segment {
            addr: GuestAddress(0x3000),
            len: 6,
        },
    ];

    fn memory() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()
    }

    #[test]
    fn part_cuts_across_segments() {
        let segment = |addr, len| Segment {
            addr: GuestAddress(addr),
            len,
        };
        assert_eq!(
            part(&SEGMENTS, 2, 5).as_slice(),
            [segment(0x1002, 2), segment(0x3000, 3)]
        );
        assert_eq!(part(&SEGMENTS, 4, 100).as_slice(), [segment(0x3000, 6)]);
        assert!(part(&SEGMENTS, 10, 1).is_empty());
        assert!(part(&SEGMENTS, 0, 0).is_empty());
        assert_eq!(total_len(&SEGMENTS), 10);
    }

    #[test]
    fn bytes_written_across_segments_read_back() {
        let memory = memory();
        assert_eq!(write(&memory, &SEGMENTS, 1, b"abcdefghijkl").unwrap(), 9);
        let mut buf = [0; 12];
        assert_eq!(read(&memory, &SEGMENTS, 3, &mut buf).unwrap(), 7);
        assert_eq!(&buf[..7], b"cdefghi");
    }

    #[test]
    fn segment_outside_ram_is_an_error() {
        let outside = [Segment {
            addr: GuestAddress(0x3fff),
            len: 2,
        }];
        assert!(read(&memory(), &outside, 0, &mut [0; 2]).is_err());
        assert!(write(&memory(), &outside, 0, &[0; 2]).is_err());
    }
}
