//! Unix sockets behind the guest's socket device.
//!
//! `PATH` takes connections to the guest; a connection of the guest to port P of the host goes to
//! whoever listens at `PATH_P`.

#![expect(unsafe_code)]

use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use devices::virtio::vsock::{HostStream, VsockHost};

use super::chardev::remove_stale_socket;
use crate::config::VsockConfig;

/// Clients that may wait to be accepted.
const BACKLOG: libc::c_int = 128;

/// The host's end of the socket device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum VsockHostError {
    /// Somebody else listens there.
    #[error("{}: another process listens there", .0.display())]
    InUse(PathBuf),
    /// The host refused.
    #[error("{}: cannot listen there for connections to the guest", path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// A listening unix socket, removed at the end, and its namesakes by port.
#[derive(Debug)]
pub struct UnixVsock {
    path: PathBuf,
    listener: UnixListener,
    /// Device and inode of what was put at `path`.
    identity: (u64, u64),
}

impl UnixVsock {
    /// Listens where `config` says, for the owner only. A socket that a dead process has left
    /// there is replaced.
    ///
    /// # Errors
    /// [`VsockHostError`] names the path.
    pub fn open(config: &VsockConfig) -> Result<Self, VsockHostError> {
        let path = config.socket.clone();
        let failed = |source| VsockHostError::Listen {
            path: path.clone(),
            source,
        };
        match connect(&path) {
            Ok(_) => return Err(VsockHostError::InUse(path)),
            // Somebody listens, only too many want to talk to them.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(VsockHostError::InUse(path));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                remove_stale_socket(&path).map_err(failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = listen(&path).map_err(failed)?;
        let metadata = std::fs::symlink_metadata(&path).map_err(failed)?;
        let identity = (metadata.dev(), metadata.ino());
        Ok(Self {
            path,
            listener,
            identity,
        })
    }

    /// Where connections of the guest to `port` go.
    fn port_path(&self, port: u32) -> PathBuf {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        path.into()
    }
}

impl AsRawFd for UnixVsock {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl VsockHost for UnixVsock {
    fn accept(&mut self) -> io::Result<Box<dyn HostStream>> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(Box::new(stream))
    }

    fn connect(&mut self, port: u32) -> io::Result<Box<dyn HostStream>> {
        Ok(Box::new(connect(&self.port_path(port))?))
    }
}

impl Drop for UnixVsock {
    fn drop(&mut self) {
        let metadata = std::fs::symlink_metadata(&self.path);
        // Whatever else may have been put there meanwhile is not ours to remove.
        let ours = metadata.is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            log::warn!(path:% = self.path.display(), error:%; "vsock socket could not be removed");
        }
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

fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket()?;
    let (address, len) = address(path)?;
    // SAFETY: the address outlives the call, and `len` of its bytes are initialized.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    check(result)?;
    Ok(socket.into())
}

fn listen(path: &Path) -> io::Result<UnixListener> {
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

#[cfg(test)]
mod tests;
