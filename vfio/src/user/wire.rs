//! Messages over a socket.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::protocol::{HEADER_BYTES, Header, Payload};

/// Bytes that are handed to the kernel at once: about what a socket takes without having to wait
/// twice, so that the socket's time limit is close to ours.
const CHUNK_BYTES: usize = 32 << 10;

/// The next message's header and the descriptor that came with it; `None` when the other side has
/// closed the connection.
///
/// There is room for one descriptor, which is what this side allows (`max_msg_fds`). When more
/// come, the kernel and `recv_with_fd` close them all and it is an error.
///
/// # Errors
/// The socket's, or [`io::ErrorKind::UnexpectedEof`] in the middle of the header.
pub(super) fn receive_header(stream: &UnixStream) -> io::Result<Option<(Header, Option<File>)>> {
    let mut bytes = [0; HEADER_BYTES];
    let mut filled = 0;
    let mut file = None;
    while filled < HEADER_BYTES {
        let (len, received) = match stream.recv_with_fd(&mut bytes[filled..]) {
            Err(error) if error.errno() == libc::EINTR => continue,
            result => result.map_err(io::Error::from)?,
        };
        if len == 0 {
            return match filled {
                0 => Ok(None),
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            };
        }
        filled += len;
        // A copy of the descriptor is not inherited by programs that this process starts.
        let received = received.map(|file| file.try_clone()).transpose()?;
        file = file.or(received);
    }
    let (header, _) = Header::decode(&bytes).map_err(io::Error::other)?;
    Ok(Some((header, file)))
}

/// The `len` bytes that follow a header. Descriptors that come with them are closed.
///
/// # Errors
/// The socket's.
pub(super) fn receive_payload(mut stream: &UnixStream, len: usize) -> io::Result<Vec<u8>> {
    let mut payload = vec![0; len];
    stream.read_exact(&mut payload)?;
    Ok(payload)
}

/// Sends a message, with `descriptors`, which are open, at its first byte.
///
/// # Errors
/// The socket's, or [`io::ErrorKind::TimedOut`].
pub(super) fn send(
    stream: &UnixStream,
    message: &[u8],
    descriptors: &[RawFd],
    deadline: Instant,
) -> io::Result<()> {
    let mut sent = 0;
    while sent < message.len() {
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let chunk = &message[sent..message.len().min(sent + CHUNK_BYTES)];
        let descriptors = if sent == 0 { descriptors } else { &[] };
        match stream.send_with_fds(&[chunk], descriptors) {
            Err(error) if error.errno() == libc::EINTR => {}
            // The socket's own time limit.
            Err(error) if error.errno() == libc::EAGAIN => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            result => sent += result.map_err(io::Error::from)?,
        }
    }
    Ok(())
}
