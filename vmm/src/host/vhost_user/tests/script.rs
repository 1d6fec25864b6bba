//! A vhost-user server, written out by hand, that does one thing wrong.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Requests by their numbers (vhost-user specification, "Front-end message types").
pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_OWNER: u32 = 3;
pub(super) const SET_MEM_TABLE: u32 = 5;
pub(super) const SET_LOG_BASE: u32 = 6;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_ADDR: u32 = 9;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_CALL: u32 = 13;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const SET_CONFIG: u32 = 25;

/// Header flags: version 1, and "this is a reply".
pub(super) const REPLY: u32 = 1 | 1 << 2;
pub(super) const NEED_REPLY: u32 = 1 << 3;
const HEADER_BYTES: usize = 12;
const DRIP_INTERVAL: Duration = Duration::from_millis(50);

/// `VHOST_USER_F_PROTOCOL_FEATURES`, `VIRTIO_F_VERSION_1`, and of block devices flush, MQ and
/// the cache mode.
pub(super) const FEATURES: u64 = 1 << 30 | 1 << 32 | 1 << 9 | 1 << 11 | 1 << 12;
/// `MQ`, `REPLY_ACK` and `CONFIG`.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 0 | 1 << 3 | 1 << 9;

/// What the server does instead of answering.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// Closes the connection.
    Close,
    /// Says nothing more, and reads nothing more.
    Silence,
    /// Sends so many bytes of its answer and closes the connection.
    CutAt(usize),
    /// Sends so many bytes of its answer and no more.
    StopAt(usize),
    /// Answers one byte at a time, never the last.
    Drip,
    /// Sends these bytes.
    Raw(Vec<u8>),
    /// Sends the answer with another header: request, flags, size.
    Header(u32, u32, u32),
    /// Sends the answer with another payload, in a header that fits it.
    Payload(Vec<u8>),
}

/// What a server says of itself, and what it does wrong.
#[derive(Clone, Debug)]
pub(super) struct Script {
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) queues: u64,
    /// At which request, counted from zero among those of its number.
    pub(super) fault: Option<(u32, usize, Fault)>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            features: FEATURES,
            protocol_features: PROTOCOL_FEATURES,
            queues: 4,
            fault: None,
        }
    }
}

impl Script {
    pub(super) fn with_fault(request: u32, fault: Fault) -> Self {
        Self {
            fault: Some((request, 0, fault)),
            ..Self::default()
        }
    }

    /// Serves one connection on `socket`; gives the requests that came, by number.
    pub(super) fn listen(self, socket: &Path) -> JoinHandle<Vec<u32>> {
        let listener = UnixListener::bind(socket).unwrap();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut seen = Vec::new();
            // The connection's end is how every script ends.
            let _ = self.serve(stream, &mut seen);
            seen
        })
    }

    fn serve(&self, mut stream: UnixStream, seen: &mut Vec<u32>) -> io::Result<()> {
        loop {
            let mut header = [0; HEADER_BYTES];
            stream.read_exact(&mut header)?;
            let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            let (request, flags, size) = (word(0), word(4), word(8));
            let mut payload = vec![0; size as usize];
            stream.read_exact(&mut payload)?;
            let before = seen.iter().filter(|earlier| **earlier == request).count();
            seen.push(request);
            let answer = self.answer(request, flags, &payload);
            match &self.fault {
                Some((at, count, fault)) if *at == request && *count == before => {
                    fault.strike(&mut stream, request, answer.unwrap_or_default())?;
                }
                _ => {
                    if let Some(answer) = answer {
                        stream.write_all(&message(request, REPLY, &answer))?;
                    }
                }
            }
        }
    }

    /// The payload that a server answers with, if it does.
    fn answer(&self, request: u32, flags: u32, payload: &[u8]) -> Option<Vec<u8>> {
        let number = |value: u64| Some(value.to_le_bytes().to_vec());
        match request {
            GET_FEATURES => number(self.features),
            GET_PROTOCOL_FEATURES => number(self.protocol_features),
            GET_QUEUE_NUM => number(self.queues),
            // The request's own: index and position, or offset, size, flags and zeroes.
            GET_VRING_BASE | GET_CONFIG | SET_LOG_BASE => Some(payload.to_vec()),
            _ if flags & NEED_REPLY != 0 => number(0),
            _ => None,
        }
    }
}

pub(super) fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = payload.len() as u32;
    let words = [request, flags, size].map(u32::to_le_bytes);
    [words.as_flattened(), payload].concat()
}

impl Fault {
    /// Fails at the end of the connection; a server that goes on returns.
    fn strike(&self, stream: &mut UnixStream, request: u32, answer: Vec<u8>) -> io::Result<()> {
        let good = message(request, REPLY, &answer);
        match self {
            Self::Close => return Err(io::ErrorKind::ConnectionAborted.into()),
            Self::Silence => {}
            Self::CutAt(len) => {
                stream.write_all(&good[..*len])?;
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Self::StopAt(len) => stream.write_all(&good[..*len])?,
            Self::Drip => {
                for byte in &good[..good.len() - 1] {
                    stream.write_all(&[*byte])?;
                    thread::sleep(DRIP_INTERVAL);
                }
            }
            Self::Raw(bytes) => stream.write_all(bytes)?,
            Self::Header(request, flags, size) => {
                let words = [*request, *flags, *size].map(u32::to_le_bytes);
                stream.write_all(words.as_flattened())?;
                return stream.write_all(&answer);
            }
            Self::Payload(payload) => {
                return stream.write_all(&message(request, REPLY, payload));
            }
        }
        // Nothing more is answered until the other side has had enough.
        io::copy(stream, &mut io::sink())?;
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
