//! A guest's socket layer, as far as the tests need one.

use std::collections::BTreeMap;

use devices::virtio::vsock::testing::{
    GUEST_CID, GuestDriver, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST,
    OP_RW, OP_SHUTDOWN, Packet,
};

/// Guest's port and host's port.
pub(super) type Key = (u32, u32);

const BUFFER: u32 = 128 << 10;
const MAX_PACKET: usize = 32 << 10;

/// One socket of the guest.
#[derive(Default)]
pub(super) struct Socket {
    pub(super) established: bool,
    /// What the host has sent and no `take` has taken.
    pub(super) received: Vec<u8>,
    /// What waits to be sent.
    pub(super) outgoing: Vec<u8>,
    /// The host's `SHUTDOWN_*` flags, and whether it has reset the connection.
    pub(super) peer_ended: u32,
    pub(super) reset: bool,
    sent: u32,
    taken: u32,
    announced: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
}

/// Sockets over a driver. Nothing happens except in [`Guest::pump`].
pub(super) struct Guest {
    pub(super) driver: GuestDriver,
    pub(super) sockets: BTreeMap<Key, Socket>,
    /// Ports on which requests of the host are accepted, and sent back what they send.
    pub(super) echoes: Vec<u32>,
}

impl Guest {
    pub(super) fn new(driver: GuestDriver) -> Self {
        Self {
            driver,
            sockets: BTreeMap::new(),
            echoes: Vec::new(),
        }
    }

    pub(super) fn connect(&mut self, key: Key) {
        self.sockets.insert(key, Socket::default());
        self.send(key, OP_REQUEST, 0, Vec::new());
    }

    pub(super) fn shutdown(&mut self, key: Key, flags: u32) {
        self.send(key, OP_SHUTDOWN, flags, Vec::new());
    }

    pub(super) fn socket(&mut self, key: Key) -> &mut Socket {
        self.sockets.get_mut(&key).expect("the socket exists")
    }

    /// Takes what a socket has received, which makes room for more.
    pub(super) fn take(&mut self, key: Key) -> Vec<u8> {
        let socket = self.socket(key);
        let data = std::mem::take(&mut socket.received);
        socket.taken = socket
            .taken
            .wrapping_add(u32::try_from(data.len()).unwrap());
        if socket.taken.wrapping_sub(socket.announced) >= BUFFER / 4 {
            self.send(key, OP_CREDIT_UPDATE, 0, Vec::new());
        }
        data
    }

    /// Handles packets that have come and sends what there is credit for.
    pub(super) fn pump(&mut self) {
        while let Some(packet) = self.driver.poll() {
            self.handle(packet);
        }
        let keys: Vec<Key> = self.sockets.keys().copied().collect();
        for key in keys {
            if self.echoes.contains(&key.0) {
                let data = self.take(key);
                self.socket(key).outgoing.extend(data);
            }
            self.send_outgoing(key);
        }
    }

    /// Pumps until `done`.
    pub(super) fn pump_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = std::time::Instant::now();
        while !done(self) {
            assert!(
                start.elapsed() < super::DEADLINE,
                "no {what} in {:?}",
                super::DEADLINE
            );
            self.pump();
            std::thread::yield_now();
        }
    }

    fn send_outgoing(&mut self, key: Key) {
        let socket = self.socket(key);
        let credit = socket.peer_buf_alloc - (socket.sent.wrapping_sub(socket.peer_fwd_cnt));
        let len = socket.outgoing.len().min(credit as usize).min(MAX_PACKET);
        if socket.established && len > 0 {
            let data = socket.outgoing.drain(..len).collect();
            socket.sent = socket.sent.wrapping_add(u32::try_from(len).unwrap());
            self.send(key, OP_RW, 0, data);
        }
    }

    fn send(&mut self, key: Key, op: u16, flags: u32, data: Vec<u8>) {
        let (taken, alloc) = match self.sockets.get_mut(&key) {
            Some(socket) => {
                socket.announced = socket.taken;
                (socket.taken, BUFFER)
            }
            None => (0, 0),
        };
        let mut packet = Packet::new(op, key.0, key.1);
        packet.flags = flags;
        packet.buf_alloc = alloc;
        packet.fwd_cnt = taken;
        packet.data = data;
        self.driver.send(&packet);
    }

    fn handle(&mut self, packet: Packet) {
        assert_eq!((packet.src_cid, packet.dst_cid), (2, GUEST_CID));
        let key = (packet.dst_port, packet.src_port);
        if packet.op == OP_REQUEST {
            let echoes = self.echoes.contains(&key.0);
            if !echoes {
                return self.send(key, OP_RST, 0, Vec::new());
            }
            let socket = Socket {
                established: true,
                ..Socket::default()
            };
            let old = self.sockets.insert(key, socket);
            assert!(old.is_none(), "{key:?} exists");
            self.send(key, OP_RESPONSE, 0, Vec::new());
        }
        let Some(socket) = self.sockets.get_mut(&key) else {
            assert_eq!(packet.op, OP_RST, "{packet:?}");
            return;
        };
        socket.peer_buf_alloc = packet.buf_alloc.max(socket.peer_buf_alloc);
        socket.peer_fwd_cnt = packet.fwd_cnt;
        match packet.op {
            OP_RESPONSE => socket.established = true,
            OP_RW => {
                socket.received.extend(&packet.data);
                let held = socket.received.len();
                assert!(held <= BUFFER as usize, "{held} bytes were sent");
            }
            OP_SHUTDOWN => {
                socket.peer_ended |= packet.flags;
                if socket.peer_ended == 3 {
                    self.send(key, OP_RST, 0, Vec::new());
                }
            }
            OP_RST => socket.reset = true,
            OP_CREDIT_REQUEST => self.send(key, OP_CREDIT_UPDATE, 0, Vec::new()),
            _ => {}
        }
    }
}
