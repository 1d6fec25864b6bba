//! A guest's driver for tests: packets in and out of real queues.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, IntoBytes};

use super::packet::{HOST_CID, Header, TYPE_STREAM};
use crate::GuestRam;
use crate::testing::{Buffer, DriverQueue, ram};
use crate::virtio::{Activation, VirtioDevice, VirtioInterrupt, Virtqueue};

/// The guest's context id.
pub const GUEST_CID: u64 = 52;
/// Longest wait for something that must happen.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// `VIRTIO_VSOCK_OP_REQUEST`.
pub const OP_REQUEST: u16 = 1;
/// `VIRTIO_VSOCK_OP_RESPONSE`.
pub const OP_RESPONSE: u16 = 2;
/// `VIRTIO_VSOCK_OP_RST`.
pub const OP_RST: u16 = 3;
/// `VIRTIO_VSOCK_OP_SHUTDOWN`.
pub const OP_SHUTDOWN: u16 = 4;
/// `VIRTIO_VSOCK_OP_RW`.
pub const OP_RW: u16 = 5;
/// `VIRTIO_VSOCK_OP_CREDIT_UPDATE`.
pub const OP_CREDIT_UPDATE: u16 = 6;
/// `VIRTIO_VSOCK_OP_CREDIT_REQUEST`.
pub const OP_CREDIT_REQUEST: u16 = 7;

const RAM_BYTES: usize = 16 << 20;
/// Entries of each queue, and buffers for each.
const ENTRIES: u16 = 64;
const RX_AT: u64 = 0x10_0000;
const TX_AT: u64 = 0x40_0000;
const EVENTS_AT: u64 = 0x9_0000;
/// Room for a header and 64 KiB.
const TX_STRIDE: u64 = 0x1_1000;
/// Receive buffers are as large as Linux makes them.
const RX_BYTES: u32 = 4096;

/// A packet as a test sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Sender's context id.
    pub src_cid: u64,
    /// Receiver's context id.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Socket type.
    pub kind: u16,
    /// `OP_*`.
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Room that the sender has for data.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken.
    pub fwd_cnt: u32,
    /// Length that the header claims; `None`: that of `data`.
    pub claimed_len: Option<u32>,
    /// Data.
    pub data: Vec<u8>,
}

impl Packet {
    /// A packet of the guest's `src_port` to the host's `dst_port`, with room for 256 KiB.
    #[must_use]
    pub fn new(op: u16, src_port: u32, dst_port: u32) -> Self {
        Self {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port,
            dst_port,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
            claimed_len: None,
            data: Vec::new(),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let len = u32::try_from(self.data.len()).unwrap_or(u32::MAX);
        let header = Header {
            src_cid: self.src_cid.into(),
            dst_cid: self.dst_cid.into(),
            src_port: self.src_port.into(),
            dst_port: self.dst_port.into(),
            len: self.claimed_len.unwrap_or(len).into(),
            kind: self.kind.into(),
            op: self.op.into(),
            flags: self.flags.into(),
            buf_alloc: self.buf_alloc.into(),
            fwd_cnt: self.fwd_cnt.into(),
        };
        [header.as_bytes(), &self.data].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (header, data) = Header::ref_from_prefix(bytes).ok()?;
        Some(Self {
            src_cid: header.src_cid.get(),
            dst_cid: header.dst_cid.get(),
            src_port: header.src_port.get(),
            dst_port: header.dst_port.get(),
            kind: header.kind.get(),
            op: header.op.get(),
            flags: header.flags.get(),
            buf_alloc: header.buf_alloc.get(),
            fwd_cnt: header.fwd_cnt.get(),
            claimed_len: Some(header.len.get()),
            data: data.to_vec(),
        })
    }
}

/// A driver with three queues and buffers for them.
pub struct GuestDriver {
    memory: Arc<GuestRam>,
    receive: DriverQueue,
    transmit: DriverQueue,
    event: DriverQueue,
    doorbells: Vec<EventFd>,
    interrupt: Option<Arc<VirtioInterrupt>>,
    /// Packets taken from the queue.
    received: VecDeque<Packet>,
    offered: u64,
    sent: u64,
    acknowledged: u64,
}

impl Default for GuestDriver {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestDriver {
    /// A driver in RAM of its own.
    #[must_use]
    pub fn new() -> Self {
        let memory = ram(RAM_BYTES);
        let queue = |index: u64| DriverQueue::new(&memory, index * DriverQueue::BYTES, ENTRIES);
        Self {
            receive: queue(0),
            transmit: queue(1),
            event: queue(2),
            memory,
            doorbells: Vec::new(),
            interrupt: None,
            received: VecDeque::new(),
            offered: 0,
            sent: 0,
            acknowledged: 0,
        }
    }

    /// The device's side of fresh queues.
    #[must_use]
    pub fn queues(&self) -> Vec<Virtqueue> {
        let sides = [&self.receive, &self.transmit, &self.event];
        let sides = sides.iter().zip(0..);
        sides
            .map(|(side, index)| side.device_side(index).0)
            .collect()
    }

    /// Rings the doorbells of `queues` from now on.
    fn adopt(&mut self, queues: &[Virtqueue]) {
        let doorbells = queues.iter().map(|queue| queue.doorbell().try_clone());
        self.doorbells = doorbells
            .collect::<Result<_, _>>()
            .expect("the host has descriptors left");
        let first = queues.first();
        self.interrupt = first.map(|queue| Arc::clone(queue.interrupt().shared()));
    }

    /// Starts `device` on `queues`.
    ///
    /// # Panics
    /// When the device refuses.
    pub fn activate(&mut self, device: &mut dyn VirtioDevice, queues: Vec<Virtqueue>) {
        self.adopt(&queues);
        let interrupt = self.interrupt.clone().expect("there are queues");
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features: 0,
            interrupt,
        };
        device.activate(activation).expect("the device starts");
    }

    /// Offers all receive buffers.
    pub fn offer_receive_buffers(&mut self) {
        for _ in 0..ENTRIES {
            self.offer_receive_buffer(RX_BYTES);
        }
    }

    /// Offers the next receive buffer, `len` bytes of it.
    pub fn offer_receive_buffer(&mut self, len: u32) {
        // Descriptors are handed out in turn, and each has its buffer.
        let index = self.offered % u64::from(ENTRIES);
        let at = RX_AT + index * u64::from(RX_BYTES);
        self.offered += 1;
        self.receive.offer(&[Buffer::writable(at, len)]);
        self.ring(0);
    }

    /// Offers a buffer of `len` bytes for an event.
    pub fn offer_event_buffer(&mut self, len: u32) {
        self.event.offer(&[Buffer::writable(EVENTS_AT, len)]);
        self.ring(2);
    }

    /// Events that the device has sent.
    ///
    /// # Panics
    /// When they do not come within [`DEADLINE`].
    pub fn wait_event(&mut self) -> u32 {
        let mut used = Vec::new();
        self.wait("event", |driver| {
            used = driver.event.used();
            !used.is_empty()
        });
        let at = GuestAddress(EVENTS_AT);
        self.memory.read_obj(at).expect("it lies in RAM")
    }

    /// Sends a packet, when there is room in the queue.
    ///
    /// # Panics
    /// When there is none within [`DEADLINE`].
    pub fn send(&mut self, packet: &Packet) {
        self.send_bytes(&packet.to_bytes());
    }

    /// Sends bytes that may be no packet.
    ///
    /// # Panics
    /// When there is no room within [`DEADLINE`].
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.wait("room to send", |driver| {
            driver.acknowledged += driver.transmit.used().len() as u64;
            driver.sent - driver.acknowledged < u64::from(ENTRIES)
        });
        let index = self.sent % u64::from(ENTRIES);
        let at = TX_AT + index * TX_STRIDE;
        let written = self.memory.write_slice(bytes, GuestAddress(at));
        written.expect("it lies in RAM");
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.transmit.offer(&[Buffer::readable(at, len)]);
        self.sent += 1;
        self.ring(1);
    }

    /// Waits until the device has taken everything that was sent.
    ///
    /// # Panics
    /// When it does not within [`DEADLINE`].
    pub fn wait_sent(&mut self) {
        self.wait("packets to be taken", |driver| {
            driver.acknowledged += driver.transmit.used().len() as u64;
            driver.sent == driver.acknowledged
        });
    }

    /// How many sent packets the device has not taken.
    pub fn pending(&mut self) -> u64 {
        self.acknowledged += self.transmit.used().len() as u64;
        self.sent - self.acknowledged
    }

    /// The next packet, if one has come. Its buffer is offered again.
    ///
    /// # Panics
    /// When it is shorter than a header.
    pub fn poll(&mut self) -> Option<Packet> {
        for (head, len) in self.receive.used() {
            let at = RX_AT + u64::from(head) * u64::from(RX_BYTES);
            let mut bytes = vec![0; len as usize];
            let read = self.memory.read_slice(&mut bytes, GuestAddress(at));
            read.expect("it lies in RAM");
            let packet = Packet::from_bytes(&bytes).expect("a header");
            self.received.push_back(packet);
            self.offer_receive_buffer(RX_BYTES);
        }
        self.received.pop_front()
    }

    /// The next packet.
    ///
    /// # Panics
    /// When none comes within [`DEADLINE`].
    pub fn receive(&mut self) -> Packet {
        let mut packet = None;
        self.wait("packet", |driver| {
            packet = driver.poll();
            packet.is_some()
        });
        packet.expect("waited for it")
    }

    /// The next packet, which must be `op`.
    ///
    /// # Panics
    /// When it is not, or none comes within [`DEADLINE`].
    pub fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    /// Whether the device has declared itself broken.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        let interrupt = self.interrupt.as_ref();
        interrupt.is_some_and(|interrupt| interrupt.needs_reset())
    }

    /// Waits for something that must happen.
    ///
    /// # Panics
    /// When it does not within [`DEADLINE`].
    pub fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < DEADLINE, "no {what} in {DEADLINE:?}");
            std::thread::yield_now();
        }
    }

    fn ring(&self, queue: usize) {
        // Before the first activation nobody listens; the device looks when it starts.
        if let Some(doorbell) = self.doorbells.get(queue) {
            let _ = doorbell.write(1);
        }
    }
}
