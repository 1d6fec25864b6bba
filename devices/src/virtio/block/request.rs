//! From a descriptor chain to operations on storage (section 5.2.6).

use std::io;

use smallvec::SmallVec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

use super::backend::{BlockInfo, BlockOp, SECTOR_BYTES};
use super::config::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::GuestRam;
use crate::virtio::buffers;
use crate::virtio::queue::{Chain, Segments};

/// `struct virtio_blk_req` without data and status.
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
struct Header {
    request_type: U32,
    reserved: U32,
    sector: U64,
}

const HEADER_BYTES: u64 = size_of::<Header>() as u64;

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
struct RangeEntry {
    sector: U64,
    num_sectors: U32,
    flags: U32,
}

const RANGE_BYTES: u64 = size_of::<RangeEntry>() as u64;
const RANGE_UNMAP: u32 = 1;

/// A contiguous piece of storage and what happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) op: BlockOp,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// A request that passed all checks.
#[derive(Debug, PartialEq)]
pub(super) enum Parsed {
    /// One operation, with its guest buffers for reads and writes.
    Transfer { extent: Extent, segments: Segments },
    /// Discard or write-zeroes of several ranges.
    Ranges(SmallVec<[Extent; 1]>),
    /// The device's serial number goes into the first writable bytes.
    GetId,
}

/// Why a request is answered with an error status. All are the driver's doing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("there is no room for the status byte")]
    NoStatus,
    #[error("the header is incomplete")]
    ShortHeader,
    #[error("buffers could not be read")]
    Memory,
    #[error("the range is outside the device or not in whole sectors")]
    BadRange,
    #[error("the device is read-only")]
    ReadOnly,
    #[error("request type {0} is not supported")]
    Unsupported(u32),
}

impl Refusal {
    /// Whether the answer is `VIRTIO_BLK_S_UNSUPP` rather than `VIRTIO_BLK_S_IOERR`.
    pub(super) fn is_unsupported(&self) -> bool {
        matches!(self, Self::Unsupported(_))
    }
}

/// Bytes of writable buffers before the status byte, or the refusal when there is none.
pub(super) fn data_len(chain: &Chain) -> Result<u64, Refusal> {
    buffers::total_len(chain.writable())
        .checked_sub(1)
        .ok_or(Refusal::NoStatus)
}

pub(super) fn parse(memory: &GuestRam, chain: &Chain, info: &BlockInfo) -> Result<Parsed, Refusal> {
    let writable = data_len(chain)?;
    let header: Header = read(memory, chain, 0)?;
    let payload = buffers::total_len(chain.readable()) - HEADER_BYTES;
    let sector = header.sector.get();
    match header.request_type.get() {
        VIRTIO_BLK_T_IN => Ok(Parsed::Transfer {
            extent: extent(BlockOp::Read, sector, writable, info)?,
            segments: buffers::part(chain.writable(), 0, writable),
        }),
        VIRTIO_BLK_T_OUT if info.read_only => Err(Refusal::ReadOnly),
        VIRTIO_BLK_T_OUT => Ok(Parsed::Transfer {
            extent: extent(BlockOp::Write, sector, payload, info)?,
            segments: buffers::part(chain.readable(), HEADER_BYTES, payload),
        }),
        VIRTIO_BLK_T_FLUSH => Ok(Parsed::Transfer {
            extent: Extent {
                op: BlockOp::Flush,
                offset: 0,
                len: 0,
            },
            segments: Segments::new(),
        }),
        VIRTIO_BLK_T_GET_ID => Ok(Parsed::GetId),
        kind @ VIRTIO_BLK_T_DISCARD if !info.discard => Err(Refusal::Unsupported(kind)),
        kind @ VIRTIO_BLK_T_WRITE_ZEROES if !info.write_zeroes => Err(Refusal::Unsupported(kind)),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if info.read_only => {
            Err(Refusal::ReadOnly)
        }
        kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
            let zeroes = kind == VIRTIO_BLK_T_WRITE_ZEROES;
            parse_ranges(memory, chain, payload, zeroes, info).map(Parsed::Ranges)
        }
        kind => Err(Refusal::Unsupported(kind)),
    }
}

fn parse_ranges(
    memory: &GuestRam,
    chain: &Chain,
    payload: u64,
    zeroes: bool,
    info: &BlockInfo,
) -> Result<SmallVec<[Extent; 1]>, Refusal> {
    let count = payload / RANGE_BYTES;
    if count == 0 || !payload.is_multiple_of(RANGE_BYTES) || count > u64::from(MAX_RANGES) {
        return Err(Refusal::BadRange);
    }
    let range = |index| {
        let entry: RangeEntry = read(memory, chain, HEADER_BYTES + index * RANGE_BYTES)?;
        let sectors = entry.num_sectors.get();
        let flags = entry.flags.get();
        // `unmap` is reserved for discard (section 5.2.6.2).
        let op = match (zeroes, flags) {
            (false, 0) => BlockOp::Discard,
            (true, 0 | RANGE_UNMAP) => BlockOp::WriteZeroes {
                unmap: flags == RANGE_UNMAP,
            },
            (false, _) => return Err(Refusal::Unsupported(VIRTIO_BLK_T_DISCARD)),
            (true, _) => return Err(Refusal::Unsupported(VIRTIO_BLK_T_WRITE_ZEROES)),
        };
        if sectors > MAX_RANGE_SECTORS {
            return Err(Refusal::BadRange);
        }
        extent(
            op,
            entry.sector.get(),
            u64::from(sectors) * SECTOR_BYTES,
            info,
        )
    };
    (0..count).map(range).collect()
}

/// Checks a range against the capacity.
fn extent(op: BlockOp, sector: u64, len: u64, info: &BlockInfo) -> Result<Extent, Refusal> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::BadRange)?;
    let end = offset.checked_add(len).ok_or(Refusal::BadRange)?;
    if !len.is_multiple_of(SECTOR_BYTES) || len == 0 || end > info.capacity_bytes {
        return Err(Refusal::BadRange);
    }
    Ok(Extent { op, offset, len })
}

/// Reads a structure from the readable buffers at `offset`.
fn read<T: FromBytes + IntoBytes>(
    memory: &GuestRam,
    chain: &Chain,
    offset: u64,
) -> Result<T, Refusal> {
    let mut value = T::new_zeroed();
    let bytes = value.as_mut_bytes();
    let wanted = bytes.len();
    let got = buffers::read(memory, chain.readable(), offset, bytes);
    match got {
        Ok(count) if count == wanted => Ok(value),
        Ok(_) => Err(Refusal::ShortHeader),
        Err(_) => Err(Refusal::Memory),
    }
}

/// The serial number as `GET_ID` returns it: 20 bytes, zero-padded.
pub(super) fn serial_bytes(serial: &str) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    for (slot, byte) in id.iter_mut().zip(serial.bytes()) {
        *slot = byte;
    }
    id
}

/// The last writable byte takes the status.
pub(super) fn write_status(memory: &GuestRam, chain: &Chain, status: u8) -> io::Result<()> {
    let at = data_len(chain).map_err(io::Error::other)?;
    let written = buffers::write(memory, chain.writable(), at, &[status]);
    written.map(drop).map_err(io::Error::other)
}

#[cfg(test)]
mod tests;
