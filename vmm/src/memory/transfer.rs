//! Guest memory straight into a socket, and out of one.
//!
//! The kernel copies between the socket's buffers and guest memory; no Rust reference to that
//! memory exists meanwhile, which the guest may be changing. A batch has fewer runs than one call
//! takes parts (`IOV_MAX`, limits.h).

#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use devices::GuestRam;
use devices::memory::WriteLog;
use migration::PageRun;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

/// Sends `head` and then the pages of `runs`.
///
/// # Errors
/// The connection's; [`io::ErrorKind::TimedOut`] when it makes no progress;
/// [`io::ErrorKind::InvalidInput`] for pages that are not RAM.
pub fn send_pages(
    ram: &GuestRam,
    head: &[u8],
    runs: &[PageRun],
    socket: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut parts = vec![libc::iovec {
        iov_base: head.as_ptr().cast_mut().cast(),
        iov_len: head.len(),
    }];
    for run in runs {
        parts.push(find(ram, *run)?.part()?);
    }
    while !parts.is_empty() {
        let message = message(&mut parts);
        let count = moved(|| {
            // SAFETY: the parts are `head`, borrowed here, and mappings of guest memory that
            // `ram` keeps alive; they are only read.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
        });
        advance(&mut parts, count?);
    }
    Ok(())
}

/// Fills the pages of `runs`, and marks them as written.
///
/// # Errors
/// As [`send_pages`], and [`io::ErrorKind::UnexpectedEof`] when the peer ends before.
pub fn receive_pages(ram: &GuestRam, runs: &[PageRun], socket: BorrowedFd<'_>) -> io::Result<()> {
    let places = runs.iter().map(|run| find(ram, *run));
    let places: Vec<_> = places.collect::<Result<_, _>>()?;
    let parts = places.iter().map(Place::part);
    let mut parts: Vec<_> = parts.collect::<Result<_, _>>()?;
    while !parts.is_empty() {
        let mut message = message(&mut parts);
        let count = moved(|| {
            // SAFETY: the parts are mappings of guest memory that `ram` keeps alive, and only
            // ever accessed through volatile reads and writes.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) }
        });
        match count? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => advance(&mut parts, count),
        }
    }
    for place in places {
        let bitmap = place.region.bitmap();
        bitmap.mark_dirty(place.offset, place.bytes);
    }
    Ok(())
}

/// Where a run lies.
struct Place<'a> {
    region: &'a GuestRegionMmap<WriteLog>,
    /// In the region.
    offset: usize,
    bytes: usize,
}

impl Place<'_> {
    /// As this process maps it.
    fn part(&self) -> io::Result<libc::iovec> {
        let offset = MemoryRegionAddress(self.offset as u64);
        let host = self.region.get_host_address(offset);
        Ok(libc::iovec {
            iov_base: host.map_err(io::Error::other)?.cast(),
            iov_len: self.bytes,
        })
    }
}

fn find(ram: &GuestRam, run: PageRun) -> io::Result<Place<'_>> {
    let outside = || {
        let text = format!("pages {} to {} are not RAM", run.start.0, run.end().0);
        io::Error::new(io::ErrorKind::InvalidInput, text)
    };
    let start = run.start.gpa().ok_or_else(outside)?;
    let region = ram.find_region(GuestAddress(start)).ok_or_else(outside)?;
    let offset = start - region.start_addr().0;
    if offset + run.bytes() > region.len() {
        return Err(outside());
    }
    Ok(Place {
        region,
        offset: usize::try_from(offset).map_err(io::Error::other)?,
        bytes: usize::try_from(run.bytes()).map_err(io::Error::other)?,
    })
}

fn message(parts: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a message without name, data and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len();
    message
}

/// Drops the first `count` bytes of `parts`.
fn advance(parts: &mut Vec<libc::iovec>, mut count: usize) {
    let whole = parts.iter().take_while(|part| {
        let is_done = part.iov_len <= count;
        count -= if is_done { part.iov_len } else { 0 };
        is_done
    });
    let whole = whole.count();
    parts.drain(..whole);
    if let Some(first) = parts.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(count);
        first.iov_len -= count;
    }
}

/// Bytes that a call has moved; repeats what a signal interrupts, and calls an expired time-out,
/// the kernel's `EAGAIN`, by its name.
fn moved(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => {
                let text = "the peer made no progress in time";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            _ => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
