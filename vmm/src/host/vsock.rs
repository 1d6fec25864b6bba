//! Unix sockets behind the guest's socket device.
//!
//! `PATH` takes connections to the guest; a connection of the guest to port P of the host goes to
//! whoever listens at `PATH_P`.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;

use devices::virtio::vsock::{HostStream, VsockHost};

use super::socket_file::{ListenError, SocketFile, connect};
use crate::config::VsockConfig;

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

/// A listening unix socket, and its namesakes by port.
#[derive(Debug)]
pub struct UnixVsock {
    socket: SocketFile,
}

impl UnixVsock {
    /// Listens where `config` says, for the owner only. A socket that a dead process has left
    /// there is replaced.
    ///
    /// # Errors
    /// [`VsockHostError`] names the path.
    pub fn open(config: &VsockConfig) -> Result<Self, VsockHostError> {
        let path = &config.socket;
        let socket = SocketFile::open(path).map_err(|error| match error {
            ListenError::InUse => VsockHostError::InUse(path.clone()),
            ListenError::Host(source) => VsockHostError::Listen {
                path: path.clone(),
                source,
            },
        })?;
        Ok(Self { socket })
    }

    /// Where connections of the guest to `port` go.
    fn port_path(&self, port: u32) -> PathBuf {
        let mut path = OsString::from(self.socket.path());
        path.push(format!("_{port}"));
        path.into()
    }
}

impl AsRawFd for UnixVsock {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.listener().as_raw_fd()
    }
}

impl VsockHost for UnixVsock {
    fn accept(&mut self) -> io::Result<Box<dyn HostStream>> {
        let (stream, _) = self.socket.listener().accept()?;
        stream.set_nonblocking(true)?;
        Ok(Box::new(stream))
    }

    fn connect(&mut self, port: u32) -> io::Result<Box<dyn HostStream>> {
        Ok(Box::new(connect(&self.port_path(port))?))
    }
}

#[cfg(test)]
mod tests;
