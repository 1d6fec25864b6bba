//! The shared memory in which servers mark what they write, and the request that gives it to them.

#![expect(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::GuestRam;
use devices::memory::LOG_PAGE_BYTES;
use devices::virtio::vhost_user::PeerLog;
use vm_memory::{Address, FileOffset, GuestMemoryBackend, MmapRegion, VolatileMemory};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::error::RequestFailure;

const NAME: &CStr = c"drover-vhost-log";

/// Pages in a word of the log, and its bytes.
const WORD_PAGES: u64 = 64;
const WORD_BYTES: u64 = 8;

/// `VHOST_USER_SET_LOG_BASE`, version 1, and "this is a reply" (vhost-user specification, "Header").
const SET_LOG_BASE: u32 = 6;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const HEADER_BYTES: usize = 12;
/// Longest payload of an answer: servers send nothing, a number, or what they were sent.
const MAX_ANSWER_BYTES: u32 = 16;

/// Pages of guest memory that vhost-user servers have written, one bit each, by guest-physical
/// address.
#[derive(Debug)]
pub struct ServerLog {
    shared: PeerLog,
    words: MmapRegion,
    count: u64,
}

impl ServerLog {
    /// A log for all of `memory`, with no page marked.
    ///
    /// # Errors
    /// The host's refusal of the memory.
    pub fn new(memory: &GuestRam) -> io::Result<Self> {
        let pages = memory.last_addr().raw_value() / LOG_PAGE_BYTES as u64 + 1;
        let count = pages.div_ceil(WORD_PAGES);
        let bytes = count * WORD_BYTES;
        let file = Arc::new(memfd(bytes)?);
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let offset = FileOffset::from_arc(Arc::clone(&file), 0);
        let words = MmapRegion::from_file(offset, len).map_err(io::Error::other)?;
        Ok(Self {
            shared: PeerLog { file, bytes },
            words,
            count,
        })
    }

    /// What a server is given.
    #[must_use]
    pub fn shared(&self) -> &PeerLog {
        &self.shared
    }

    /// Moves the marks of the pages from number `first` on, `pages` of them, into `bitmap`, whose bit
    /// 0 of word 0 is the first of them. `None` when the pages are not of the log or do not begin
    /// with a word of it; nothing was moved then.
    pub fn harvest(&self, first: u64, pages: u64, bitmap: &mut [u64]) -> Option<()> {
        let start = first / WORD_PAGES;
        let words = pages.div_ceil(WORD_PAGES);
        let fits = first.is_multiple_of(WORD_PAGES) && start.checked_add(words)? <= self.count;
        if !fits || u64::try_from(bitmap.len()).ok()? < words {
            return None;
        }
        for (number, target) in (start..start + words).zip(bitmap) {
            let word = self.word(number)?;
            // Most are zero, and stay in the servers' caches.
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // What a server has marked it has written: reading comes after this.
            let marks = u64::from_le(word.swap(0, Ordering::AcqRel));
            let within = pages - (number - start) * WORD_PAGES;
            let known = match within {
                // What lies beyond the region is no memory, whatever a server says.
                1..WORD_PAGES => (1 << within) - 1,
                _ => u64::MAX,
            };
            *target |= marks & known;
        }
        Some(())
    }

    fn word(&self, number: u64) -> Option<&AtomicU64> {
        let at = usize::try_from(number * WORD_BYTES).ok()?;
        // The file lives as long as the mapping, and nobody makes it shorter: it is sealed.
        self.words.get_atomic_ref(at).ok()
    }
}

/// A memfd of `bytes` that no server can make shorter: reading beyond its end would be fatal here.
fn memfd(bytes: u64) -> io::Result<File> {
    // SAFETY: a C string and constants of memfd_create(2).
    let fd =
        unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the descriptor is open; F_ADD_SEALS takes a number.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    match sealed {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives `log` to the server behind `socket` and waits until it has it. Done here, not by the `vhost`
/// crate: that expects the request's own payload back, as its own servers send it, and waits for ever
/// for the rest of what QEMU's (8 bytes) and DPDK's (none) do.
pub(super) fn send(mut socket: &UnixStream, log: &PeerLog) -> Result<(), RequestFailure> {
    let header = [SET_LOG_BASE, VERSION, 16].map(u32::to_le_bytes).concat();
    // Size, then where the log begins in the file.
    let payload = [log.bytes, 0].map(u64::to_le_bytes).concat();
    let message = [header, payload].concat();
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => RequestFailure::Closed,
        _ => RequestFailure::Socket(error),
    };
    let sent = socket.send_with_fd(&message[..], log.file.as_raw_fd());
    let sent = sent.map_err(|error| failed(error.into()))?;
    // Descriptors go with the first byte.
    let rest = message.get(sent..).unwrap_or_default();
    socket.write_all(rest).map_err(failed)?;
    let mut answer = [0; HEADER_BYTES];
    socket.read_exact(&mut answer).map_err(failed)?;
    let word = |at: usize| {
        let bytes = answer.get(at..).and_then(<[u8]>::first_chunk);
        u32::from_le_bytes(bytes.copied().unwrap_or_default())
    };
    let (request, flags, size) = (word(0), word(4), word(8));
    if request != SET_LOG_BASE || flags & (REPLY | 3) != REPLY | VERSION || size > MAX_ANSWER_BYTES
    {
        return Err(RequestFailure::Malformed);
    }
    let mut payload = [0; MAX_ANSWER_BYTES as usize];
    let payload = payload.get_mut(..size as usize).unwrap_or_default();
    socket.read_exact(payload).map_err(failed)
}
