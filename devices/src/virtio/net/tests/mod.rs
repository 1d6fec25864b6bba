//! A host end over socket pairs, and one queue at a time without a thread.
#![allow(clippy::cast_possible_truncation)]

mod control;
mod device;
mod receive;
mod transmit;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::{NetBackend, NetInfo, NetQueue, Offloads};
use super::receive::Receiver;
use super::shared::Shared;
use super::throttle::Throttle;
use super::transmit::Transmitter;
use crate::GuestRam;
use crate::device::DeviceId;
use crate::events::{DeviceEvent, EventSink, Reporter};
use crate::interrupt::{MsiMessage, MsiRoute};
use crate::rate::{Rate, RateLimiter, RateLimits};
use crate::testing::{Buffer, DriverQueue, FakeRoute, ram};
use crate::virtio::buffers;
use crate::virtio::interrupt::{QueueInterrupt, VirtioInterrupt};
use crate::virtio::queue::{Segment, Virtqueue};

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Where tests put packets.
pub(super) const DATA: u64 = 0x10_0000;
pub(super) const RAM_BYTES: usize = 0x100_0000;

/// What a device has asked of its host end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Offloads(Offloads),
    Open(u16, bool),
    Announce([u8; 6]),
}

/// A host end whose network is the other end of a socket pair per queue.
pub(super) struct FakeNet {
    queues: Vec<UnixDatagram>,
    network: Vec<UnixDatagram>,
    calls: Mutex<Vec<Call>>,
    /// The next call on a queue or the host end fails with this.
    failure: Arc<Mutex<Option<i32>>>,
}

impl FakeNet {
    pub(super) fn new(pairs: u16) -> Arc<Self> {
        let pairs: Vec<_> = (0..pairs)
            .map(|_| UnixDatagram::pair().expect("the host has sockets left"))
            .collect();
        for (queue, network) in &pairs {
            queue.set_nonblocking(true).expect("a socket");
            network.set_nonblocking(true).expect("a socket");
        }
        let (queues, network) = pairs.into_iter().unzip();
        Arc::new(Self {
            queues,
            network,
            calls: Mutex::default(),
            failure: Arc::default(),
        })
    }

    pub(super) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock())
    }

    pub(super) fn fail(&self, errno: i32) {
        *self.failure.lock() = Some(errno);
    }

    /// A packet comes from the network; false when there is no room for it.
    pub(super) fn arrives(&self, pair: usize, packet: &[u8]) -> bool {
        self.network[pair].send(packet).is_ok()
    }

    /// The next packet that reached the network.
    pub(super) fn sent(&self, pair: usize) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 1 << 17];
        let len = self.network[pair].recv(&mut buffer).ok()?;
        buffer.truncate(len);
        Some(buffer)
    }

    fn check(&self) -> io::Result<()> {
        let failure = self.failure.lock().take();
        failure.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }
}

impl NetBackend for FakeNet {
    fn info(&self) -> NetInfo {
        NetInfo {
            queue_pairs: self.queues.len() as u16,
            offloads: Offloads::ALL,
        }
    }

    fn open_queue(&self, pair: u16) -> io::Result<Box<dyn NetQueue>> {
        Ok(Box::new(FakeQueue {
            socket: self.queues[usize::from(pair)].try_clone()?,
            failure: Arc::clone(&self.failure),
        }))
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.calls.lock().push(Call::Offloads(offloads));
        self.check()
    }

    fn set_queue_open(&self, pair: u16, open: bool) -> io::Result<()> {
        self.calls.lock().push(Call::Open(pair, open));
        self.check()
    }

    fn announce(&self, mac: [u8; 6]) -> io::Result<()> {
        self.calls.lock().push(Call::Announce(mac));
        self.check()
    }
}

struct FakeQueue {
    socket: UnixDatagram,
    failure: Arc<Mutex<Option<i32>>>,
}

impl AsRawFd for FakeQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl NetQueue for FakeQueue {
    fn receive(
        &mut self,
        memory: &GuestRam,
        segments: &[Segment],
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        if let Some(errno) = self.failure.lock().take() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut packet = vec![0; 1 << 17];
        let len = self.socket.recv(&mut packet)?;
        let done = buffers::write(memory, segments, 0, &packet[..len]).map_err(io::Error::other)?;
        let rest = (len - done).min(overflow.len());
        overflow[..rest].copy_from_slice(&packet[done..done + rest]);
        Ok(done + rest)
    }

    fn send(&mut self, memory: &GuestRam, segments: &[Segment]) -> io::Result<()> {
        if let Some(errno) = self.failure.lock().take() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut packet = vec![0; buffers::total_len(segments) as usize];
        buffers::read(memory, segments, 0, &mut packet).map_err(io::Error::other)?;
        self.socket.send(&packet).map(drop)
    }

    fn is_gone(&self, error: &io::Error) -> bool {
        error.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Remembers events.
#[derive(Default)]
pub(super) struct Events(Mutex<Vec<DeviceEvent>>);

impl Events {
    pub(super) fn taken(&self) -> Vec<DeviceEvent> {
        std::mem::take(&mut *self.0.lock())
    }
}

impl EventSink for Events {
    fn report(&self, device: &DeviceId, event: DeviceEvent) {
        assert_eq!(device.as_str(), "net0");
        self.0.lock().push(event);
    }
}

pub(super) fn reporter(events: &Arc<Events>) -> Reporter {
    let id = DeviceId::new("net0").expect("a good name");
    Reporter::new(id, Arc::clone(events) as Arc<dyn EventSink>)
}

/// A limit of packets or bytes per second with a burst.
pub(super) fn limit(per_second: u64, burst: u64) -> Option<Rate> {
    Some(Rate {
        per_second,
        burst: Some(burst),
    })
}

pub(super) fn interrupt(queues: usize) -> (Arc<VirtioInterrupt>, Arc<FakeRoute>) {
    let route = Arc::new(FakeRoute::new());
    route.unmask(MsiMessage::default()).expect("a fake");
    let id = DeviceId::new("net0").expect("a good name");
    let interrupt = VirtioInterrupt::for_test(id, route.clone(), queues);
    (Arc::new(interrupt), route)
}

/// The device's side of `driver`'s queue.
pub(super) fn virtqueue(
    driver: &DriverQueue,
    memory: &Arc<GuestRam>,
    index: u16,
    event_idx: bool,
    interrupt: &Arc<VirtioInterrupt>,
) -> Virtqueue {
    let interrupt = QueueInterrupt::new(Arc::clone(interrupt), index);
    let doorbell = EventFd::new(EFD_NONBLOCK).expect("the host has descriptors left");
    let queue = driver.queue(event_idx);
    Virtqueue::new(index, queue, Arc::clone(memory), doorbell, interrupt)
}

/// A packet of `len` bytes, header included: the header as a TAP gives it, then a pattern.
pub(super) fn packet(len: usize, seed: u8) -> Vec<u8> {
    let pattern = (0..len - 12).map(|i| (i as u8).wrapping_mul(7).wrapping_add(seed));
    let header = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0xee, 0xee];
    header.into_iter().chain(pattern).collect()
}

/// One direction of one pair, without a thread.
pub(super) struct Bench {
    pub(super) memory: Arc<GuestRam>,
    pub(super) driver: DriverQueue,
    pub(super) route: Arc<FakeRoute>,
    pub(super) net: Arc<FakeNet>,
    pub(super) io: Box<dyn NetQueue>,
    pub(super) shared: Shared,
    pub(super) events: Arc<Events>,
    event_idx: bool,
    interrupt: Arc<VirtioInterrupt>,
    size: u16,
}

impl Bench {
    pub(super) fn new(size: u16) -> Self {
        Self::with(size, false, RateLimits::default())
    }

    pub(super) fn with(size: u16, event_idx: bool, limits: RateLimits) -> Self {
        let memory = ram(RAM_BYTES);
        let net = FakeNet::new(1);
        let events = Arc::<Events>::default();
        let limiters = [limits, limits].map(|limits| RateLimiter::new(limits, Instant::now()));
        let backend = Arc::clone(&net) as Arc<dyn NetBackend>;
        let shared = Shared::new(backend, reporter(&events), MAC, limiters);
        shared.apply_offloads(Offloads::ALL).expect("a fake");
        let (interrupt, route) = interrupt(2);
        Self {
            driver: DriverQueue::new(&memory, 0, size),
            memory,
            route,
            io: net.open_queue(0).expect("a fake"),
            net,
            shared,
            events,
            event_idx,
            interrupt,
            size,
        }
    }

    fn queue(&self, index: u16) -> Virtqueue {
        let (driver, memory) = (&self.driver, &self.memory);
        virtqueue(driver, memory, index, self.event_idx, &self.interrupt)
    }

    pub(super) fn receiver(&self, merge: bool) -> Receiver {
        let limiter = self.shared.receive_limiter.clone();
        let throttle = limiter.map(|limiter| Throttle::new(limiter).expect("a timer"));
        Receiver::new(self.queue(0), merge, throttle)
    }

    pub(super) fn transmitter(&self) -> Transmitter {
        let limiter = self.shared.transmit_limiter.clone();
        let throttle = limiter.map(|limiter| Throttle::new(limiter).expect("a timer"));
        Transmitter::new(self.queue(1), throttle)
    }

    /// Offers `count` receive buffers of `len` bytes, one after another from `at`.
    pub(super) fn offer_buffers(&mut self, at: u64, len: u32, count: u64) {
        for i in 0..count {
            let buffer = Buffer::writable(at + i * u64::from(len), len);
            self.driver.offer(&[buffer]);
        }
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("in RAM");
        bytes
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(at))
            .expect("in RAM");
    }

    pub(super) fn interrupts(&self) -> usize {
        self.route.delivered().len()
    }

    /// Whether the device wants to hear of new buffers, without `VIRTIO_F_EVENT_IDX`.
    pub(super) fn wants_doorbell(&self) -> bool {
        let [_, _, used] = self.driver.addresses();
        self.read(used, 1)[0] & 1 == 0
    }

    /// The event index that the driver sets: interrupt when the used index passes it.
    pub(super) fn set_used_event(&self, index: u16) {
        let [_, avail, _] = self.driver.addresses();
        let at = avail + 4 + 2 * u64::from(self.size);
        self.write(at, &index.to_le_bytes());
    }
}
