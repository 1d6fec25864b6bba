//! Guest memory to and from a socket without a copy in this process.
//!
//! Only for connections that send bytes as they are
//! ([`plain_socket`](migration::ports::Channel::plain_socket)). A call that fails may have moved
//! a part of its bytes: afterwards the connection is good for nothing but being closed. That goes
//! for a time-out, too, unlike one of the connection itself.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

use devices::GuestRam;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::socket::waited;

/// Most pieces of one system call (`IOV_MAX`, limits.h).
const PIECES_MAX: usize = 1024;

/// A part of guest memory.
type Slice<'m> = VolatileSlice<'m, vm_memory::bitmap::BS<'m, devices::memory::WriteLog>>;

/// Sends `head` and then the bytes of `ranges`, in this order. The guest may be writing to them
/// meanwhile.
///
/// # Errors
/// Kind `InvalidInput`, with nothing sent, when a range is not guest memory; `TimedOut` when the
/// peer takes nothing for as long as the connection's time-out; else the kernel's.
pub fn send_ranges(
    socket: BorrowedFd<'_>,
    head: &[u8],
    ranges: &[(GuestAddress, usize)],
    memory: &GuestRam,
) -> io::Result<()> {
    let mut pieces = Vec::with_capacity(1 + ranges.len());
    if !head.is_empty() {
        pieces.push(libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        });
    }
    for (address, len) in ranges {
        // A range may run over adjacent regions.
        let slices = slices(memory, *address, *len)?;
        pieces.extend(slices.iter().map(|slice| libc::iovec {
            iov_base: slice.ptr_guard().as_ptr().cast_mut().cast(),
            iov_len: slice.len(),
        }));
    }
    let mut rest = &mut pieces[..];
    while !rest.is_empty() {
        let batch = rest.len().min(PIECES_MAX);
        let sent = waited(|| send_pieces(socket, &mut rest[..batch]))?;
        rest = advance(rest, sent);
    }
    Ok(())
}

/// Receives `len` bytes into guest memory from `address` on, and logs the writes.
///
/// # Errors
/// Kind `InvalidInput`, with nothing received, when the range is not guest memory;
/// `UnexpectedEof` when the peer ends before; `TimedOut` when it sends nothing for as long as the
/// connection's time-out; else the kernel's.
pub fn receive_range(
    socket: BorrowedFd<'_>,
    address: GuestAddress,
    len: usize,
    memory: &GuestRam,
) -> io::Result<()> {
    for slice in slices(memory, address, len)? {
        let mut filled = 0;
        while filled < slice.len() {
            let rest = slice.offset(filled).map_err(io::Error::other)?;
            let count = waited(|| receive_slice(socket, &rest))?;
            if count == 0 {
                let text = "the peer closed the connection within a range of memory";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
            rest.bitmap().mark_dirty(0, count);
            filled += count;
        }
    }
    Ok(())
}

/// The parts of a range, all of which is guest memory.
fn slices(memory: &GuestRam, address: GuestAddress, len: usize) -> io::Result<Vec<Slice<'_>>> {
    let found = memory.get_slices(address, len).collect::<Result<_, _>>();
    found.map_err(|_| {
        let text = format!("{len} bytes at {:#x} are not guest memory", address.0);
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })
}

fn send_pieces(socket: BorrowedFd<'_>, pieces: &mut [libc::iovec]) -> io::Result<usize> {
    // SAFETY: msghdr is made of integers and pointers, for which all zeroes is a value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    // SAFETY: the pieces are the caller's `head` and slices of guest memory that it borrows; the
    // kernel only reads them, and no reference to guest memory exists.
    let result =
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn receive_slice(socket: BorrowedFd<'_>, slice: &Slice<'_>) -> io::Result<usize> {
    let guard = slice.ptr_guard_mut();
    let start = guard.as_ptr().cast();
    // SAFETY: the slice is guest memory, mapped while it is borrowed; no reference to it exists.
    let result = unsafe { libc::recv(socket.as_raw_fd(), start, slice.len(), 0) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// What remains of `pieces` after their first `count` bytes.
fn advance(pieces: &mut [libc::iovec], count: usize) -> &mut [libc::iovec] {
    let (mut done, mut left) = (0, count);
    while let Some(piece) = pieces.get_mut(done) {
        if left < piece.iov_len {
            // Stays within the piece.
            piece.iov_base = piece.iov_base.wrapping_byte_add(left);
            piece.iov_len -= left;
            break;
        }
        left -= piece.iov_len;
        done += 1;
    }
    &mut pieces[done..]
}
