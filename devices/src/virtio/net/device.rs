//! The device: configuration, and a thread per queue pair while it is active.

use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::backend::{NetBackend, Offloads};
use super::config::{self, CONTROL_QUEUE_SIZE, ConfigSpace};
use super::control::{self, ControlQueue};
use super::receive::Receiver;
use super::shared::{Driver, Gate, NetHandle, Shared};
use super::state::NetStateV1;
use super::throttle::Throttle;
use super::transmit::Transmitter;
use super::worker::PairWorker;
use crate::device::Migratability;
use crate::events::Reporter;
use crate::rate::{RateLimiter, RateLimits};
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::virtio::device::{
    Activation, ActivationError, DeviceIdentity, DeviceType, RING_FEATURES, VirtioDevice,
};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::Worker;

const KIND: &str = "virtio-net";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);

/// How a network device appears to the guest.
#[derive(Clone, Copy, Debug)]
pub struct NetOptions {
    /// The guest's address, unicast.
    pub mac: [u8; 6],
    /// Largest packet of the network behind the device, told to the driver.
    pub mtu: Option<u16>,
    /// Entries of receive and transmit queues, a power of two.
    pub queue_size: u16,
    /// Checksum and segmentation offloads, as far as the host end has them.
    pub offload: bool,
    /// Limits from the host to the guest, shared by all pairs.
    pub receive_limits: RateLimits,
    /// Limits from the guest to the host.
    pub transmit_limits: RateLimits,
}

/// A virtio network device.
pub struct Net {
    identity: DeviceIdentity,
    options: NetOptions,
    pairs: u16,
    shared: Arc<Shared>,
    pub(super) workers: Vec<Worker<PairWorker>>,
    /// Queues that the driver has enabled and cannot use.
    idle: Vec<Virtqueue>,
}

impl Net {
    /// A device over `backend`, with as many queue pairs; host errors go to `reporter`.
    #[must_use]
    pub fn new(backend: Arc<dyn NetBackend>, options: NetOptions, reporter: Reporter) -> Self {
        let info = backend.info();
        let offloads = if options.offload {
            info.offloads
        } else {
            Offloads::NONE
        };
        let mut queue_sizes = vec![options.queue_size; 2 * usize::from(info.queue_pairs)];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let now = Instant::now();
        let limiters = [options.receive_limits, options.transmit_limits]
            .map(|limits| RateLimiter::new(limits, now));
        Self {
            identity: DeviceIdentity {
                device_type: DeviceType::Net,
                features: config::features(info, offloads, options.mtu),
                ring_features: RING_FEATURES,
                queue_sizes,
            },
            pairs: info.queue_pairs,
            shared: Arc::new(Shared::new(backend, reporter, options.mac, limiters)),
            options,
            workers: Vec::new(),
            idle: Vec::new(),
        }
    }

    /// For the machine's owner: counters, announcements.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        NetHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Brings the host end into the state that the driver expects; returns the gates of all
    /// pairs that the driver can reach.
    fn prepare(&self, features: u64) -> Result<Vec<Arc<Gate>>, ActivationError> {
        let host = |what| move |source| ActivationError::Host { what, source };
        let reachable = config::reachable_pairs(features, self.pairs);
        let negotiated = Offloads::from_features(features);
        let (offloads, active) = {
            let mut registers = self.shared.registers();
            registers.active_pairs = registers.active_pairs.min(reachable);
            let chosen = registers.offloads;
            let offloads = chosen.map_or(negotiated, |chosen| chosen.and(negotiated));
            (offloads, registers.active_pairs)
        };
        self.shared
            .apply_offloads(offloads)
            .map_err(host("offloads of the host network"))?;
        for pair in 0..self.pairs {
            self.shared
                .backend
                .set_queue_open(pair, pair < active)
                .map_err(host("queues of the host network"))?;
        }
        let gates = (0..reachable).map(|pair| Gate::new(pair < active).map(Arc::new));
        gates
            .collect::<Result<_, _>>()
            .map_err(host("network wake-up descriptor"))
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let features = activation.features;
        let gates = self.prepare(features)?;
        let mut queues = activation.queues;
        let control_index = config::control_queue(features, self.pairs);
        let mut control = take(&mut queues, control_index).map(|queue| {
            let shared = Arc::clone(&self.shared);
            ControlQueue::new(queue, shared, features, gates.clone())
        });
        for (pair, gate) in (0..).zip(gates) {
            let index = config::receive_queue(pair);
            let (rx, tx) = (take(&mut queues, index), take(&mut queues, index + 1));
            match (rx, tx) {
                (Some(rx), Some(tx)) => {
                    let worker = self.worker(pair, rx, tx, gate, features)?;
                    self.spawn(pair, worker.with_control(control.take()))?;
                }
                (None, None) if pair > 0 => {}
                (None, _) => return Err(ActivationError::MissingQueue(index)),
                (_, None) => return Err(ActivationError::MissingQueue(index + 1)),
            }
        }
        self.idle = queues;
        self.shared.registers().attach(Driver {
            features,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn worker(
        &self,
        pair: u16,
        rx: Virtqueue,
        tx: Virtqueue,
        gate: Arc<Gate>,
        features: u64,
    ) -> Result<PairWorker, ActivationError> {
        let host = |what| move |source| ActivationError::Host { what, source };
        let io = self.shared.backend.open_queue(pair);
        let io = io.map_err(host("queue of the host network"))?;
        let throttle = |limiter: &Option<_>| {
            let limiter = limiter.as_ref().map(Arc::clone);
            limiter.map(Throttle::new).transpose()
        };
        let receive = throttle(&self.shared.receive_limiter).map_err(host("network timer"))?;
        let transmit = throttle(&self.shared.transmit_limiter).map_err(host("network timer"))?;
        let merge = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        Ok(PairWorker::new(
            io,
            Receiver::new(rx, merge, receive),
            Transmitter::new(tx, transmit),
            gate,
            Arc::clone(&self.shared),
        ))
    }

    fn spawn(&mut self, pair: u16, worker: PairWorker) -> Result<(), ActivationError> {
        let name = format!("{}-q{pair}", self.shared.reporter.device());
        let spawned = Worker::spawn(&name, worker);
        let worker = spawned.map_err(|(source, _)| ActivationError::Host {
            what: "network thread",
            source,
        })?;
        self.workers.push(worker);
        Ok(())
    }
}

/// Takes the queue of that number out, if the driver has enabled it.
fn take(queues: &mut Vec<Virtqueue>, index: u16) -> Option<Virtqueue> {
    let at = queues.iter().position(|queue| queue.index() == index)?;
    Some(queues.remove(at))
}

impl VirtioDevice for Net {
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = {
            let registers = self.shared.registers();
            let (mac, announce) = (registers.mac, registers.announce);
            ConfigSpace::new(mac, announce, self.pairs, self.options.mtu)
        };
        config.read(offset, data);
    }

    /// The address is changed by a command (section 5.1.4.2); everything else is read-only.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        self.start(activation)
    }

    fn deactivate(&mut self) -> Vec<Virtqueue> {
        self.shared.registers().driver = None;
        let workers = std::mem::take(&mut self.workers);
        let worked_on = workers
            .into_iter()
            .flat_map(|worker| worker.stop().into_queues());
        worked_on.chain(self.idle.drain(..)).collect()
    }

    fn reset(&mut self) {
        let mut registers = self.shared.registers();
        registers.mac = self.options.mac;
        registers.announce = false;
        registers.active_pairs = 1;
        registers.offloads = None;
    }

    fn migratability(&self) -> Migratability {
        Migratability::Supported
    }

    fn state_format(&self) -> Option<StateFormat> {
        Some(FORMAT)
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let registers = self.shared.registers();
        let wire = NetStateV1 {
            mac: registers.mac,
            mtu: self.options.mtu,
            announce: registers.announce,
            active_pairs: registers.active_pairs,
            offloads: registers.offloads.map(Offloads::bits),
        };
        FORMAT.encode(&wire)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let wire: NetStateV1 = FORMAT.decode(state)?;
        let refuse =
            |field, value: String, why: String| Err(RestoreError::field(KIND, field, value, why));
        if !control::is_unicast(wire.mac) {
            let value = format!("{:02x?}", wire.mac);
            return refuse("mac", value, "not a unicast address".to_owned());
        }
        if wire.mtu != self.options.mtu {
            let why = format!("this device has {:?}", self.options.mtu);
            return refuse("mtu", format!("{:?}", wire.mtu), why);
        }
        if wire.active_pairs == 0 || wire.active_pairs > self.pairs {
            let why = format!("this device has 1 to {} pairs", self.pairs);
            return refuse("active_pairs", wire.active_pairs.to_string(), why);
        }
        let bits = wire.offloads.unwrap_or(0);
        let offered = Offloads::from_features(self.identity.features);
        if bits & !offered.bits() != 0 {
            let why = format!("offered here are {:#x}", offered.bits());
            return refuse("offloads", format!("{bits:#x}"), why);
        }
        let mut registers = self.shared.registers();
        registers.mac = wire.mac;
        registers.announce = wire.announce;
        registers.active_pairs = wire.active_pairs;
        registers.offloads = wire.offloads.map(Offloads::from_features);
        Ok(())
    }
}
