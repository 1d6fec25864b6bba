//! What a guest's byte stream is connected to.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::terminal::{RawTerminal, open_pty};
use crate::config::CharTarget;
use crate::host::socket_file::{ListenError, SocketFile};

/// A host end could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// A file.
    #[error("{}: cannot be opened for the guest's output", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// A socket.
    #[error("{}: cannot listen there", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Somebody else listens there.
    #[error("{}: another process listens there", .0.display())]
    InUse(PathBuf),
    /// A terminal, our own or a new one.
    #[error("{what}")]
    Terminal {
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// The host end of a byte stream, opened.
#[derive(Debug)]
pub enum Endpoint {
    /// Output is dropped, there is no input.
    Null,
    /// Standard input and output; the terminal is raw while this lives.
    Stdio {
        /// Standard input.
        input: File,
        /// Standard output.
        output: File,
        /// `None` when standard input is not a terminal.
        raw: Option<RawTerminal>,
    },
    /// Output is appended.
    File(File),
    /// A pseudo-terminal.
    Pty {
        /// Our side.
        main: File,
        /// The other side, kept open so that ours never reads as hung up.
        held: File,
        /// What others open.
        path: PathBuf,
    },
    /// A socket and the client that is connected, if any.
    Socket {
        /// Where clients connect.
        socket: SocketFile,
        /// One at a time.
        client: Option<UnixStream>,
    },
}

impl Endpoint {
    /// Opens `target`.
    ///
    /// # Errors
    /// [`EndpointError`] names the path.
    pub fn open(target: &CharTarget) -> Result<Self, EndpointError> {
        match target {
            CharTarget::Null => Ok(Self::Null),
            CharTarget::Stdio => open_stdio().map_err(|source| EndpointError::Terminal {
                what: "the terminal could not be set up",
                source,
            }),
            CharTarget::File(path) => {
                let file = File::options().append(true).create(true).open(path);
                file.map(Self::File).map_err(|source| EndpointError::File {
                    path: path.clone(),
                    source,
                })
            }
            CharTarget::Pty => {
                let failed = |source| EndpointError::Terminal {
                    what: "no pseudo-terminal could be opened",
                    source,
                };
                let (main, path) = open_pty().map_err(failed)?;
                let mut options = File::options();
                options.read(true).write(true).custom_flags(libc::O_NOCTTY);
                let held = options.open(&path).map_err(failed)?;
                Ok(Self::Pty { main, held, path })
            }
            CharTarget::Socket(path) => listen(path),
        }
    }

    /// What a person or program opens to reach the guest, if there is such a thing.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Pty { path, .. } => Some(path),
            Self::Socket { socket, .. } => Some(socket.path()),
            Self::Null | Self::Stdio { .. } | Self::File(_) => None,
        }
    }

    /// The descriptor to wait on for input.
    pub(super) fn input(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Null | Self::File(_) => None,
            Self::Stdio { input, .. } => Some(input.as_fd()),
            Self::Pty { main, .. } => Some(main.as_fd()),
            Self::Socket { socket, client } => {
                let listener = socket.listener().as_fd();
                Some(client.as_ref().map_or(listener, AsFd::as_fd))
            }
        }
    }

    /// The descriptor to wait on before output; `None`: output goes nowhere or never waits.
    pub(super) fn output(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Null | Self::File(_) => None,
            Self::Stdio { output, .. } => Some(output.as_fd()),
            Self::Pty { main, .. } => Some(main.as_fd()),
            Self::Socket { client, .. } => client.as_ref().map(AsFd::as_fd),
        }
    }

    /// Reads what there is. `Ok(0)`: no more input will come. A waiting client is accepted, which
    /// reads as [`io::ErrorKind::WouldBlock`].
    pub(super) fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Null | Self::File(_) => Ok(0),
            Self::Stdio { input, .. } => input.read(buf),
            Self::Pty { main, .. } => main.read(buf),
            Self::Socket { socket, client } => match client {
                Some(stream) => match stream.read(buf) {
                    Ok(0) => {
                        *client = None;
                        Err(io::ErrorKind::WouldBlock.into())
                    }
                    result => result,
                },
                None => {
                    let (stream, _) = socket.listener().accept()?;
                    stream.set_nonblocking(true)?;
                    *client = Some(stream);
                    Err(io::ErrorKind::WouldBlock.into())
                }
            },
        }
    }

    /// Writes some of `data`; returns how much is done with. Where nobody listens it is dropped,
    /// as on a line with nothing plugged in.
    pub(super) fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Null => Ok(data.len()),
            Self::File(file) => file.write(data),
            Self::Stdio { output, .. } => output.write(data),
            Self::Pty { main, .. } => match main.write(data) {
                // Nobody reads, and its buffer is full.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(data.len()),
                result => result,
            },
            Self::Socket { client, .. } => match client {
                None => Ok(data.len()),
                Some(stream) => match stream.write(data) {
                    Err(error) if is_disconnect(&error) => {
                        *client = None;
                        Ok(data.len())
                    }
                    result => result,
                },
            },
        }
    }
}

/// The standard descriptors, duplicated: the standard library's handles buffer and lock.
fn open_stdio() -> io::Result<Endpoint> {
    let raw = RawTerminal::enter(io::stdin().as_fd())?;
    Ok(Endpoint::Stdio {
        input: io::stdin().as_fd().try_clone_to_owned()?.into(),
        output: io::stdout().as_fd().try_clone_to_owned()?.into(),
        raw,
    })
}

fn is_disconnect(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

fn listen(path: &Path) -> Result<Endpoint, EndpointError> {
    let socket = SocketFile::open(path).map_err(|error| match error {
        ListenError::InUse => EndpointError::InUse(path.to_owned()),
        ListenError::Host(source) => EndpointError::Socket {
            path: path.to_owned(),
            source,
        },
    })?;
    Ok(Endpoint::Socket {
        socket,
        client: None,
    })
}
