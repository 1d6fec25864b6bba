//! A peer in memory, and what the tests share.

#![allow(clippy::cast_possible_truncation)]

mod kinds;
mod lifecycle;
mod loss;
mod moving;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use parking_lot::Mutex;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use vm_memory::{Bytes, GuestAddress};

use super::kind::mask;
use super::*;
use crate::GuestRam;
use crate::device::DeviceId;
use crate::events::{DeviceEvent, EventSink, Reporter};
use crate::testing::{DriverQueue, FakeRoute, ram};
use crate::virtio::{Activation, VirtioDevice, Virtqueue};

/// `VHOST_F_LOG_ALL`.
const LOG_ALL: u32 = 26;

const DEADLINE: Duration = Duration::from_secs(20);

/// A queue as the peer was given it.
#[derive(Clone, Debug, PartialEq)]
struct GivenQueue {
    index: u16,
    size: u16,
    addresses: [u64; 3],
    next_avail: u16,
}

/// What a fake peer is, and what happened to it.
struct PeerState {
    offer: PeerOffer,
    config: Vec<u8>,
    /// The call that fails, and with which words.
    failing: Option<(&'static str, &'static str)>,
    calls: Vec<&'static str>,
    features: u64,
    /// Bytes of the log that it marks its writes in.
    log: Option<u64>,
    given: Vec<GivenQueue>,
    /// What `stop` answers.
    positions: Vec<u16>,
    /// Called within `stop`.
    on_stop: Option<Box<dyn FnOnce() + Send>>,
    /// The server's end of the connection; dropping it hangs up.
    server_end: Option<UnixStream>,
    client_end: Option<UnixStream>,
    /// Doorbells and call descriptors of the last start.
    kicks: Vec<vmm_sys_util::eventfd::EventFd>,
    event_calls: Vec<vmm_sys_util::eventfd::EventFd>,
}

impl PeerState {
    fn connect(&mut self) {
        let (server_end, client_end) = UnixStream::pair().unwrap();
        self.server_end = Some(server_end);
        self.client_end = Some(client_end);
    }

    fn enter(&mut self, call: &'static str) -> Result<(), PeerError> {
        self.calls.push(call);
        match self.failing {
            Some((failing, why)) if failing == call => Err(why.into()),
            _ => Ok(()),
        }
    }
}

#[derive(Clone)]
struct FakePeer(Arc<Mutex<PeerState>>);

fn offer() -> PeerOffer {
    PeerOffer {
        features: mask(&[
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
            LOG_ALL,
        ]),
        queues: 4,
        config: true,
        log: true,
    }
}

/// Each byte is its own offset, but for the cache mode, which is write-through.
fn config_bytes() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..60).collect();
    bytes[32] = 0;
    bytes
}

impl FakePeer {
    fn new(offer: PeerOffer) -> Self {
        let mut state = PeerState {
            offer,
            config: config_bytes(),
            failing: None,
            calls: Vec::new(),
            features: 0,
            log: None,
            given: Vec::new(),
            positions: vec![0; 4],
            on_stop: None,
            server_end: None,
            client_end: None,
            kicks: Vec::new(),
            event_calls: Vec::new(),
        };
        state.connect();
        Self(Arc::new(Mutex::new(state)))
    }

    /// A change from outside.
    fn with<T>(&self, f: impl FnOnce(&mut PeerState) -> T) -> T {
        f(&mut self.0.lock())
    }

    fn fail(&self, call: &'static str, why: &'static str) {
        self.with(|state| state.failing = Some((call, why)));
    }

    /// Calls since the last time.
    fn calls(&self) -> Vec<&'static str> {
        self.with(|state| std::mem::take(&mut state.calls))
    }

    fn hang_up(&self) {
        self.with(|state| state.server_end = None);
    }
}

impl VhostUserPeer for FakePeer {
    fn offer(&self) -> PeerOffer {
        self.with(|state| state.offer)
    }

    fn reconnect(&mut self) -> Result<(), PeerError> {
        self.with(|state| {
            state.enter("reconnect")?;
            state.connect();
            Ok(())
        })
    }

    fn disconnect(&mut self) {
        self.with(|state| {
            state.calls.push("disconnect");
            state.client_end = None;
        });
    }

    fn read_config(&mut self, data: &mut [u8]) -> Result<(), PeerError> {
        self.with(|state| {
            state.enter("read_config")?;
            data.copy_from_slice(&state.config);
            Ok(())
        })
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), PeerError> {
        self.with(|state| {
            state.enter("write_config")?;
            config::write(&mut state.config, u64::from(offset), data);
            Ok(())
        })
    }

    fn start(
        &mut self,
        _memory: &GuestRam,
        features: u64,
        queues: &[PeerQueue<'_>],
    ) -> Result<(), PeerError> {
        self.with(|state| {
            state.enter("start")?;
            state.features = features;
            state.kicks = queues.iter().map(|q| q.kick.try_clone().unwrap()).collect();
            state.event_calls = queues.iter().map(|q| q.call.try_clone().unwrap()).collect();
            let given = queues.iter().map(|queue| GivenQueue {
                index: queue.index,
                size: queue.size,
                addresses: [queue.desc_table, queue.avail_ring, queue.used_ring],
                next_avail: queue.next_avail,
            });
            state.given = given.collect();
            Ok(())
        })
    }

    fn stop(&mut self, queues: &[u16]) -> Result<Vec<u16>, PeerError> {
        let on_stop = self.with(|state| {
            state.enter("stop")?;
            Ok::<_, PeerError>(state.on_stop.take())
        })?;
        if let Some(on_stop) = on_stop {
            on_stop();
        }
        let positions = self.with(|state| state.positions.clone());
        Ok(positions.into_iter().take(queues.len()).collect())
    }

    fn set_log(&mut self, log: Option<&PeerLog>) -> Result<(), PeerError> {
        self.with(|state| {
            state.enter("set_log")?;
            state.log = log.map(|log| log.bytes);
            Ok(())
        })
    }

    fn connection(&self) -> io::Result<OwnedFd> {
        self.with(|state| {
            let client_end = state.client_end.as_ref().ok_or(io::ErrorKind::NotConnected);
            Ok(client_end?.try_clone()?.into())
        })
    }
}

/// Passes events to the test.
struct Sink(Mutex<Sender<DeviceEvent>>);

impl EventSink for Sink {
    fn report(&self, device: &DeviceId, event: DeviceEvent) {
        assert_eq!(device.as_str(), "disk0");
        self.0.lock().send(event).unwrap();
    }
}

fn reporter() -> (Reporter, Receiver<DeviceEvent>) {
    let (sender, receiver) = channel();
    let sink = Arc::new(Sink(Mutex::new(sender)));
    (
        Reporter::new(DeviceId::new("disk0").unwrap(), sink),
        receiver,
    )
}

fn block_options(queues: u16) -> VhostUserBlockOptions {
    VhostUserBlockOptions {
        queues,
        queue_size: 64,
    }
}

/// A disk of two queues, its peer and a driver.
struct Rig {
    peer: FakePeer,
    device: VhostUser,
    events: Receiver<DeviceEvent>,
    memory: Arc<GuestRam>,
    routes: Vec<Arc<FakeRoute>>,
}

const QUEUES: u16 = 2;

impl Rig {
    fn new() -> Self {
        let peer = FakePeer::new(offer());
        let (reporter, events) = reporter();
        let device = VhostUser::block(Box::new(peer.clone()), block_options(QUEUES), reporter);
        let rig = Self {
            peer,
            device: device.unwrap(),
            events,
            memory: ram(0x4_0000),
            routes: Vec::new(),
        };
        rig.peer.calls();
        rig
    }

    /// Queues as a driver has set them up.
    fn queues(&mut self) -> Vec<Virtqueue> {
        self.routes.clear();
        (0..QUEUES)
            .map(|index| {
                let driver = DriverQueue::new(&self.memory, base(index), 64);
                let (queue, route) = driver.device_side(index);
                self.routes.push(route);
                queue
            })
            .collect()
    }

    fn activation(&self, queues: Vec<Virtqueue>) -> Activation {
        Activation {
            memory: Arc::clone(&self.memory),
            interrupt: Arc::clone(queues[0].interrupt().shared()),
            queues,
            features: mask(&[VIRTIO_F_VERSION_1, VIRTIO_BLK_F_FLUSH, 63]),
        }
    }

    /// Activates with fresh queues.
    fn activate(&mut self) -> Arc<crate::virtio::VirtioInterrupt> {
        let queues = self.queues();
        let activation = self.activation(queues);
        let interrupt = Arc::clone(&activation.interrupt);
        self.device.activate(activation).unwrap();
        interrupt
    }

    fn resume(&mut self, queues: Vec<Virtqueue>) -> Result<(), crate::virtio::ActivationError> {
        let activation = self.activation(queues);
        self.device.activate(activation)
    }

    /// What the peer does to the used index of queue `index`.
    fn set_used_index(&self, index: u16, used: u16) {
        set_used_index(&self.memory, index, used);
    }

    /// What the driver does to the available index of queue `index`.
    fn set_available_index(&self, index: u16, available: u16) {
        let at = GuestAddress(base(index) + 0x4000 + 2);
        self.memory.write_obj(available, at).unwrap();
    }

    fn losses(&self) -> u64 {
        self.device.counters().losses.get()
    }

    /// Waits for the peer's loss to be reported and returns the reason.
    fn loss(&self) -> String {
        match self.events.recv_timeout(DEADLINE).unwrap() {
            DeviceEvent::BackendLost { reason } => reason,
            other => panic!("{other:?}"),
        }
    }
}

fn base(index: u16) -> u64 {
    u64::from(index) * DriverQueue::BYTES
}

fn set_used_index(memory: &GuestRam, index: u16, used: u16) {
    let at = GuestAddress(base(index) + 0x6000 + 2);
    memory.write_obj(used, at).unwrap();
}
