//! A connection over a TCP or unix socket.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use migration::ports::{Breaker, Channel};
use socket2::{Domain, Socket, TcpKeepalive};

use super::poll;

/// How long a connection waits until it is told otherwise.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// Most buffers of one system call (`IOV_MAX`, limits.h).
const BUFFERS_MAX: usize = 1024;
/// Bytes that the kernel takes beyond what the network has taken (`TCP_NOTSENT_LOWAT`). It would
/// take several MiB: a slow connection would seem a fast one for as long, and what is urgent would
/// queue behind them.
const UNSENT_MAX_BYTES: u32 = 512 << 10;
/// When and how often the kernel asks an idle peer whether it is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TRIES: u32 = 3;
/// The kernel gives a connection up after this at the earliest, see [`set_timeouts`].
const USER_TIMEOUT_MIN: Duration = Duration::from_secs(20);

/// A connection that sends bytes as they are.
#[derive(Debug)]
pub(super) struct SocketChannel {
    socket: Socket,
    breaker: Arc<SocketBreaker>,
}

impl SocketChannel {
    /// Takes over a connected socket.
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        prepare(&socket)?;
        let breaker = Arc::new(SocketBreaker::new(&socket)?);
        Ok(Self { socket, breaker })
    }
}

impl Read for SocketChannel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        receive(&self.socket, buf)
    }
}

impl Write for SocketChannel {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        waited(|| self.socket.send_with_flags(buf, libc::MSG_NOSIGNAL))
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        send(&self.socket, bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Channel for SocketChannel {
    fn set_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        set_timeouts(&self.socket, timeout)
    }

    fn breaker(&self) -> Arc<dyn Breaker> {
        Arc::clone(&self.breaker) as Arc<dyn Breaker>
    }

    fn is_congested(&self) -> bool {
        poll::is_full(self.socket.as_fd())
    }

    fn unconfirmed_bytes(&self) -> io::Result<usize> {
        unconfirmed_bytes(&self.socket)
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }
}

/// Ends a connection. Holds a descriptor of its own, so that it never shuts down what else may
/// have got the number.
#[derive(Debug)]
pub(super) struct SocketBreaker(Socket);

impl SocketBreaker {
    pub(super) fn new(socket: &Socket) -> io::Result<Self> {
        socket.try_clone().map(Self)
    }
}

impl Breaker for SocketBreaker {
    fn break_off(&self) {
        // Fails only where the connection has ended already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Sets what every connection has: it blocks, sends small messages at once, has time-outs and
/// notices a dead peer.
pub(super) fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    if !is_unix(socket)? {
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_notsent_lowat(UNSENT_MAX_BYTES)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_TRIES);
        socket.set_tcp_keepalive(&keepalive)?;
    }
    set_timeouts(socket, DEFAULT_TIMEOUT)
}

/// Sets how long reads and writes wait for progress.
///
/// `TCP_USER_TIMEOUT` ends a connection whose peer does not answer, and also one whose peer
/// answers but does not read. Those who wait may try again, so it is longer than their time-out.
pub(super) fn set_timeouts(socket: &Socket, timeout: Duration) -> io::Result<()> {
    // Zero would mean for ever.
    let timeout = timeout.max(Duration::from_millis(1));
    socket.set_read_timeout(Some(timeout))?;
    socket.set_write_timeout(Some(timeout))?;
    if !is_unix(socket)? {
        let patience = timeout.saturating_mul(2).max(USER_TIMEOUT_MIN);
        socket.set_tcp_user_timeout(Some(patience))?;
    }
    Ok(())
}

/// Bytes that the peer's host has not confirmed; with a unix socket, that nobody has read.
pub(super) fn unconfirmed_bytes(socket: &Socket) -> io::Result<usize> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    if poll::is_hung_up(socket.as_fd())? {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    poll::unconfirmed_bytes(socket.as_fd())
}

fn is_unix(socket: &Socket) -> io::Result<bool> {
    Ok(socket.domain()? == Domain::UNIX)
}

/// Reads what there is.
pub(super) fn receive(mut socket: &Socket, buf: &mut [u8]) -> io::Result<usize> {
    waited(|| socket.read(buf))
}

/// Writes from several buffers at once.
pub(super) fn send(socket: &Socket, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
    let bufs = bufs.get(..BUFFERS_MAX).unwrap_or(bufs);
    waited(|| socket.send_vectored_with_flags(bufs, libc::MSG_NOSIGNAL))
}

/// Repeats what a signal interrupts; an expired time-out, which the kernel calls `EAGAIN`, is
/// called by its name.
pub(super) fn waited<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(timed_out());
            }
            result => return result,
        }
    }
}

/// What a wait for the peer ends with.
pub(super) fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the peer made no progress in time")
}
