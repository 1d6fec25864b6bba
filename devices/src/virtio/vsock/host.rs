//! The port behind a socket device.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// The host's end of a connection. Reading and writing never wait.
pub trait HostStream: Read + Write + AsRawFd + Send {
    /// Ends one or both directions, as shutdown(2) does.
    ///
    /// # Errors
    /// The host's answer; the other side may be gone.
    fn shutdown(&self, how: Shutdown) -> io::Result<()>;
}

impl HostStream for UnixStream {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        UnixStream::shutdown(self, how)
    }
}

/// Where connections come from and go to on the host. The descriptor is readable when a client
/// waits to be accepted.
pub trait VsockHost: AsRawFd + Send {
    /// Accepts a client that wants to reach the guest.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when none waits; anything else is the host's trouble.
    fn accept(&mut self) -> io::Result<Box<dyn HostStream>>;

    /// Connects to whoever serves `port`, without waiting.
    ///
    /// # Errors
    /// Nobody does, or the host's answer.
    fn connect(&mut self, port: u32) -> io::Result<Box<dyn HostStream>>;
}
