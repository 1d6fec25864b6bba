//! poll(2) over a handful of descriptors, regular files among them.

#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    Readable,
    Writable,
}

/// What happened to a descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ready {
    /// It can be read or written, as asked for.
    pub(super) ready: bool,
    /// The other side is gone.
    pub(super) hangup: bool,
}

/// Waits until one of `sources` is ready, or for `timeout`; results are in the same order. `None`
/// is never ready.
pub(super) fn wait(
    sources: &[Option<(BorrowedFd<'_>, Interest)>],
    timeout: Option<Duration>,
) -> io::Result<Vec<Ready>> {
    let mut fds: Vec<_> = sources
        .iter()
        .map(|source| libc::pollfd {
            // poll skips negative descriptors.
            fd: source.map_or(-1, |(fd, _)| fd.as_raw_fd()),
            events: match source {
                Some((_, Interest::Writable)) => libc::POLLOUT,
                _ => libc::POLLIN,
            },
            revents: 0,
        })
        .collect();
    let count = libc::nfds_t::try_from(fds.len()).map_err(io::Error::other)?;
    let millis = timeout.map_or(-1, |t| libc::c_int::try_from(t.as_millis()).unwrap_or(-1));
    // SAFETY: the array outlives the call and its length is given; the descriptors are borrowed.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), count, millis) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::Interrupted => Ok(vec![Ready::default(); sources.len()]),
            _ => Err(error),
        };
    }
    let ready = |fd: &libc::pollfd| Ready {
        ready: fd.revents & (libc::POLLIN | libc::POLLOUT) != 0,
        hangup: fd.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0,
    };
    Ok(fds.iter().map(ready).collect())
}

/// A borrow of an event descriptor, which does not offer one itself.
pub(super) fn borrow(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
