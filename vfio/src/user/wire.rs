//! Messages over a socket.

use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::protocol::{HEADER_BYTES, Header, Payload};

/// Bytes that are handed to the kernel at once: about what a socket takes without having to wait
/// twice, so that the socket's time limit is close to ours.
const CHUNK_BYTES: usize = 32 << 10;

/// Waits until something has come, or nothing will.
///
/// # Errors
/// The kernel's.
pub(super) fn wait_readable(stream: &UnixStream) -> io::Result<()> {
    let mut events = [PollFd::new(stream, PollFlags::IN)];
    retry_on_intr(|| poll(&mut events, None))?;
    Ok(())
}

/// The next message's header and the descriptor that came with it; `None` when the other side has
/// closed the connection.
///
/// It is `rustix` that receives: `recv_with_fd` of `vmm-sys-util` 0.15 forgets the second one of
/// two descriptors without closing it, and does not set `O_CLOEXEC`.
///
/// There is room for one descriptor, which is what this side allows (`max_msg_fds`). When more
/// come, all of them are closed and it is an error. Without `takes_files` there is room for none: the
/// kernel drops what comes, and this process never has it. For to close a descriptor may take as long as
/// its file system likes, and not even SIGKILL ends that.
///
/// # Errors
/// The socket's, [`io::ErrorKind::UnexpectedEof`] in the middle of the header, or `ENOBUFS`.
pub(super) fn receive_header(
    stream: &UnixStream,
    takes_files: bool,
) -> io::Result<Option<(Header, Option<File>)>> {
    let mut bytes = [0; HEADER_BYTES];
    let mut filled = 0;
    let mut file = None;
    while filled < HEADER_BYTES {
        let (len, received) = receive_part(stream, &mut bytes[filled..], takes_files)?;
        if len == 0 {
            return match filled {
                0 => Ok(None),
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            };
        }
        filled += len;
        file = file.or(received);
    }
    let (header, _) = Header::decode(&bytes).map_err(io::Error::other)?;
    Ok(Some((header, file)))
}

/// Some bytes, and the descriptor that came with them.
fn receive_part(
    stream: &UnixStream,
    bytes: &mut [u8],
    takes_files: bool,
) -> io::Result<(usize, Option<File>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = match takes_files {
        true => RecvAncillaryBuffer::new(&mut space),
        false => RecvAncillaryBuffer::default(),
    };
    let mut parts = [IoSliceMut::new(bytes)];
    let received =
        retry_on_intr(|| recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC))?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            files.extend(descriptors.map(File::from));
        }
    }
    // The kernel pads the room for one, so that two fit; with three and more it says so.
    if files.len() > 1 || takes_files && received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
    }
    Ok((received.bytes, files.pop()))
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
