//! An established connection.

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::ports::{Breaker, Channel};
use rustls::Connection;
use socket2::Socket;

use crate::host::link::poll;
use crate::host::link::socket::{
    DEFAULT_TIMEOUT, SocketBreaker, prepare, receive, send, set_timeouts, timed_out,
    unconfirmed_bytes,
};

/// Most plaintext that one write takes: enough for the engine's largest, which is encrypted at
/// once and sent with few system calls.
const OUTGOING_MAX: usize = 512 << 10;
/// Bytes that one system call may receive. The library alone asks for 4 KiB at a time.
const INCOMING_BYTES: usize = 256 << 10;

/// A connection that is encrypted.
#[derive(Debug)]
pub(in crate::host::link) struct TlsChannel {
    connection: Connection,
    incoming: BufReader<Wire>,
    breaker: Arc<SocketBreaker>,
    timeout: Duration,
}

/// The socket as the library reads and writes it.
#[derive(Debug)]
struct Wire(Socket);

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        receive(&self.0, buf)
    }
}

/// The same for writing, while the buffer in front of reading owns the socket.
struct Outgoing<'a>(&'a Socket);

impl Write for Outgoing<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        send(self.0, &[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        send(self.0, bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TlsChannel {
    /// A connection whose handshake is still to be made.
    pub(super) fn new(mut connection: Connection, socket: Socket) -> io::Result<Self> {
        prepare(&socket)?;
        connection.set_buffer_limit(Some(OUTGOING_MAX));
        Ok(Self {
            breaker: Arc::new(SocketBreaker::new(&socket)?),
            connection,
            incoming: BufReader::with_capacity(INCOMING_BYTES, Wire(socket)),
            timeout: DEFAULT_TIMEOUT,
        })
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.incoming.get_ref().0
    }

    /// Sets the time-out of an established connection again.
    pub(super) fn restore_timeout(&self) -> io::Result<()> {
        set_timeouts(self.socket(), self.timeout)
    }

    /// Sends what is encrypted already.
    pub(super) fn send_records(&mut self) -> io::Result<()> {
        let mut outgoing = Outgoing(&self.incoming.get_ref().0);
        while self.connection.wants_write() {
            self.connection.write_tls(&mut outgoing)?;
        }
        Ok(())
    }

    /// Receives some bytes; 0 at the end.
    pub(super) fn receive_bytes(&mut self) -> io::Result<usize> {
        self.connection.read_tls(&mut self.incoming)
    }

    /// Decrypts what has been received.
    pub(super) fn take_records(&mut self) -> Result<(), rustls::Error> {
        self.connection.process_new_packets().map(drop)
    }

    /// Receives and decrypts.
    fn advance(&mut self) -> io::Result<()> {
        self.receive_bytes()?;
        let taken = self.take_records();
        taken.map_err(|error| {
            // The alert that tells the peer.
            let _ = self.send_records();
            io::Error::new(io::ErrorKind::InvalidData, error)
        })
    }

    /// What is decrypted already; `None` when that is nothing.
    fn read_plaintext(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        match self.connection.reader().read(buf) {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let text = "the connection ended without the peer's word";
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, text))
            }
            Err(error) => Err(error),
        }
    }

    /// Fills up `buf` with what has been received, without waiting.
    fn read_more(&mut self, buf: &mut [u8]) -> usize {
        let mut filled = 0;
        while filled < buf.len() && !self.incoming.buffer().is_empty() {
            // An error is met again by the next read.
            if self.advance().is_err() {
                break;
            }
            match self.read_plaintext(&mut buf[filled..]) {
                Ok(Some(0)) | Err(_) => break,
                Ok(count) => filled += count.unwrap_or(0),
            }
        }
        filled
    }

    /// Encrypts with `encrypt` and sends.
    fn write_with(
        &mut self,
        encrypt: impl FnOnce(&mut Connection) -> io::Result<usize>,
    ) -> io::Result<usize> {
        // When this fails, nothing of the new has been taken.
        self.send_records()?;
        let count = encrypt(&mut self.connection)?;
        // Now it has been, so an error has to wait for the next call.
        let _ = self.send_records();
        Ok(count)
    }
}

impl Read for TlsChannel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        // What a write that timed out has left may be what the peer waits for. Why it cannot be
        // sent is found in what can be read.
        match self.send_records() {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(error),
            _ => {}
        }
        let begin = Instant::now();
        let mut expired = false;
        loop {
            if let Some(count) = self.read_plaintext(buf)? {
                return Ok(count + self.read_more(&mut buf[count..]));
            }
            // A peer that sends a record byte by byte makes no progress.
            if expired {
                return Err(timed_out());
            }
            self.advance()?;
            expired = begin.elapsed() >= self.timeout;
        }
    }
}

impl Write for TlsChannel {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_with(|connection| connection.writer().write(buf))
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write_with(|connection| connection.writer().write_vectored(bufs))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_records()
    }
}

impl Channel for TlsChannel {
    fn set_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        self.timeout = timeout;
        self.restore_timeout()
    }

    fn breaker(&self) -> Arc<dyn Breaker> {
        Arc::clone(&self.breaker) as Arc<dyn Breaker>
    }

    fn is_congested(&self) -> bool {
        self.connection.wants_write() || poll::is_full(self.socket().as_fd())
    }

    fn unconfirmed_bytes(&self) -> io::Result<usize> {
        unconfirmed_bytes(self.socket())
    }
}

impl Drop for TlsChannel {
    fn drop(&mut self) {
        // Tells the peer that nothing was cut off, if that is possible at once.
        self.connection.send_close_notify();
        let _ = self.socket().set_nonblocking(true);
        let _ = self.send_records();
    }
}
