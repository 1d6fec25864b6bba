//! The device: what the transport asks, in the peer's terms.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::block::{BlockKind, VhostUserBlockOptions, WRITEBACK_AT, writeback};
use super::config;
use super::counters::VhostUserCounters;
use super::fs::{FsKind, VhostUserFsOptions};
use super::handle::{SharedPeer, VhostUserHandle};
use super::kind::{Kind, UnfitPeer, has};
use super::net::{NetKind, VhostUserNetOptions};
use super::peer::{PeerError, PeerQueue, VhostUserPeer};
use super::rings::{Call, drain, finish, first_unfinished, mark_used_ring};
use super::state::{FORMAT, KIND, VhostUserStateV1, check};
use super::watch::{Shared, Watch};
use crate::device::Migratability;
use crate::events::Reporter;
use crate::state::{DeviceState, RestoreError, SaveError, StateFormat};
use crate::virtio::device::{Activation, ActivationError, DeviceIdentity, VirtioDevice};
use crate::virtio::interrupt::VirtioInterrupt;
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::Worker;
use crate::warn_limited;

/// `VHOST_F_LOG_ALL`: never the driver's business.
const LOG_ALL: u32 = 26;

/// How long requests may take before a peer is stopped, and once more afterwards.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// A virtio device on whose queues another process works.
pub struct VhostUser {
    kind: Kind,
    identity: DeviceIdentity,
    peer: SharedPeer,
    shared: Arc<Shared>,
    /// Configuration space as a driver finds it after a reset.
    initial_config: Vec<u8>,
    /// The peer had requests in flight when it was last stopped and waited for.
    unfinished: bool,
    /// How long requests may take before the peer is stopped.
    pub(super) finish_limit: Duration,
    /// How long requests may take that the peer still works on after it was stopped.
    pub(super) drain_limit: Duration,
    running: Option<Running>,
}

/// What exists while the peer works.
struct Running {
    queues: Vec<Virtqueue>,
    interrupt: Arc<VirtioInterrupt>,
    watch: Worker<Watch>,
}

impl VhostUser {
    /// A disk that `peer` serves. Losing the peer goes to `reporter`.
    ///
    /// # Errors
    /// [`UnfitPeer`] when the peer does not offer what the options ask for.
    pub fn block(
        peer: Box<dyn VhostUserPeer>,
        options: VhostUserBlockOptions,
        reporter: Reporter,
    ) -> Result<Self, UnfitPeer> {
        Self::new(Kind::Block(BlockKind { options }), peer, reporter)
    }

    /// A network interface that `peer` serves.
    ///
    /// # Errors
    /// [`UnfitPeer`] when the peer does not offer what the options ask for.
    pub fn net(
        peer: Box<dyn VhostUserPeer>,
        options: VhostUserNetOptions,
        reporter: Reporter,
    ) -> Result<Self, UnfitPeer> {
        Self::new(Kind::Net(NetKind::new(options)?), peer, reporter)
    }

    /// A directory that `peer` serves.
    ///
    /// # Errors
    /// [`UnfitPeer`] when the peer does not offer what the options ask for.
    pub fn fs(
        peer: Box<dyn VhostUserPeer>,
        options: &VhostUserFsOptions,
        reporter: Reporter,
    ) -> Result<Self, UnfitPeer> {
        Self::new(Kind::Fs(FsKind::new(options)?), peer, reporter)
    }

    fn new(
        kind: Kind,
        mut peer: Box<dyn VhostUserPeer>,
        reporter: Reporter,
    ) -> Result<Self, UnfitPeer> {
        let identity = kind.identity(&peer.offer())?;
        let config = kind.config(&mut *peer)?;
        let profile = VhostUserStateV1 {
            device_type: identity.device_type as u8,
            features: identity.features | identity.ring_features,
            config: config.clone(),
        };
        Ok(Self {
            kind,
            identity,
            peer: Arc::new(Mutex::new(peer)),
            shared: Arc::new(Shared::new(reporter, profile)),
            initial_config: config,
            unfinished: false,
            finish_limit: DRAIN_LIMIT,
            drain_limit: DRAIN_LIMIT,
            running: None,
        })
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<VhostUserCounters> {
        Arc::clone(&self.shared.counters)
    }

    /// The device for others than its transport.
    #[must_use]
    pub fn handle(&self) -> VhostUserHandle {
        VhostUserHandle {
            peer: Arc::clone(&self.peer),
            shared: Arc::clone(&self.shared),
        }
    }

    /// The configuration space as it is now.
    fn config(&self) -> Vec<u8> {
        self.shared.profile.lock().config.clone()
    }

    fn set_config(&self, config: Vec<u8>) {
        self.shared.profile.lock().config = config;
    }

    /// Connects to the peer again; the new one must be as good as the old.
    fn renew(&mut self) -> Result<(), PeerError> {
        self.peer.lock().reconnect()?;
        let config = self.examine();
        let config = config.inspect_err(|_| self.peer.lock().disconnect())?;
        self.initial_config.clone_from(&config);
        self.set_config(config);
        self.unfinished = false;
        self.shared.set_found();
        self.shared.counters.reconnects.add(1);
        log::info!(device:% = self.shared.reporter.device(); "vhost-user server connected again");
        Ok(())
    }

    /// Configuration of a newly connected peer that can take over.
    fn examine(&mut self) -> Result<Vec<u8>, UnfitPeer> {
        let offered = self.kind.identity(&self.peer.lock().offer())?;
        let all = |identity: &DeviceIdentity| identity.features | identity.ring_features;
        let missing = all(&self.identity) & !all(&offered);
        if missing != 0 {
            return Err(UnfitPeer::FewerFeatures(missing));
        }
        self.kind.config(&mut **self.peer.lock())
    }

    /// Why the device cannot be moved as it is.
    fn obstacle(&self) -> Option<String> {
        if let Some(reason) = self.kind.stays() {
            return Some(reason.to_owned());
        }
        if self.shared.is_lost() {
            let reason =
                "its vhost-user server is gone: start it, and have the guest reset the device";
            return Some(reason.to_owned());
        }
        let offer = self.peer.lock().offer();
        let wanted = [
            (offer.log, "VHOST_USER_PROTOCOL_F_LOG_SHMFD"),
            (has(offer.features, LOG_ALL), "VHOST_F_LOG_ALL"),
        ];
        let missing = wanted.iter().filter(|(offered, _)| !offered);
        let missing: Vec<_> = missing.map(|(_, name)| *name).collect();
        if !missing.is_empty() {
            let missing = missing.join(" and ");
            return Some(format!(
                "its vhost-user server does not offer {missing}: what it writes to guest memory cannot \
                 be followed"
            ));
        }
        self.unfinished
            .then(|| "its vhost-user server has requests in flight that do not end".to_owned())
    }

    /// Sets the cache mode that a driver has chosen elsewhere: the peer has its own default.
    fn take_over_cache_mode(&self, wire: &VhostUserStateV1) -> Result<(), RestoreError> {
        let mode = writeback(&wire.config);
        if !matches!(self.kind, Kind::Block(_)) || mode == writeback(&self.config()) {
            return Ok(());
        }
        let at = u32::try_from(WRITEBACK_AT).unwrap_or(u32::MAX);
        let set = self.peer.lock().write_config(at, &[mode]);
        set.map_err(|error| {
            let why = format!(
                "the vhost-user server does not take it: {}",
                explain(&*error)
            );
            RestoreError::field(KIND, "writeback", mode, why)
        })
    }

    fn start_peer(&mut self, activation: &Activation) -> Result<(), PeerError> {
        let queues = &activation.queues;
        let calls = queues.iter().map(Call::of).collect::<Result<Vec<_>, _>>()?;
        let setups: Vec<_> = queues
            .iter()
            .zip(&calls)
            .map(|(queue, call)| {
                let state = queue.state();
                PeerQueue {
                    index: queue.index(),
                    size: queue.size(),
                    desc_table: state.desc_table,
                    avail_ring: state.avail_ring,
                    used_ring: state.used_ring,
                    next_avail: state.next_avail,
                    kick: queue.doorbell(),
                    call: call.eventfd(),
                }
            })
            .collect();
        let mut peer = self.peer.lock();
        let features = activation.features & peer.offer().features;
        peer.start(&activation.memory, features, &setups)?;
        drop(peer);
        for queue in queues {
            // A ring starts with its first kick, and the driver may have filled it before.
            let _ = queue.doorbell().write(1);
        }
        Ok(())
    }

    /// Lets the peer finish what it has begun and what the driver has made available. Servers on
    /// QEMU's libvhost-user (7.2 for one) break when a request ends in a stopped queue: they signal
    /// a descriptor that the stop has closed.
    fn finish_requests(&self, queues: &[Virtqueue]) {
        if !self.kind.answers_every_request() {
            return;
        }
        let deadline = Instant::now() + self.finish_limit;
        for queue in queues {
            finish(queue, || {
                self.shared.is_lost() || Instant::now() >= deadline
            });
        }
    }

    /// Takes the queues back from the peer and moves them to where it has got to.
    fn stop_peer(&mut self, queues: &mut [Virtqueue]) -> Result<(), PeerError> {
        let indices: Vec<_> = queues.iter().map(Virtqueue::index).collect();
        let positions = self.peer.lock().stop(&indices)?;
        let deadline = Instant::now() + self.drain_limit;
        self.unfinished = false;
        for (queue, next_avail) in queues.iter_mut().zip(positions) {
            if !drain(queue, next_avail, deadline) {
                self.unfinished = true;
                let device = self.shared.reporter.device();
                warn_limited!(device:% = device, queue = queue.index(); "the vhost-user server has requests in flight that do not end");
            }
            queue.set_positions(next_avail, queue.used_index().unwrap_or(next_avail));
            mark_used_ring(queue);
            // What ended after the stop was not signalled.
            queue.interrupt().signal();
        }
        Ok(())
    }
}

/// An error and what it came from, in one line.
fn explain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

impl VirtioDevice for VhostUser {
    fn identity(&self) -> &DeviceIdentity {
        &self.identity
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if self.shared.is_lost() {
            config::read(&self.kind.without_peer(&self.config()), offset, data);
        } else {
            config::read(&self.shared.profile.lock().config, offset, data);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at = u32::try_from(offset).ok();
        let Some(at) = at.filter(|_| self.kind.is_writable(offset, data)) else {
            return;
        };
        if self.shared.is_lost() {
            return;
        }
        let written = self.peer.lock().write_config(at, data);
        match written {
            Ok(()) => config::write(&mut self.shared.profile.lock().config, offset, data),
            Err(error) => {
                let (device, error) = (self.shared.reporter.device(), explain(&*error));
                warn_limited!(device:% = device, error:% = error; "configuration not changed");
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let peer = |what| move |source| ActivationError::Peer { what, source };
        if activation.queues.is_empty() {
            return Err(ActivationError::MissingQueue(0));
        }
        if self.shared.is_lost() {
            let before = self.config();
            let result = self.renew();
            result.map_err(peer("the vhost-user server could not be connected again"))?;
            if let Some(queue) = first_unfinished(&activation.queues) {
                let why = "requests were in flight when the vhost-user server was lost".to_owned();
                return Err(ActivationError::Queue { queue, why });
            }
            if self.config() != before {
                activation.interrupt.config_changed();
            }
        }
        if let Err(error) = self.start_peer(&activation) {
            self.shared.lose(&explain(&*error), None);
            self.peer.lock().disconnect();
            return Err(peer("the vhost-user server could not be started")(error));
        }
        let connection = self.peer.lock().connection();
        let watch = connection.and_then(|connection| {
            let watch = Watch {
                connection,
                interrupt: Arc::clone(&activation.interrupt),
                shared: Arc::clone(&self.shared),
            };
            let name = format!("{}-watch", self.shared.reporter.device());
            Worker::spawn(&name, watch).map_err(|(error, _)| error)
        });
        match watch {
            Ok(watch) => {
                self.running = Some(Running {
                    queues: activation.queues,
                    interrupt: activation.interrupt,
                    watch,
                });
                Ok(())
            }
            Err(source) => {
                let mut queues = activation.queues;
                if let Err(error) = self.stop_peer(&mut queues) {
                    self.shared.lose(&explain(&*error), None);
                }
                let what = "vhost-user thread";
                Err(ActivationError::Host { what, source })
            }
        }
    }

    fn deactivate(&mut self) -> Vec<Virtqueue> {
        let Some(running) = self.running.take() else {
            return Vec::new();
        };
        let mut queues = running.queues;
        self.finish_requests(&queues);
        drop(running.watch);
        if !self.shared.is_lost()
            && let Err(error) = self.stop_peer(&mut queues)
        {
            self.shared
                .lose(&explain(&*error), Some(&running.interrupt));
        }
        if self.shared.is_lost() {
            self.peer.lock().disconnect();
        }
        queues
    }

    fn reset(&mut self) {
        // Requests of the old driver must not end in the memory of the new one.
        if self.shared.is_lost() || self.unfinished {
            if let Err(error) = self.renew() {
                self.shared.lose(&explain(&*error), None);
                let (device, error) = (self.shared.reporter.device(), explain(&*error));
                warn_limited!(device:% = device, error:% = error; "vhost-user server not connected again");
            }
            return;
        }
        let config = self.config();
        if config != self.initial_config {
            let changes = config.iter().zip(&self.initial_config).zip(0..);
            let changed = changes.filter(|((now, initial), _)| now != initial);
            let writes: Vec<(u64, u8)> = changed.map(|((_, initial), at)| (at, *initial)).collect();
            for (offset, byte) in writes {
                self.write_config(offset, &[byte]);
            }
        }
    }

    fn migratability(&self) -> Migratability {
        match self.obstacle() {
            Some(reason) => Migratability::Blocked(reason),
            None => Migratability::Supported,
        }
    }

    fn state_format(&self) -> Option<StateFormat> {
        self.kind.stays().is_none().then_some(FORMAT)
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        if let Some(reason) = self.obstacle() {
            let device = self.shared.reporter.device().to_string();
            return Err(SaveError::Blocked { device, reason });
        }
        FORMAT.encode(&*self.shared.profile.lock())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if let Some(why) = self.kind.stays() {
            return Err(RestoreError::field(KIND, "kind", &state.kind, why));
        }
        let wire: VhostUserStateV1 = FORMAT.decode(state)?;
        check(&self.shared.profile.lock(), &wire)?;
        self.take_over_cache_mode(&wire)?;
        // What the driver was not offered before it shall not find after its next reset either.
        self.identity.features &= wire.features;
        self.identity.ring_features &= wire.features;
        self.kind.take_over(&wire);
        if let Kind::Net(net) = &self.kind {
            self.initial_config = net.config();
        }
        *self.shared.profile.lock() = wire;
        Ok(())
    }
}
