//! A vhost-user network server that sends every frame back. Its rings are walked by hand, so that
//! the front-end is not tested against the project's own queues.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::script::*;

const RX: usize = 0;
const TX: usize = 1;
/// `struct virtio_net_hdr_v1`, and where it counts buffers.
const HEADER_BYTES: usize = 12;
const NUM_BUFFERS_AT: usize = 10;
const DESC_NEXT: u16 = 1;

/// `VHOST_USER_F_PROTOCOL_FEATURES`, `VIRTIO_F_VERSION_1`, mergeable buffers, checksums and TSO.
pub(super) const ECHO_FEATURES: u64 = 1 << 30 | 1 << 32 | 1 << 15 | 1 << 0 | 1 << 11;
/// `REPLY_ACK`.
const ECHO_PROTOCOL_FEATURES: u64 = 1 << 3;
/// `VHOST_F_LOG_ALL` among features, `LOG_SHMFD` among the protocol's.
const LOG_ALL: u64 = 1 << 26;
const LOG_SHMFD: u64 = 1 << 1;
/// `VHOST_VRING_F_LOG`.
const RING_LOG: u32 = 1;
const PAGE_BYTES: u64 = 4096;

/// A running server.
pub(super) struct Echo {
    thread: JoinHandle<u64>,
    connections: Receiver<UnixStream>,
}

impl Echo {
    /// Serves one connection on `socket`.
    pub(super) fn listen(socket: &Path) -> Self {
        Self::serve(socket, None)
    }

    /// The same with a log of its writes; it answers a request that brings one with `answer`.
    pub(super) fn listen_with_log(socket: &Path, answer: &[u8]) -> Self {
        Self::serve(socket, Some(answer.to_vec()))
    }

    fn serve(socket: &Path, log_answer: Option<Vec<u8>>) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (sender, connections) = channel();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            sender.send(stream.try_clone().unwrap()).unwrap();
            let mut server = Server::new(stream, log_answer);
            let end = server.serve().unwrap_err();
            assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof, "{end}");
            server.features
        });
        Self {
            thread,
            connections,
        }
    }

    /// Ends it as if it had crashed.
    pub(super) fn crash(self) {
        let connection = self.connections.recv().unwrap();
        connection.shutdown(std::net::Shutdown::Both).unwrap();
        self.thread.join().unwrap();
    }

    /// Waits until the front-end has left; the features that it has set last.
    pub(super) fn features(self) -> u64 {
        self.thread.join().unwrap()
    }
}

#[derive(Default)]
struct Ring {
    size: u16,
    /// Guest-physical addresses of descriptors, available and used ring.
    addresses: [u64; 3],
    next_avail: u16,
    next_used: u16,
    enabled: bool,
    is_logged: bool,
    kick: Option<File>,
    call: Option<File>,
}

struct Server {
    stream: UnixStream,
    epoll: Epoll,
    features: u64,
    memory: GuestMemoryMmap<()>,
    /// Guest-physical address, bytes and address in the front-end.
    regions: Vec<[u64; 3]>,
    rings: [Ring; 2],
    /// What the request for a log is answered with, if one is offered, and the log.
    log_answer: Option<Vec<u8>>,
    log: Option<(File, u64)>,
}

impl Server {
    fn new(stream: UnixStream, log_answer: Option<Vec<u8>>) -> Self {
        let epoll = Epoll::new().unwrap();
        let readable = EpollEvent::new(EventSet::IN, u64::MAX);
        epoll
            .ctl(ControlOperation::Add, stream.as_raw_fd(), readable)
            .unwrap();
        Self {
            stream,
            epoll,
            features: 0,
            memory: GuestMemoryMmap::new(),
            regions: Vec::new(),
            rings: [Ring::default(), Ring::default()],
            log_answer,
            log: None,
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let mut events = [EpollEvent::default(); 4];
            let count = match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            for event in &events[..count] {
                match event.data() {
                    u64::MAX => self.message()?,
                    // An event of a ring that a message has just stopped finds none.
                    index => {
                        if let Some(mut kick) = self.rings[index as usize].kick.as_ref() {
                            let _ = kick.read(&mut [0; 8]);
                        }
                        self.echo();
                    }
                }
            }
        }
    }

    fn message(&mut self) -> io::Result<()> {
        let mut header = [0; 12];
        // Descriptors come with a message's first bytes.
        let (count, file) = self.stream.recv_with_fd(&mut header)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.stream.read_exact(&mut header[count..])?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags, size) = (word(0), word(4), word(8));
        let mut payload = vec![0; size as usize];
        self.stream.read_exact(&mut payload)?;
        let answer = self.obey(request, &payload, file);
        let answer = answer.or((flags & NEED_REPLY != 0).then(|| vec![0; 8]));
        if let Some(answer) = answer {
            self.stream.write_all(&message(request, REPLY, &answer))?;
        }
        Ok(())
    }

    /// Does what a message asks for; the answer's payload, if it has one.
    fn obey(&mut self, request: u32, payload: &[u8], file: Option<File>) -> Option<Vec<u8>> {
        let u32_at = |at: usize| u32::from_le_bytes(payload[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().unwrap());
        let number = |value: u64| Some(value.to_le_bytes().to_vec());
        match request {
            SET_OWNER | SET_PROTOCOL_FEATURES => {}
            GET_FEATURES if self.log_answer.is_some() => return number(ECHO_FEATURES | LOG_ALL),
            GET_FEATURES => return number(ECHO_FEATURES),
            GET_PROTOCOL_FEATURES if self.log_answer.is_some() => {
                return number(ECHO_PROTOCOL_FEATURES | LOG_SHMFD);
            }
            GET_PROTOCOL_FEATURES => return number(ECHO_PROTOCOL_FEATURES),
            SET_LOG_BASE => {
                let [bytes, offset] = [0, 8].map(u64_at);
                assert_eq!(offset, 0);
                self.log = Some((file.expect("the log's memory"), bytes));
                return self.log_answer.clone();
            }
            SET_FEATURES => self.features = u64_at(0),
            SET_MEM_TABLE => {
                assert_eq!(u32_at(0), 1, "one region, so one descriptor");
                let [gpa, bytes, user, offset] = [8, 16, 24, 32].map(u64_at);
                let file = FileOffset::new(file.expect("a region's file"), offset);
                let range = (GuestAddress(gpa), bytes as usize, Some(file));
                self.memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
                self.regions = vec![[gpa, bytes, user]];
            }
            SET_VRING_NUM => self.ring(u32_at(0)).size = u32_at(4) as u16,
            SET_VRING_BASE => self.ring(u32_at(0)).next_avail = u32_at(4) as u16,
            SET_VRING_ENABLE => self.ring(u32_at(0)).enabled = u32_at(4) != 0,
            SET_VRING_ADDR => {
                let addresses = [8, 24, 16].map(|at| self.guest_address(u64_at(at)));
                let used = addresses[2];
                let next_used = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
                let logged = (u32_at(4) & RING_LOG != 0).then(|| u64_at(32));
                assert!(logged.is_none_or(|at| at == used), "{logged:x?}");
                let ring = self.ring(u32_at(0));
                (ring.addresses, ring.next_used) = (addresses, next_used);
                ring.is_logged = logged.is_some();
            }
            SET_VRING_CALL => self.ring(u32_at(0) & 0xff).call = file,
            SET_VRING_KICK => {
                let index = u32_at(0) & 0xff;
                let file = file.expect("a doorbell");
                let readable = EpollEvent::new(EventSet::IN, u64::from(index));
                self.epoll
                    .ctl(ControlOperation::Add, file.as_raw_fd(), readable)
                    .unwrap();
                self.ring(index).kick = Some(file);
            }
            GET_VRING_BASE => {
                let ring = self.ring(u32_at(0));
                let position = u32::from(ring.next_avail);
                let kick = ring.kick.take();
                if let Some(kick) = kick {
                    let none = EpollEvent::default();
                    self.epoll
                        .ctl(ControlOperation::Delete, kick.as_raw_fd(), none)
                        .unwrap();
                }
                return Some([u32_at(0), position].map(u32::to_le_bytes).concat());
            }
            other => panic!("request {other} was not offered"),
        }
        None
    }

    fn ring(&mut self, index: u32) -> &mut Ring {
        &mut self.rings[index as usize]
    }

    /// Rings are told by addresses in the front-end.
    fn guest_address(&self, user: u64) -> u64 {
        let inside = |[_, bytes, start]: &&[u64; 3]| (*start..start + bytes).contains(&user);
        let [gpa, _, start] = self.regions.iter().find(inside).expect("in RAM");
        user - start + gpa
    }

    /// Sends back what there is, as far as there are buffers.
    fn echo(&mut self) {
        let works = |ring: &Ring| ring.enabled && ring.kick.is_some();
        if !self.rings.iter().all(works) {
            return;
        }
        while self.has_available(RX) && self.has_available(TX) {
            let mut frame = Vec::new();
            let (head, pieces) = self.take(TX);
            for (addr, len) in pieces {
                let mut piece = vec![0; len];
                self.memory
                    .read_slice(&mut piece, GuestAddress(addr))
                    .unwrap();
                frame.extend(piece);
            }
            self.give_back(TX, head, 0);
            frame[..HEADER_BYTES].fill(0);
            frame[NUM_BUFFERS_AT] = 1;
            let (head, pieces) = self.take(RX);
            let mut rest = &frame[..];
            for (addr, len) in pieces {
                let (now, later) = rest.split_at(len.min(rest.len()));
                self.memory.write_slice(now, GuestAddress(addr)).unwrap();
                self.mark(addr, now.len() as u64);
                rest = later;
            }
            assert!(rest.is_empty(), "the driver's buffers are too small");
            self.give_back(RX, head, frame.len() as u32);
        }
    }

    fn has_available(&self, index: usize) -> bool {
        let ring = &self.rings[index];
        let at = GuestAddress(ring.addresses[1] + 2);
        let available: u16 = self
            .memory
            .load(at, std::sync::atomic::Ordering::Acquire)
            .unwrap();
        available != ring.next_avail
    }

    /// Takes a chain: its head, and where its buffers lie.
    fn take(&mut self, index: usize) -> (u16, Vec<(u64, usize)>) {
        let ring = &mut self.rings[index];
        let [descriptors, available, _] = ring.addresses;
        let slot = u64::from(ring.next_avail % ring.size);
        ring.next_avail = ring.next_avail.wrapping_add(1);
        let at = GuestAddress(available + 4 + 2 * slot);
        let head: u16 = self.memory.read_obj(at).unwrap();
        let (mut next, mut pieces) = (head, Vec::new());
        loop {
            let at = descriptors + 16 * u64::from(next);
            let addr: u64 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(at + 8)).unwrap();
            let flags: u16 = self.memory.read_obj(GuestAddress(at + 12)).unwrap();
            pieces.push((addr, len as usize));
            if flags & DESC_NEXT == 0 {
                return (head, pieces);
            }
            next = self.memory.read_obj(GuestAddress(at + 14)).unwrap();
        }
    }

    fn give_back(&mut self, index: usize, head: u16, written: u32) {
        let ring = &mut self.rings[index];
        let used = ring.addresses[2];
        let at = used + 4 + 8 * u64::from(ring.next_used % ring.size);
        self.memory
            .write_obj(u32::from(head), GuestAddress(at))
            .unwrap();
        self.memory
            .write_obj(written, GuestAddress(at + 4))
            .unwrap();
        ring.next_used = ring.next_used.wrapping_add(1);
        let order = std::sync::atomic::Ordering::Release;
        self.memory
            .store(ring.next_used, GuestAddress(used + 2), order)
            .unwrap();
        let entry = used + 4 + 8 * u64::from((ring.next_used.wrapping_sub(1)) % ring.size);
        if ring.is_logged {
            self.mark(entry, 8);
            self.mark(used + 2, 2);
        }
        if let Some(call) = &mut self.rings[index].call {
            call.write_all(&1_u64.to_ne_bytes()).unwrap();
        }
    }

    /// Marks what was written in the log, if that is on.
    fn mark(&self, at: u64, len: u64) {
        use std::os::unix::fs::FileExt;
        let Some((file, bytes)) = &self.log else {
            return;
        };
        if self.features & LOG_ALL == 0 || len == 0 {
            return;
        }
        for page in at / PAGE_BYTES..=(at + len - 1) / PAGE_BYTES {
            assert!(page / 8 < *bytes, "page {page} lies behind the log");
            // Nobody else marks anything meanwhile.
            let mut byte = [0];
            file.read_exact_at(&mut byte, page / 8).unwrap();
            byte[0] |= 1 << (page % 8);
            file.write_all_at(&byte, page / 8).unwrap();
        }
    }
}
