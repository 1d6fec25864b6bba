//! Waiting for one socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

/// What is left until `deadline`; an error of kind `TimedOut` once it has passed.
pub(super) fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

/// Waits until `socket` can be read, or accepts.
///
/// # Errors
/// Kind `TimedOut` when the deadline passes.
pub(super) fn wait_readable(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
    wait(socket, libc::POLLIN, deadline)
}

/// Waits until `socket` can be written, or has connected or failed to.
///
/// # Errors
/// Kind `TimedOut` when the deadline passes.
pub(super) fn wait_writable(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
    wait(socket, libc::POLLOUT, deadline)
}

fn wait(socket: BorrowedFd<'_>, events: libc::c_short, deadline: Instant) -> io::Result<()> {
    loop {
        // Rounded up, so that the last millisecond is not spent asking again and again.
        let millis = remaining(deadline)?.as_millis().saturating_add(1);
        let millis = libc::c_int::try_from(millis).unwrap_or(libc::c_int::MAX);
        match poll(socket, events, millis) {
            Ok(0) => {}
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Bytes that wait to be sent from which on a connection is full: they keep the network busy while
/// the next ones are made smaller.
const FULL_BYTES: libc::c_int = 16 << 10;

/// `SIOCOUTQNSD` (linux/sockios.h): bytes that TCP has not sent yet.
const SIOCOUTQNSD: libc::c_ulong = 0x894b;

/// `SIOCOUTQ` (linux/sockios.h): bytes that the peer's host has not confirmed yet.
const SIOCOUTQ: libc::c_ulong = libc::TIOCOUTQ;

/// Bytes that were written and are not confirmed.
pub(super) fn unconfirmed_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes one int.
    let rc = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCOUTQ, &raw mut bytes) };
    match rc {
        0 => Ok(usize::try_from(bytes).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the connection has ended in both directions.
pub(super) fn is_hung_up(socket: BorrowedFd<'_>) -> io::Result<bool> {
    // The kernel tells this without being asked for events.
    Ok(poll(socket, 0, 0)? > 0)
}

/// Whether more waits to be sent than keeps the network busy, or a write would wait. A broken
/// connection does not make anybody wait.
pub(super) fn is_full(socket: BorrowedFd<'_>) -> bool {
    let mut unsent: libc::c_int = 0;
    // SAFETY: the request writes one int. A socket other than TCP's refuses it.
    unsafe { libc::ioctl(socket.as_raw_fd(), SIOCOUTQNSD, &raw mut unsent) };
    unsent > FULL_BYTES || matches!(poll(socket, libc::POLLOUT, 0), Ok(0))
}

/// The events that happened, of those asked for and the exceptional ones.
fn poll(socket: BorrowedFd<'_>, events: libc::c_short, millis: i32) -> io::Result<libc::c_short> {
    let mut polled = libc::pollfd {
        fd: socket.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: the pointer is to one pollfd structure, whose descriptor is borrowed.
    let result = unsafe { libc::poll(&raw mut polled, 1, millis) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(polled.revents)
}
