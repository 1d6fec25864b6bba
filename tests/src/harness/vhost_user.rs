//! A vhost-user server: QEMU's storage daemon, and one that makes it look poorer than it is.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::Context;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::process;
use super::vm::SOON;

/// A server of one disk. Dropping it kills it.
#[derive(Debug)]
pub struct Server(Child);

impl Server {
    /// Serves the raw image `path` at `socket`.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn start(path: &Path, socket: &Path) -> anyhow::Result<Self> {
        Self::with_locking(path, socket, "auto")
    }

    /// The same without a lock on the image, which other servers may have, too.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn start_unlocked(path: &Path, socket: &Path) -> anyhow::Result<Self> {
        Self::with_locking(path, socket, "off")
    }

    fn with_locking(path: &Path, socket: &Path, locking: &str) -> anyhow::Result<Self> {
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!(
            "driver=file,node-name=file,locking={locking},filename={}",
            path.display()
        ));
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=export,node-name=file,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ));
        process::die_with_parent(&mut command, libc::SIGKILL);
        let server = Self(command.stdin(Stdio::null()).spawn()?);
        let there = || socket.exists().then_some(());
        let up = process::wait_until(Instant::now() + SOON, there);
        up.context("qemu-storage-daemon does not listen")?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `VHOST_USER_GET_PROTOCOL_FEATURES`, the header's length, and the feature of a log.
const GET_PROTOCOL_FEATURES: u32 = 15;
const HEADER_BYTES: usize = 12;
const LOG_SHMFD: u8 = 1 << 1;

/// Serves one connection to `socket` by the server at `target`, which then offers no log of its
/// writes.
///
/// # Errors
/// When nothing can listen at `socket`.
pub fn without_log(target: &Path, socket: &Path) -> anyhow::Result<()> {
    let listener = UnixListener::bind(socket)?;
    let target = target.to_owned();
    thread::spawn(move || {
        // The connection's end is how it ends.
        let _ = screen(&listener, &target);
    });
    Ok(())
}

fn screen(listener: &UnixListener, target: &Path) -> io::Result<()> {
    let (front, _) = listener.accept()?;
    let back = UnixStream::connect(target)?;
    let (requests, server) = (front.try_clone()?, back.try_clone()?);
    thread::spawn(move || {
        let _ = pass_requests(&requests, &server);
        let _ = server.shutdown(Shutdown::Both);
    });
    let answered = pass_answers(&back, &front);
    let _ = front.shutdown(Shutdown::Both);
    answered
}

/// Bytes and descriptors as they come.
fn pass_requests(mut from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    loop {
        let mut bytes = [0; 4096];
        let (count, file): (usize, Option<File>) = from.recv_with_fd(&mut bytes)?;
        let message = bytes.get(..count).unwrap_or_default();
        let sent = match &file {
            _ if count == 0 => return from.read(&mut [0]).map(drop),
            Some(file) => to.send_with_fd(message, file.as_raw_fd())?,
            None => 0,
        };
        let mut to = to;
        to.write_all(message.get(sent..).unwrap_or_default())?;
    }
}

/// Answers, with less in the one that says what the server can do.
fn pass_answers(mut from: &UnixStream, mut to: &UnixStream) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER_BYTES];
        from.read_exact(&mut header)?;
        let word = |at: usize| {
            let bytes = header.get(at..).and_then(<[u8]>::first_chunk);
            u32::from_le_bytes(bytes.copied().unwrap_or_default())
        };
        let (request, size) = (word(0), word(8));
        let mut payload = vec![0; size as usize];
        from.read_exact(&mut payload)?;
        if let (GET_PROTOCOL_FEATURES, Some(byte)) = (request, payload.first_mut()) {
            *byte &= !LOG_SHMFD;
        }
        to.write_all(&[&header[..], &payload].concat())?;
    }
}
