//! Listening unix sockets in the file system.

#![expect(unsafe_code)]

use std::fs::{File, Permissions};
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Clients that may wait to be accepted.
const BACKLOG: libc::c_int = 128;

/// Why nobody can listen at a path.
#[derive(Debug)]
pub(crate) enum ListenError {
    /// Somebody does already.
    InUse,
    /// The host refuses.
    Host(io::Error),
}

/// A listening socket, removed at the end.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    listener: UnixListener,
    /// Device and inode of what was put at `path`.
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`, for the owner only. A socket that a dead process has left there is
    /// replaced.
    pub(crate) fn open(path: &Path) -> Result<Self, ListenError> {
        match connect(path) {
            Ok(_) => return Err(ListenError::InUse),
            // Somebody listens, only too many want to talk to them.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(ListenError::InUse);
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                remove_stale_socket(path).map_err(ListenError::Host)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(ListenError::Host(error)),
        }
        let listener = listen(path).map_err(ListenError::Host)?;
        let metadata = std::fs::symlink_metadata(path).map_err(ListenError::Host)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let metadata = std::fs::symlink_metadata(&self.path);
        // Whatever else may have been put there meanwhile is not ours to remove.
        let ours = metadata.is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            log::warn!(path:% = self.path.display(), error:%; "socket could not be removed");
        }
    }
}

/// Whom files that this process makes belong to.
pub(crate) fn effective_uid() -> u32 {
    // SAFETY: a plain system call that cannot fail.
    unsafe { libc::geteuid() }
}

/// Removes `path` if it is a socket; anything else is left for `bind` to complain about.
pub(crate) fn remove_stale_socket(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => std::fs::remove_file(path),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// A unix socket that never makes its user wait, connect(2) included: there the standard
/// library's would wait for a listener whose backlog is full.
fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Connects to whoever listens at `path`, without waiting for them.
///
/// # Errors
/// The kernel's; [`io::ErrorKind::WouldBlock`] when too many wait already.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket()?;
    let (address, len) = address(path)?;
    // SAFETY: the address outlives the call, and `len` of its bytes are initialized.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    check(result)?;
    Ok(socket.into())
}

/// Listens at `path`, where nothing may be, for the owner only.
///
/// # Errors
/// The kernel's.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = File::from(socket()?);
    // The file gets its mode from the socket, so that nobody else can ever open it.
    socket.set_permissions(Permissions::from_mode(0o600))?;
    let (address, len) = address(path)?;
    // SAFETY: the address outlives the call, and `len` of its bytes are initialized.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    check(result)?;
    // SAFETY: no memory is passed.
    let result = unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) };
    check(result)?;
    Ok(OwnedFd::from(socket).into())
}

/// `path` as an address, and how many of its bytes count.
fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: sockaddr_un is an integer and an array of them, for which all zeroes is a value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    // One byte is left for the NUL at the end.
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() >= address.sun_path.len() {
        let text = format!("{:?} cannot be the address of a socket", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    address.sun_family = libc::AF_UNIX.try_into().map_err(io::Error::other)?;
    for (slot, byte) in address.sun_path.iter_mut().zip(bytes) {
        *slot = byte.cast_signed();
    }
    let len = offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
    let len = libc::socklen_t::try_from(len).map_err(io::Error::other)?;
    Ok((address, len))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
