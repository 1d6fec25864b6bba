//! One connection to a server: requests of many threads go out, replies and the server's own
//! requests come in.
//!
//! A thread, `vfio-user`, reads all that comes. It hands replies to who waits for them and answers
//! reads and writes of guest memory, which a server may send at any time, also while it owes a
//! reply.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use super::memory::DmaWriteHook;
use super::memory::ServedMemory;
use super::protocol::{
    Command, DEFAULT_DATA_BYTES, DmaAccess, FEATURE_PROBE, FEATURE_SET, Feature, HEADER_BYTES,
    Header, MAX_MESSAGE_BYTES, Malformed, Payload, flags,
};
use super::wire;
use crate::backend::BackendError;

/// Who hears once why a server is lost; on any thread, which it must not keep.
pub type LossHook = Box<dyn FnOnce(&str) + Send>;

/// How long a server may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To accept the connection.
    pub connect: Duration,
    /// To take a request, and to answer it.
    pub reply: Duration,
    /// To reset the device ("unbounded latencies" in the specification), or to change its migration
    /// state.
    pub reset: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            reply: Duration::from_secs(5),
            reset: Duration::from_secs(30),
        }
    }
}

/// A request and what its reply may be.
pub(super) struct Request<'a> {
    pub(super) command: Command,
    pub(super) payload: Vec<u8>,
    /// Sent along; whoever asks keeps them open.
    pub(super) descriptors: &'a [RawFd],
    /// Bytes that the reply's payload has at most.
    pub(super) reply_bytes: usize,
}

/// What came back.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) payload: Vec<u8>,
    pub(super) file: Option<File>,
}

/// The connection. Its locks are taken in this order: `writer`, `state`; `on_loss` alone.
pub(super) struct Connection {
    /// The socket's, for messages.
    name: String,
    stream: UnixStream,
    limits: Limits,
    /// Held while a message goes out.
    writer: Mutex<()>,
    state: Mutex<State>,
    on_loss: Mutex<Option<LossHook>>,
    memory: ServedMemory,
    has_refused_dma: AtomicBool,
    /// Whether descriptors are taken: while the device is looked at, from servers that are trusted.
    takes_files: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Why nothing more comes.
    lost: Option<String>,
    next_id: u16,
    pending: BTreeMap<u16, Pending>,
}

struct Pending {
    command: Command,
    reply_bytes: usize,
    limit: Duration,
    answer: SyncSender<Result<Reply, io::Error>>,
}

impl Pending {
    fn expected(&self) -> (Command, usize) {
        (self.command, self.reply_bytes)
    }
}

/// Whether the server is of this process' own user, or of root: such a one needs no descriptor to do harm.
fn is_trusted(stream: &UnixStream) -> io::Result<bool> {
    let server = rustix::net::sockopt::socket_peercred(stream)?.uid;
    Ok(server.is_root() || server == rustix::process::geteuid())
}

/// Whether the device itself must come to an end with something: a reset, a change of its migration
/// state, or the beginning or end of a log.
fn is_lengthy(request: &Request<'_>) -> bool {
    match request.command {
        Command::DeviceReset => true,
        Command::DeviceFeature => Feature::decode(&request.payload)
            .is_ok_and(|(feature, _)| feature.flags & (FEATURE_SET | FEATURE_PROBE) == FEATURE_SET),
        _ => false,
    }
}

impl Connection {
    pub(super) fn new(stream: UnixStream, name: &str, limits: Limits) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(limits.reply))?;
        let takes_files = AtomicBool::new(is_trusted(&stream)?);
        Ok(Self {
            name: name.to_owned(),
            stream,
            limits,
            writer: Mutex::new(()),
            state: Mutex::default(),
            on_loss: Mutex::default(),
            memory: ServedMemory::default(),
            has_refused_dma: AtomicBool::new(false),
            takes_files,
        })
    }

    /// From now on descriptors that come are dropped.
    pub(super) fn take_no_files(&self) {
        self.takes_files.store(false, Ordering::Release);
    }

    pub(super) fn memory(&self) -> &ServedMemory {
        &self.memory
    }

    /// Calls `hear` when the connection is lost, at once if it is.
    pub(super) fn on_loss(&self, hear: LossHook) {
        *self.on_loss.lock() = Some(hear);
        if let Some(lost) = self.lost() {
            self.tell(&lost);
        }
    }

    fn tell(&self, lost: &str) {
        let hear = self.on_loss.lock().take();
        if let Some(hear) = hear {
            hear(lost);
        }
    }

    /// Why the connection is of no use any more.
    pub(super) fn lost(&self) -> Option<String> {
        self.state.lock().lost.clone()
    }

    /// Fails when the connection is of no use any more.
    pub(super) fn check(&self) -> Result<(), BackendError> {
        self.lost()
            .map_or(Ok(()), |lost| Err(BackendError::Server(lost)))
    }

    /// Asks, and waits for the answer.
    pub(super) fn request(&self, request: Request<'_>) -> Result<Reply, BackendError> {
        let command = request.command;
        let limit = match is_lengthy(&request) {
            true => self.limits.reset,
            false => self.limits.reply,
        };
        let (answer, answered) = sync_channel(1);
        let deadline = {
            let _writer = self.writer.lock();
            let (id, deadline) = self.expect(&request, limit, answer)?;
            let header = Header::request(id, command, request.payload.len());
            let message = header.encode(&request.payload);
            let until = Instant::now() + self.limits.reply;
            if let Err(error) = wire::send(&self.stream, &message, request.descriptors, until) {
                self.lose(&format!("{}: {}", command.name(), explain(&error)));
            }
            deadline
        };
        let patience = deadline.saturating_duration_since(Instant::now());
        let answer = answered.recv_timeout(patience);
        match answer {
            Ok(answer) => answer.map_err(|source| BackendError::Refused {
                what: command.refused(),
                source,
            }),
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("no answer to {} within {limit:?}", command.name());
                Err(self.lose(&what))
            }
            // It was lost meanwhile, and the reason noted.
            Err(RecvTimeoutError::Disconnected) => Err(self.lose("the connection has ended")),
        }
    }

    /// Before each further message of a call that takes several: all of them together may take no
    /// longer than a reset and a reply, whoever else is served meanwhile.
    pub(super) fn check_time(&self, begun: Instant, command: Command) -> Result<(), BackendError> {
        let limit = self.limits.reset + self.limits.reply;
        match begun.elapsed() <= limit {
            true => Ok(()),
            false => {
                let name = command.name();
                Err(self.lose(&format!("{name}: many small ones took more than {limit:?}")))
            }
        }
    }

    /// Notes that a reply will come: under which id, and until when.
    fn expect(
        &self,
        request: &Request<'_>,
        limit: Duration,
        answer: SyncSender<Result<Reply, io::Error>>,
    ) -> Result<(u16, Instant), BackendError> {
        let mut state = self.state.lock();
        if let Some(lost) = &state.lost {
            return Err(BackendError::Server(lost.clone()));
        }
        // A server handles requests in their order ("Command Concurrency"), and each of those before
        // this one may take its time. The first whose time is up ends them all.
        let before = state.pending.values().map(|pending| pending.limit);
        let deadline = Instant::now() + before.sum::<Duration>() + limit;
        while state.pending.contains_key(&state.next_id) {
            state.next_id = state.next_id.wrapping_add(1);
        }
        let id = state.next_id;
        state.next_id = id.wrapping_add(1);
        let pending = Pending {
            command: request.command,
            reply_bytes: request.reply_bytes,
            limit,
            answer,
        };
        state.pending.insert(id, pending);
        Ok((id, deadline))
    }

    /// The server has broken the protocol in its answer to `command`: it is dropped.
    pub(super) fn broken(&self, command: Command, what: &Malformed) -> BackendError {
        self.lose(&format!("its answer to {}: {what}", command.name()))
    }

    /// Ends the connection, for this reason if there is no earlier one; the reason that counts.
    pub(super) fn lose(&self, what: &str) -> BackendError {
        let mut state = self.state.lock();
        let is_first = state.lost.is_none();
        let lost = state
            .lost
            .get_or_insert_with(|| format!("vfio-user server {}: {what}", self.name));
        let lost = lost.clone();
        if is_first {
            // It fails only when the server has closed it.
            let _ = self.stream.shutdown(Shutdown::Both);
            log::warn!("{lost}");
        }
        // Who waits hears of it by the sender's end.
        state.pending.clear();
        drop(state);
        if is_first {
            self.tell(&lost);
        }
        BackendError::Server(lost)
    }

    /// Ends the connection because nobody needs it any more.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state
            .lost
            .get_or_insert_with(|| "the connection was closed".to_owned());
        drop(state);
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Reads what comes until the connection ends: the `vfio-user` thread.
    pub(super) fn read_all(&self) {
        loop {
            match self.read_message() {
                Ok(true) => {}
                Ok(false) => break drop(self.lose("it has closed the connection")),
                Err(what) => break drop(self.lose(&what)),
            }
        }
    }

    /// Reads a message and acts on it; false at the connection's end.
    fn read_message(&self) -> Result<bool, String> {
        let received = self.receive_header().map_err(|error| explain(&error))?;
        let Some((header, file)) = received else {
            return Ok(false);
        };
        let malformed = |error: Malformed| error.to_string();
        if !header.is_reply() {
            let len = header.payload_bytes(MAX_MESSAGE_BYTES).map_err(malformed)?;
            let payload = self.read_payload(len)?;
            return self.answer(&header, &payload).map(|()| true);
        }
        let pending = self
            .state
            .lock()
            .pending
            .get(&header.id)
            .map(Pending::expected);
        let Some((command, reply_bytes)) =
            pending.filter(|(command, _)| *command as u16 == header.command)
        else {
            let Header { id, command, .. } = header;
            return Err(format!(
                "a reply to request {id} of command {command}, which was not asked"
            ));
        };
        // Bounded: replies are expected to have at most as much data as was asked for.
        let limit = u32::try_from(HEADER_BYTES + reply_bytes).unwrap_or(u32::MAX);
        let len = header.payload_bytes(limit);
        let len = len.map_err(|error| format!("its answer to {}: {error}", command.name()))?;
        let payload = self.read_payload(len)?;
        let answer = match header.flags & flags::ERROR {
            0 => Ok(Reply { payload, file }),
            _ => Err(refusal(header.error)),
        };
        // Nobody waits for it when its time was up a moment ago.
        if let Some(pending) = self.state.lock().pending.remove(&header.id) {
            let _ = pending.answer.send(answer);
        }
        Ok(true)
    }

    fn receive_header(&self) -> io::Result<Option<(Header, Option<File>)>> {
        let takes_files = || self.takes_files.load(Ordering::Acquire);
        // It may no longer once there is something.
        if takes_files() {
            wire::wait_readable(&self.stream)?;
        }
        wire::receive_header(&self.stream, takes_files())
    }

    fn read_payload(&self, len: usize) -> Result<Vec<u8>, String> {
        wire::receive_payload(&self.stream, len).map_err(|error| explain(&error))
    }

    /// Answers a request of the server's.
    fn answer(&self, header: &Header, payload: &[u8]) -> Result<(), String> {
        let result = match Command::from_number(header.command) {
            Some(Command::DmaRead) => self.dma_read(payload),
            Some(Command::DmaWrite) => self.dma_write(payload),
            _ => Err(libc::EOPNOTSUPP),
        };
        if let Err(errno) = result
            && !self.has_refused_dma.swap(true, Ordering::Relaxed)
        {
            let (name, command) = (&self.name, header.command);
            log::warn!(
                "vfio-user server {name}: its request of command {command} is refused, errno={errno}; further ones are not logged"
            );
        }
        if header.flags & flags::NO_REPLY != 0 {
            return Ok(());
        }
        let message = match result {
            Ok(payload) => header.reply(payload.len()).encode(&payload),
            Err(errno) => header.refusal(errno).encode(&[]),
        };
        let _writer = self.writer.lock();
        let until = Instant::now() + self.limits.reply;
        let sent = wire::send(&self.stream, &message, &[], until);
        sent.map_err(|error| format!("an answer to it: {}", explain(&error)))
    }

    fn dma_read(&self, payload: &[u8]) -> Result<Vec<u8>, i32> {
        let (access, rest) = DmaAccess::decode(payload).map_err(|_| libc::EINVAL)?;
        let count = valid_count(access.count).filter(|_| rest.is_empty());
        let data = self
            .memory
            .read(access.address, count.ok_or(libc::EINVAL)?)?;
        Ok(access.encode(&data))
    }

    fn dma_write(&self, payload: &[u8]) -> Result<Vec<u8>, i32> {
        let (access, data) = DmaAccess::decode(payload).map_err(|_| libc::EINVAL)?;
        let count = valid_count(access.count).filter(|count| *count == data.len());
        count.ok_or(libc::EINVAL)?;
        self.memory.write(access.address, data)?;
        Ok(access.encode(&[]))
    }
}

/// Bytes that a server asks to move: some, and no more than it was told that it may.
fn valid_count(count: u64) -> Option<usize> {
    let is_valid = (1..=u64::from(DEFAULT_DATA_BYTES)).contains(&count);
    usize::try_from(count).ok().filter(|_| is_valid)
}

/// The server's reason, which it need not give.
fn refusal(errno: u32) -> io::Error {
    /// The highest number that the kernel uses.
    const MAX_ERRNO: i32 = 4095;
    match i32::try_from(errno) {
        Ok(errno @ 1..=MAX_ERRNO) => io::Error::from_raw_os_error(errno),
        _ => io::Error::other("it gives no reason"),
    }
}

/// What a socket's error means here.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            "it has closed the connection in the middle of a message".to_owned()
        }
        io::ErrorKind::TimedOut => "it takes no message".to_owned(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            "it has closed the connection".to_owned()
        }
        _ if error.raw_os_error() == Some(libc::ENOBUFS) => {
            "a message came with more descriptors than are allowed".to_owned()
        }
        _ => error.to_string(),
    }
}
