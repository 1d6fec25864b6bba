//! The device: configuration, and a worker while it is active.

use std::io;
use std::sync::Arc;

use vmm_sys_util::timerfd::TimerFd;

use super::host::VsockHost;
use super::muxer::Muxer;
use super::state::VsockStateV1;
use super::worker::{Remains, VsockWorker};
use crate::counters::{Counter, Counters};
use crate::device::{DeviceId, Migratability};
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::virtio::device::{
    Activation, ActivationError, DeviceIdentity, DeviceType, RING_FEATURES, VirtioDevice,
};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::Worker;

const KIND: &str = "virtio-vsock";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);
const QUEUE_SIZE: u16 = 128;
/// Receive, transmit, events (section 5.10.2).
const QUEUES: usize = 3;
/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u32 = 0;
/// Context ids that a guest can have (section 5.10.4).
const GUEST_CIDS: std::ops::Range<u64> = 3..0xffff_ffff;

/// How a socket device appears to the guest.
#[derive(Clone, Debug)]
pub struct VsockOptions {
    /// The guest's context id.
    pub guest_cid: u64,
    /// Connections at the same time, those being made included. Each takes a descriptor and, at
    /// worst, 64 KiB.
    pub max_connections: usize,
}

impl VsockOptions {
    /// A guest with context id `guest_cid` and up to 1024 connections.
    #[must_use]
    pub fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            max_connections: 1024,
        }
    }
}

/// What a socket device counts.
#[derive(Debug, Default)]
pub struct VsockCounters {
    /// Connections made, those that were never answered included.
    pub opened: Counter,
    /// Connections ended.
    pub closed: Counter,
    /// Connections refused: nobody listens, no room, or not a request at all.
    pub refused_connections: Counter,
    /// Packets from the guest.
    pub received_packets: Counter,
    /// Data from the guest.
    pub received_bytes: Counter,
    /// Packets to the guest.
    pub sent_packets: Counter,
    /// Data to the guest.
    pub sent_bytes: Counter,
    /// Resets sent to the guest.
    pub resets: Counter,
    /// Packets from the guest that made no sense.
    pub refused_packets: Counter,
}

impl Counters for VsockCounters {
    fn visit(&self, visit: &mut dyn FnMut(&'static str, &'static str, u64)) {
        let all: [(_, _, &Counter); 9] = [
            ("vsock_opened_total", "connections made", &self.opened),
            ("vsock_closed_total", "connections ended", &self.closed),
            (
                "vsock_refused_connections_total",
                "connections refused",
                &self.refused_connections,
            ),
            (
                "vsock_received_packets_total",
                "packets from the guest",
                &self.received_packets,
            ),
            (
                "vsock_received_bytes_total",
                "bytes from the guest",
                &self.received_bytes,
            ),
            (
                "vsock_sent_packets_total",
                "packets to the guest",
                &self.sent_packets,
            ),
            (
                "vsock_sent_bytes_total",
                "bytes to the guest",
                &self.sent_bytes,
            ),
            ("vsock_resets_total", "resets sent", &self.resets),
            (
                "vsock_refused_packets_total",
                "invalid packets",
                &self.refused_packets,
            ),
        ];
        for (name, help, counter) in all {
            visit(name, help, counter.get());
        }
    }
}

/// A virtio socket device.
pub struct Vsock {
    id: DeviceId,
    identity: DeviceIdentity,
    guest_cid: u64,
    counters: Arc<VsockCounters>,
    /// Present while inactive. Connections outlive a pause.
    muxer: Option<Muxer>,
    /// While inactive: the driver must hear that its connections are gone.
    transport_reset: bool,
    worker: Option<Worker<VsockWorker>>,
}

/// A socket device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// No guest may have this context id.
    #[error("vsock context id {0} is reserved: expected 3 to 4294967294")]
    ReservedCid(u64),
    /// The host has no descriptor left.
    #[error("vsock event descriptor")]
    Descriptor(#[source] io::Error),
}

impl Vsock {
    /// A device named `id`, whose connections end at `host`.
    ///
    /// # Errors
    /// [`VsockError`] when the context id is reserved or the host has no descriptor left.
    pub fn new(
        id: DeviceId,
        options: &VsockOptions,
        host: Box<dyn VsockHost>,
    ) -> Result<Self, VsockError> {
        let guest_cid = options.guest_cid;
        if !GUEST_CIDS.contains(&guest_cid) {
            return Err(VsockError::ReservedCid(guest_cid));
        }
        let counters = Arc::<VsockCounters>::default();
        let muxer = Muxer::new(options, host, Arc::clone(&counters));
        Ok(Self {
            id,
            identity: DeviceIdentity {
                device_type: DeviceType::Vsock,
                features: 1 << F_STREAM,
                ring_features: RING_FEATURES,
                queue_sizes: vec![QUEUE_SIZE; QUEUES],
            },
            guest_cid,
            counters,
            muxer: Some(muxer.map_err(VsockError::Descriptor)?),
            transport_reset: false,
            worker: None,
        })
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<VsockCounters> {
        Arc::clone(&self.counters)
    }

    fn take_back(&mut self, worker: VsockWorker) -> [Virtqueue; QUEUES] {
        let remains = worker.into_remains();
        self.muxer = Some(remains.muxer);
        self.transport_reset = remains.transport_reset;
        remains.queues
    }
}

/// The three queues; all are needed.
fn assign(queues: Vec<Virtqueue>) -> Result<[Virtqueue; QUEUES], ActivationError> {
    let present: Vec<u16> = queues.iter().map(Virtqueue::index).collect();
    <[Virtqueue; QUEUES]>::try_from(queues).map_err(|_| {
        let missing = (0..).find(|index| !present.contains(index));
        ActivationError::MissingQueue(missing.unwrap_or_default())
    })
}

impl VirtioDevice for Vsock {
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    /// `struct virtio_vsock_config`: the context id.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let config = self.guest_cid.to_le_bytes();
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let host = |what| move |source| ActivationError::Host { what, source };
        let queues = assign(activation.queues)?;
        let timer = TimerFd::new().map_err(io::Error::from);
        let timer = timer.map_err(host("vsock timer"))?;
        let Some(muxer) = self.muxer.take() else {
            // It is active already.
            return Ok(());
        };
        let transport_reset = self.transport_reset;
        let remains = Remains {
            queues,
            muxer,
            transport_reset,
        };
        let worker = VsockWorker::new(remains, timer, Arc::clone(&self.counters));
        match Worker::spawn(self.id.as_str(), worker) {
            Ok(worker) => {
                self.worker = Some(worker);
                Ok(())
            }
            Err((error, worker)) => {
                self.take_back(worker);
                Err(host("vsock thread")(error))
            }
        }
    }

    fn deactivate(&mut self) -> Vec<Virtqueue> {
        match self.worker.take() {
            Some(worker) => self.take_back(worker.stop()).into(),
            None => Vec::new(),
        }
    }

    fn reset(&mut self) {
        self.transport_reset = false;
        if let Some(muxer) = &mut self.muxer {
            muxer.clear();
        }
    }

    /// The device moves; its connections do not, see [`VsockStateV1`].
    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }

    fn state_format(&self) -> Option<StateFormat> {
        Some(FORMAT)
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let guest_cid = self.guest_cid;
        FORMAT.encode(&VsockStateV1 { guest_cid })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: VsockStateV1 = FORMAT.decode(state)?;
        if !GUEST_CIDS.contains(&wire.guest_cid) {
            let why = "not a guest's context id";
            return Err(RestoreError::field(KIND, "guest_cid", wire.guest_cid, why));
        }
        self.transport_reset = true;
        Ok(())
    }
}
