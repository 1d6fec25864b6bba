//! A raw image or block device, one operation at a time on the calling thread.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::GuestRam;
use devices::virtio::block::{BlockInfo, BlockOp, BlockRequest, SECTOR_BYTES};
use parking_lot::Mutex;

use super::error::DiskError;
use super::file::{FileKind, HostFile, QCOW2_MAGIC};
use super::pieces::{PieceList, Pieces, copy_from_guest, copy_to_guest, mark_written};
use super::syscalls::{self, DirectAlignment, Fallocate, uninterrupted};

/// Bytes that one thread moves at a time where guest buffers cannot be used as they are.
const BOUNCE_BYTES: usize = 256 << 10;
/// Strictest alignment of a host buffer known.
const BUFFER_ALIGNMENT: usize = 4096;

/// What a thread keeps from request to request.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) pieces: PieceList,
    bounce: Vec<u8>,
}

impl Scratch {
    /// [`BOUNCE_BYTES`] bytes, aligned for direct I/O.
    pub(super) fn bounce(&mut self) -> &mut [u8] {
        self.bounce.resize(BOUNCE_BYTES + BUFFER_ALIGNMENT, 0);
        let start = self.bounce.as_ptr().align_offset(BUFFER_ALIGNMENT);
        &mut self.bounce[start..start + BOUNCE_BYTES]
    }
}

/// Storage that executes requests on the calling thread. Threads may call side by side.
pub(super) trait SyncImage: Send + Sync {
    /// Does what the request says, to the last byte.
    fn execute(
        &self,
        memory: &GuestRam,
        request: &BlockRequest,
        scratch: &mut Scratch,
    ) -> io::Result<()>;
}

/// A raw image file or block device.
pub(super) struct RawImage {
    file: Arc<File>,
    kind: FileKind,
    alignment: Option<DirectAlignment>,
    in_memory: bool,
    info: BlockInfo,
    /// Found out when it is first asked for: there is no harmless way to probe.
    cannot_zero_ranges: AtomicBool,
    /// Serializes writes that have to read the rest of a block first.
    read_modify_write: Mutex<()>,
}

impl RawImage {
    /// Checks size and contents and finds out the abilities.
    pub(super) fn new(host: HostFile) -> Result<Self, DiskError> {
        let probe = |what| {
            let path = host.path.clone();
            move |source| DiskError::Probe { path, what, source }
        };
        let first = host.first_bytes::<4>().map_err(probe("first bytes"))?;
        if first == QCOW2_MAGIC {
            return Err(DiskError::LooksLikeQcow2 { path: host.path });
        }
        // Afterwards: files of other formats have any size, and rounding up is no help there.
        check_size(&host)?;
        let is_device = host.kind == FileKind::BlockDevice;
        let (block_bytes, physical_block_bytes) = if is_device {
            let logical = syscalls::logical_block_bytes(&host.file);
            let physical = syscalls::physical_block_bytes(&host.file);
            (
                logical.map_err(probe("block size"))?,
                physical.map_err(probe("physical block size"))?,
            )
        } else {
            // The same on every host, or a guest could not read its partition table any more.
            (512, 4096)
        };
        let punches = host.can_punch_holes();
        let info = BlockInfo {
            capacity_bytes: host.bytes,
            block_bytes,
            physical_block_bytes: physical_block_bytes.max(block_bytes),
            read_only: !host.mode.writable,
            discard: punches || host.can_discard_blocks(),
            // The kernel zeroes block devices by itself where they cannot.
            write_zeroes: punches || (is_device && host.mode.writable),
        };
        Ok(Self {
            kind: host.kind,
            alignment: host.alignment,
            in_memory: syscalls::is_in_memory(&host.file),
            info,
            cannot_zero_ranges: AtomicBool::new(false),
            read_modify_write: Mutex::new(()),
            file: host.file,
        })
    }

    pub(super) fn info(&self) -> &BlockInfo {
        &self.info
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether the page cache stands between requests and storage.
    pub(super) fn is_buffered(&self) -> bool {
        self.alignment.is_none()
    }

    /// Whether the contents live in host memory only.
    pub(super) fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// The fallocate(2) call that does `op` on a range, where one call can.
    pub(super) fn fallocate_for(&self, op: BlockOp, offset: u64, len: u64) -> Option<Fallocate> {
        // A block device refuses ranges that are not whole blocks.
        let whole = (offset | len).is_multiple_of(u64::from(self.info.block_bytes));
        let how = match op {
            BlockOp::Discard if self.kind == FileKind::Regular => Fallocate::PunchHole,
            BlockOp::WriteZeroes { unmap: true } if self.kind == FileKind::Regular => {
                Fallocate::PunchHole
            }
            // On block devices `unmap` is a permission that is not used: a device that cannot
            // unmap and zero at once would refuse.
            BlockOp::WriteZeroes { .. } => Fallocate::ZeroRange,
            BlockOp::Read | BlockOp::Write | BlockOp::Flush | BlockOp::Discard => return None,
        };
        let refused =
            how == Fallocate::ZeroRange && self.cannot_zero_ranges.load(Ordering::Relaxed);
        (whole && !refused).then_some(how)
    }

    /// Whether the kernel can move the request's bytes between storage and these pieces.
    pub(super) fn takes(&self, pieces: &Pieces<'_>, offset: u64, len: u64) -> bool {
        let Some(DirectAlignment {
            memory,
            offset: unit,
        }) = self.alignment
        else {
            return true;
        };
        (offset | len).is_multiple_of(u64::from(unit)) && pieces.are_aligned(memory, unit)
    }

    /// Whether direct I/O has refused what it was given although it met the alignment that the
    /// kernel tells: some stacked devices ask for more.
    pub(super) fn is_picky(&self, error: &io::Error) -> bool {
        !self.is_buffered() && error.raw_os_error() == Some(libc::EINVAL)
    }

    fn transfer(
        &self,
        memory: &GuestRam,
        request: &BlockRequest,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        let write = request.op == BlockOp::Write;
        let mut done = 0;
        while done < request.len {
            let (offset, left) = (request.offset + done, request.len - done);
            let pieces = scratch.pieces.fill(memory, &request.segments, done)?;
            if !self.takes(&pieces, offset, left) {
                return self.bounce(memory, request, done, scratch);
            }
            let moved = uninterrupted(|| match write {
                true => pieces.write_to(&self.file, offset),
                false => pieces.read_from(&self.file, offset),
            });
            let moved = match moved {
                Err(error) if self.is_picky(&error) => {
                    return self.bounce(memory, request, done, scratch);
                }
                moved => moved?,
            };
            done += progress(moved as u64, request.op)?;
        }
        if !write {
            mark_written(memory, &request.segments);
        }
        scratch.pieces.shrink();
        Ok(())
    }

    /// Moves the rest of a request through a buffer of our own, which is aligned.
    fn bounce(
        &self,
        memory: &GuestRam,
        request: &BlockRequest,
        mut done: u64,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        let unit = self.alignment.map_or(1, |alignment| alignment.offset);
        let unit = u64::from(unit);
        let buffer = scratch.bounce();
        while done < request.len {
            let offset = request.offset + done;
            // Whole blocks around the range, as many as there is room for.
            let start = offset - offset % unit;
            let room = start + buffer.len() as u64;
            let end = (request.offset + request.len).min(room);
            let (skip, len) = (bytes(offset - start), bytes(end - offset));
            let blocks = &mut buffer[..bytes(end.next_multiple_of(unit) - start)];
            if request.op == BlockOp::Read {
                read_blocks(&self.file, blocks, start)?;
                copy_to_guest(memory, &request.segments, done, &blocks[skip..skip + len])?;
            } else if skip == 0 && len == blocks.len() {
                copy_from_guest(memory, &request.segments, done, blocks)?;
                self.file.write_all_at(blocks, start)?;
            } else {
                let _serialized = self.read_modify_write.lock();
                read_blocks(&self.file, blocks, start)?;
                let target = &mut blocks[skip..skip + len];
                copy_from_guest(memory, &request.segments, done, target)?;
                self.file.write_all_at(blocks, start)?;
            }
            done += len as u64;
        }
        Ok(())
    }

    /// A host that cannot discard keeps the storage, as it may.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.try_discard(offset, len) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            result => result,
        }
    }

    fn try_discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.kind == FileKind::Regular {
            return syscalls::fallocate(&self.file, Fallocate::PunchHole, offset, len);
        }
        // A discard may do less than it was asked for, so broken blocks at the ends are left.
        let unit = u64::from(self.info.block_bytes);
        let (start, end) = (offset.next_multiple_of(unit), offset + len);
        let end = end - end % unit;
        if start >= end {
            return Ok(());
        }
        syscalls::discard_blocks(&self.file, start, end - start)
    }

    fn write_zeroes(&self, request: &BlockRequest, scratch: &mut Scratch) -> io::Result<()> {
        let &BlockRequest {
            op, offset, len, ..
        } = request;
        if let Some(how) = self.fallocate_for(op, offset, len) {
            match syscalls::fallocate(&self.file, how, offset, len) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    if how == Fallocate::ZeroRange {
                        self.cannot_zero_ranges.store(true, Ordering::Relaxed);
                    }
                }
                result => return result,
            }
        }
        self.write_zero_bytes(offset, len, scratch)
    }

    /// Zeroes a range the slow way.
    fn write_zero_bytes(&self, offset: u64, len: u64, scratch: &mut Scratch) -> io::Result<()> {
        let unit = u64::from(self.alignment.map_or(1, |alignment| alignment.offset));
        let buffer = scratch.bounce();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let start = at - at % unit;
            let stop = end.min(start + buffer.len() as u64);
            let blocks = &mut buffer[..bytes(stop.next_multiple_of(unit) - start)];
            let (from, to) = (bytes(at - start), bytes(stop - start));
            let _serialized = self.read_modify_write.lock();
            if from != 0 || to != blocks.len() {
                read_blocks(&self.file, blocks, start)?;
            }
            blocks[from..to].fill(0);
            self.file.write_all_at(blocks, start)?;
            at = stop;
        }
        Ok(())
    }
}

impl SyncImage for RawImage {
    fn execute(
        &self,
        memory: &GuestRam,
        request: &BlockRequest,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        match request.op {
            BlockOp::Read | BlockOp::Write => {
                let result = self.transfer(memory, request, scratch);
                if request.op == BlockOp::Read && result.is_err() {
                    // The kernel may have filled a part.
                    mark_written(memory, &request.segments);
                }
                result
            }
            BlockOp::Flush => uninterrupted(|| self.file.sync_data()),
            BlockOp::Discard => self.discard(request.offset, request.len),
            BlockOp::WriteZeroes { .. } => self.write_zeroes(request, scratch),
        }
    }
}

fn check_size(host: &HostFile) -> Result<(), DiskError> {
    let (path, bytes) = (host.path.clone(), host.bytes);
    // Direct I/O writes whole blocks, which must not make the image larger.
    let direct = host.alignment.map_or(0, |alignment| alignment.offset);
    let unit = u64::from(direct).max(SECTOR_BYTES);
    match host.kind {
        FileKind::BlockDevice if bytes < SECTOR_BYTES => Err(DiskError::NoMedium { path, bytes }),
        FileKind::Regular if bytes < SECTOR_BYTES || !bytes.is_multiple_of(unit) => {
            Err(DiskError::Size { path, bytes, unit })
        }
        FileKind::BlockDevice | FileKind::Regular => Ok(()),
    }
}

/// Bytes moved by one system call. None means that the file ends before the disk does.
pub(super) fn progress(moved: u64, op: BlockOp) -> io::Result<u64> {
    match (moved, op) {
        (0, BlockOp::Write) => Err(io::ErrorKind::WriteZero.into()),
        (0, _) => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the image was truncated",
        )),
        _ => Ok(moved),
    }
}

/// Reads whole blocks.
fn read_blocks(file: &File, blocks: &mut [u8], start: u64) -> io::Result<()> {
    let mut done = 0;
    while done < blocks.len() {
        let count = uninterrupted(|| file.read_at(&mut blocks[done..], start + done as u64))?;
        done += bytes(progress(count as u64, BlockOp::Read)?);
    }
    Ok(())
}

/// A length within a buffer.
fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("addresses have 64 bits on x86-64")
}

#[cfg(test)]
mod tests;
