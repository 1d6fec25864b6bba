//! Sockets from the service manager: sd_listen_fds(3).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Socket, Type};

use super::error::LinkError;

/// The first descriptor that is handed over (`SD_LISTEN_FDS_START`).
const FIRST_FD: RawFd = 3;

/// What was handed over.
pub(super) enum Inherited {
    /// A socket that listens; it does not block.
    Listening(Socket),
    /// A connection.
    Connected(Socket),
}

/// Takes what was handed over to this process, once.
pub(super) fn take() -> Result<Option<Inherited>, LinkError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let variable = |name| std::env::var(name).ok();
    let (pid, count) = (variable("LISTEN_PID"), variable("LISTEN_FDS"));
    if !is_for_us(pid.as_deref(), count.as_deref(), std::process::id())? {
        return Ok(None);
    }
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Err(LinkError::Activation("the socket has been taken already"));
    }
    // SAFETY: F_GETFD takes no argument, and any number may be asked about.
    if unsafe { libc::fcntl(FIRST_FD, libc::F_GETFD) } < 0 {
        return Err(LinkError::Inherited(io::Error::last_os_error()));
    }
    // SAFETY: it is open, by the protocol it was opened for whoever LISTEN_PID names, and it is
    // taken only once.
    let fd = unsafe { OwnedFd::from_raw_fd(FIRST_FD) };
    classify(fd).map(Some)
}

/// Whether exactly one descriptor is meant for process `id`.
fn is_for_us(pid: Option<&str>, count: Option<&str>, id: u32) -> Result<bool, LinkError> {
    let (Some(pid), Some(count)) = (pid, count) else {
        return Ok(false);
    };
    let pid: u32 = pid
        .parse()
        .map_err(|_| LinkError::Activation("LISTEN_PID is not a number"))?;
    let count: u32 = count
        .parse()
        .map_err(|_| LinkError::Activation("LISTEN_FDS is not a number"))?;
    match count {
        // Variables of another process that were passed on.
        _ if pid != id => Ok(false),
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(LinkError::Activation(
            "several sockets were handed over, one is needed",
        )),
    }
}

fn classify(fd: OwnedFd) -> Result<Inherited, LinkError> {
    // SAFETY: F_SETFD takes an integer; the descriptor is owned.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(LinkError::Inherited(io::Error::last_os_error()));
    }
    let socket = Socket::from(fd);
    let kind = socket.r#type().map_err(LinkError::Inherited)?;
    if kind != Type::STREAM {
        return Err(LinkError::Activation("the socket is not a stream socket"));
    }
    if socket.is_listener().map_err(LinkError::Inherited)? {
        let prepared = socket.set_nonblocking(true);
        prepared.map_err(LinkError::Inherited)?;
        return Ok(Inherited::Listening(socket));
    }
    socket.peer_addr().map_err(LinkError::Inherited)?;
    Ok(Inherited::Connected(socket))
}
