//! Guest buffers as the host's addresses.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

use devices::GuestRam;
use devices::virtio::{Segment, buffers};
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

/// Most pieces of one system call (`IOV_MAX`, limits.h).
pub(super) const MAX_PIECES: usize = 1024;

/// A piece of guest RAM in this process. Laid out as `struct iovec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Piece {
    /// Address in this process.
    pub(super) host: usize,
    /// Bytes.
    pub(super) len: usize,
}

const _: () = assert!(size_of::<Piece>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<Piece>() == align_of::<libc::iovec>());

/// Room for pieces, kept from request to request.
#[derive(Debug, Default)]
pub(super) struct PieceList {
    pieces: Vec<Piece>,
}

impl PieceList {
    /// Finds where `segments`, less their first `skip` bytes, lie in this process; up to
    /// [`MAX_PIECES`] pieces, the caller comes back for the rest.
    ///
    /// # Errors
    /// A segment is not RAM.
    pub(super) fn fill<'m>(
        &'m mut self,
        memory: &'m GuestRam,
        segments: &[Segment],
        skip: u64,
    ) -> io::Result<Pieces<'m>> {
        self.pieces.clear();
        let mut skip = skip;
        for segment in segments {
            let len = u64::from(segment.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            let addr = vm_memory::GuestAddress(segment.addr.0 + skip);
            // A segment may run over adjacent regions.
            let len = usize::try_from(len - skip).map_err(io::Error::other)?;
            skip = 0;
            for slice in memory.get_slices(addr, len) {
                let slice = slice.map_err(io::Error::other)?;
                self.pieces.push(Piece {
                    host: slice.ptr_guard_mut().as_ptr() as usize,
                    len: slice.len(),
                });
            }
            if self.pieces.len() >= MAX_PIECES {
                self.pieces.truncate(MAX_PIECES);
                break;
            }
        }
        Ok(Pieces {
            pieces: &self.pieces,
            memory: PhantomData,
        })
    }

    /// Frees what an unusually long request has left.
    pub(super) fn shrink(&mut self) {
        const USUAL: usize = 64;
        if self.pieces.capacity() > USUAL {
            self.pieces = Vec::new();
        }
    }
}

/// Pieces of guest RAM that is mapped for `'m`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces<'m> {
    pieces: &'m [Piece],
    memory: PhantomData<&'m GuestRam>,
}

impl Pieces<'_> {
    pub(super) fn as_slice(&self) -> &[Piece] {
        self.pieces
    }

    pub(super) fn as_iovecs(&self) -> *const libc::iovec {
        self.pieces.as_ptr().cast()
    }

    /// Number of pieces as the system calls take it.
    pub(super) fn count(&self) -> i32 {
        // At most MAX_PIECES.
        i32::try_from(self.pieces.len()).unwrap_or(0)
    }

    /// Whether every piece begins at a multiple of `memory` and has a multiple of `len` bytes.
    pub(super) fn are_aligned(&self, memory: u32, len: u32) -> bool {
        let aligned = |piece: &Piece| {
            piece.host.is_multiple_of(memory as usize) && piece.len.is_multiple_of(len as usize)
        };
        self.pieces.iter().all(aligned)
    }

    /// Reads from `offset` of `file` (preadv(2)). Returns the bytes read, fewer than asked for at
    /// the end of the file or when the kernel likes.
    pub(super) fn read_from(&self, file: &File, offset: u64) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: the pieces lie in guest RAM, which stays mapped for their lifetime; the guest
        // expects its buffers to be overwritten, and no reference to them exists.
        let result =
            unsafe { libc::preadv(file.as_raw_fd(), self.as_iovecs(), self.count(), offset) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes to `offset` of `file` (pwritev(2)). Returns the bytes written.
    pub(super) fn write_to(&self, file: &File, offset: u64) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: the pieces lie in guest RAM, which stays mapped for their lifetime.
        let result =
            unsafe { libc::pwritev(file.as_raw_fd(), self.as_iovecs(), self.count(), offset) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

/// Tells the write log that the kernel has written into `segments` behind vm-memory's back.
pub(super) fn mark_written(memory: &GuestRam, segments: &[Segment]) {
    for segment in segments {
        for slice in memory
            .get_slices(segment.addr, segment.len as usize)
            .flatten()
        {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}

/// Copies `data` to byte `at` of `segments`; the write log hears of it.
pub(super) fn copy_to_guest(
    memory: &GuestRam,
    segments: &[Segment],
    at: u64,
    data: &[u8],
) -> io::Result<()> {
    let copied = buffers::write(memory, segments, at, data).map_err(io::Error::other)?;
    whole(copied, data.len())
}

/// Copies from byte `at` of `segments` to `data`.
pub(super) fn copy_from_guest(
    memory: &GuestRam,
    segments: &[Segment],
    at: u64,
    data: &mut [u8],
) -> io::Result<()> {
    let copied = buffers::read(memory, segments, at, data).map_err(io::Error::other)?;
    whole(copied, data.len())
}

fn whole(copied: usize, wanted: usize) -> io::Result<()> {
    if copied == wanted {
        Ok(())
    } else {
        Err(io::Error::other("the request's buffers are too short"))
    }
}
