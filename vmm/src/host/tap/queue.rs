//! Packets between a TAP descriptor and guest memory.

#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use devices::GuestRam;
use devices::memory::WriteLog;
use devices::virtio::Segment;
use devices::virtio::net::NetQueue;
use smallvec::SmallVec;
use vm_memory::bitmap::{Bitmap, RefSlice};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

/// Pieces of a packet that need no allocation.
const INLINE: usize = 64;
/// `UIO_MAXIOV`: the kernel takes no more pieces at a time.
const MAX_PIECES: usize = 1024;

type Slices<'a> = SmallVec<[VolatileSlice<'a, RefSlice<'a, WriteLog>>; INLINE]>;
type Pieces = SmallVec<[libc::iovec; INLINE]>;

/// One queue of a TAP.
pub(super) struct TapQueue {
    fd: Arc<OwnedFd>,
}

impl TapQueue {
    pub(super) fn new(fd: Arc<OwnedFd>) -> Self {
        Self { fd }
    }
}

impl AsRawFd for TapQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl NetQueue for TapQueue {
    fn receive(
        &mut self,
        memory: &GuestRam,
        segments: &[Segment],
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        let slices = slices(memory, segments)?;
        let mut pieces = pieces(&slices);
        if !overflow.is_empty() {
            pieces.push(libc::iovec {
                iov_base: overflow.as_mut_ptr().cast(),
                iov_len: overflow.len(),
            });
        }
        let fd = self.as_raw_fd();
        let result = match pieces.as_mut_slice() {
            // Cheaper by a tenth than an array of one piece.
            // SAFETY: the piece lies in guest RAM, which stays mapped while `memory` is borrowed
            // and is only ever accessed through raw pointers, or is borrowed mutably.
            [piece] => unsafe { libc::read(fd, piece.iov_base, piece.iov_len) },
            pieces => {
                let count = count(pieces)?;
                // SAFETY: as above, for all pieces.
                unsafe { libc::readv(fd, pieces.as_ptr(), count) }
            }
        };
        let len = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        let mut left = len;
        for slice in &slices {
            let written = slice.len().min(left);
            slice.bitmap().mark_dirty(0, written);
            left -= written;
            if left == 0 {
                break;
            }
        }
        Ok(len)
    }

    fn send(&mut self, memory: &GuestRam, segments: &[Segment]) -> io::Result<()> {
        let slices = slices(memory, segments)?;
        let pieces = pieces(&slices);
        let fd = self.as_raw_fd();
        // The kernel copies, and the guest changing its buffers meanwhile only spoils the packet.
        let result = match pieces.as_slice() {
            // Cheaper by a tenth than an array of one piece.
            // SAFETY: the piece lies in guest RAM, which stays mapped while `memory` is borrowed.
            [piece] => unsafe { libc::write(fd, piece.iov_base, piece.iov_len) },
            pieces => {
                let count = count(pieces)?;
                // SAFETY: as above, for all pieces.
                unsafe { libc::writev(fd, pieces.as_ptr(), count) }
            }
        };
        // A TAP takes a packet whole or not at all.
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The driver answers so once the interface was deleted.
    fn is_gone(&self, error: &io::Error) -> bool {
        error.raw_os_error() == Some(libc::EBADFD)
    }
}

/// The host's view of `segments`; more pieces than these where regions of RAM meet.
fn slices<'a>(memory: &'a GuestRam, segments: &[Segment]) -> io::Result<Slices<'a>> {
    let mut slices = Slices::new();
    for segment in segments {
        let (addr, len) = (segment.addr, segment.len as usize);
        // Nearly always in one region, which is quicker to find.
        if let Ok(slice) = memory.get_slice(addr, len) {
            slices.push(slice);
            continue;
        }
        for slice in memory.get_slices(addr, len) {
            slices.push(slice.map_err(io::Error::other)?);
        }
    }
    Ok(slices)
}

/// The same for the kernel. Pieces that follow each other in memory, as pages of one packet often
/// do, become one.
fn pieces(slices: &Slices<'_>) -> Pieces {
    let mut pieces = Pieces::new();
    for slice in slices {
        let base = slice.ptr_guard_mut().as_ptr();
        match pieces.last_mut() {
            Some(last) if last.iov_base.addr() + last.iov_len == base.addr() => {
                last.iov_len += slice.len();
            }
            _ => pieces.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: slice.len(),
            }),
        }
    }
    pieces
}

/// The driver's fault: it has cut a packet into too many pieces.
fn count(pieces: &[libc::iovec]) -> io::Result<libc::c_int> {
    if pieces.len() > MAX_PIECES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    libc::c_int::try_from(pieces.len()).map_err(io::Error::other)
}
