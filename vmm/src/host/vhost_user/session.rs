//! The exchanges of one connection, in the order that the protocol asks for.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use devices::GuestRam;
use devices::virtio::DeviceType;
use devices::virtio::vhost_user::{PeerLog, PeerOffer, PeerQueue};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::error::RequestFailure;
use super::log;

/// `SET_VRING_KICK` and `SET_VRING_CALL` have 8 bits for a queue's number.
pub(super) const MAX_QUEUES: u16 = 256;

/// `VHOST_VRING_F_LOG`: the used ring's writes are logged.
const RING_LOG: u32 = 1 << 0;

/// A failed request: its name and how it failed.
pub(super) type Failure = (&'static str, RequestFailure);

/// Names the request that a result belongs to.
fn named<T, E: Into<RequestFailure>>(
    request: &'static str,
    result: Result<T, E>,
) -> Result<T, Failure> {
    result.map_err(|error| (request, error.into()))
}

/// What was agreed on.
pub(super) struct Session {
    frontend: Frontend,
    /// The same connection, for what the crate does not do.
    socket: Arc<UnixStream>,
    pub(super) offer: PeerOffer,
    protocol: Option<VhostUserProtocolFeatures>,
    /// What the server works with while it does.
    started: Option<Started>,
}

struct Started {
    /// Features without that of the log.
    features: u64,
    /// Rings by number, without their logs.
    rings: Vec<(usize, VringConfigData)>,
    /// Guest-physical addresses of the used rings, for the log.
    used: Vec<u64>,
}

impl Session {
    /// Agrees on the protocol's features.
    pub(super) fn negotiate(
        mut frontend: Frontend,
        socket: &Arc<UnixStream>,
        device_type: DeviceType,
    ) -> Result<Self, Failure> {
        named("SET_OWNER", frontend.set_owner())?;
        let features = named("GET_FEATURES", frontend.get_features())?;
        let protocol = if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            None
        } else {
            Some(Self::negotiate_protocol(&mut frontend)?)
        };
        let has = |feature| protocol.is_some_and(|protocol| protocol.contains(feature));
        // For network devices servers do not agree whether to count queues or pairs.
        let queues = if has(VhostUserProtocolFeatures::MQ) && device_type != DeviceType::Net {
            let count = named("GET_QUEUE_NUM", frontend.get_queue_num())?;
            u16::try_from(count).unwrap_or(u16::MAX).min(MAX_QUEUES)
        } else {
            queues_of_every_server(device_type)
        };
        let offer = PeerOffer {
            features,
            queues,
            config: has(VhostUserProtocolFeatures::CONFIG),
            log: has(VhostUserProtocolFeatures::LOG_SHMFD),
        };
        Ok(Self {
            frontend,
            socket: Arc::clone(socket),
            offer,
            protocol,
            started: None,
        })
    }

    fn negotiate_protocol(frontend: &mut Frontend) -> Result<VhostUserProtocolFeatures, Failure> {
        let offered = named("GET_PROTOCOL_FEATURES", frontend.get_protocol_features())?;
        let known = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD;
        let protocol = offered & known;
        let result = frontend.set_protocol_features(protocol);
        named("SET_PROTOCOL_FEATURES", result)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(protocol)
    }

    pub(super) fn read_config(&mut self, data: &mut [u8]) -> Result<(), Failure> {
        const REQUEST: &str = "GET_CONFIG";
        let flags = VhostUserConfigFlags::empty();
        let len = u32::try_from(data.len()).map_err(|_| (REQUEST, RequestFailure::Refused))?;
        let result = self.frontend.get_config(0, len, flags, data);
        let (_, bytes) = named(REQUEST, result)?;
        // The crate checks that it is as long as what was asked for.
        data.copy_from_slice(&bytes);
        Ok(())
    }

    pub(super) fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Failure> {
        let flags = VhostUserConfigFlags::WRITABLE;
        named("SET_CONFIG", self.frontend.set_config(offset, flags, data))
    }

    /// Hands over memory and rings, and the log if the server's writes are to be marked.
    pub(super) fn start(
        &mut self,
        memory: &GuestRam,
        features: u64,
        queues: &[PeerQueue<'_>],
        log: Option<&PeerLog>,
    ) -> Result<(), Failure> {
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = features | self.offer.features & protocol_bit;
        self.give_log(log)?;
        let logged = features | log_bit(log.is_some());
        named("SET_FEATURES", self.frontend.set_features(logged))?;
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| ("SET_MEM_TABLE", RequestFailure::NotShared))?;
        named("SET_MEM_TABLE", self.frontend.set_mem_table(&regions))?;
        let mut rings = Vec::with_capacity(queues.len());
        for queue in queues {
            let ring = addresses(memory, queue);
            let ring = named("SET_VRING_ADDR", ring)?;
            self.set_up(queue, &with_log(ring, queue.used_ring, log.is_some()))?;
            rings.push((usize::from(queue.index), ring));
        }
        if self.protocol.is_some() {
            for queue in queues {
                let result = self
                    .frontend
                    .set_vring_enable(usize::from(queue.index), true);
                named("SET_VRING_ENABLE", result)?;
            }
        }
        self.started = Some(Started {
            features,
            rings,
            used: queues.iter().map(|queue| queue.used_ring).collect(),
        });
        self.settle()
    }

    /// Has the server mark its writes in `log`, or no longer. One that works goes on meanwhile.
    pub(super) fn set_log(&mut self, log: Option<&PeerLog>) -> Result<(), Failure> {
        self.give_log(log)?;
        let Some(started) = &self.started else {
            return Ok(());
        };
        let features = started.features | log_bit(log.is_some());
        named("SET_FEATURES", self.frontend.set_features(features))?;
        for ((index, ring), used) in started.rings.iter().zip(&started.used) {
            let ring = with_log(*ring, *used, log.is_some());
            let result = self.frontend.set_vring_addr(*index, &ring);
            named("SET_VRING_ADDR", result)?;
        }
        self.settle()
    }

    /// Gives the server the memory that it is to mark its writes in.
    fn give_log(&self, log: Option<&PeerLog>) -> Result<(), Failure> {
        const REQUEST: &str = "SET_LOG_BASE";
        let Some(log) = log else {
            return Ok(());
        };
        if !self.offer.log || self.offer.features & log_bit(true) == 0 {
            return Err((REQUEST, RequestFailure::NoLog));
        }
        named(REQUEST, log::send(&self.socket, log))
    }

    /// Returns when all requests before are done, and none has failed.
    fn settle(&self) -> Result<(), Failure> {
        let acknowledges = VhostUserProtocolFeatures::REPLY_ACK;
        if !self.protocol.is_some_and(|p| p.contains(acknowledges)) {
            // Requests are worked on in order: an answer to the last means that none has failed.
            named("GET_FEATURES", self.frontend.get_features())?;
        }
        Ok(())
    }

    fn set_up(&self, queue: &PeerQueue<'_>, ring: &VringConfigData) -> Result<(), Failure> {
        let index = usize::from(queue.index);
        let frontend = &self.frontend;
        named("SET_VRING_NUM", frontend.set_vring_num(index, queue.size))?;
        named(
            "SET_VRING_BASE",
            frontend.set_vring_base(index, queue.next_avail),
        )?;
        named("SET_VRING_ADDR", frontend.set_vring_addr(index, ring))?;
        // The kick starts the ring, so it comes last.
        named("SET_VRING_CALL", frontend.set_vring_call(index, queue.call))?;
        named("SET_VRING_KICK", frontend.set_vring_kick(index, queue.kick))
    }

    /// Takes the rings back. They are stopped before they are disabled: a network server drops
    /// what it finds in a ring that is disabled and not stopped.
    pub(super) fn stop(&mut self, queues: &[u16]) -> Result<Vec<u16>, Failure> {
        const REQUEST: &str = "GET_VRING_BASE";
        self.started = None;
        let mut positions = Vec::with_capacity(queues.len());
        for queue in queues {
            let result = self.frontend.get_vring_base(usize::from(*queue));
            let position = named(REQUEST, result)?;
            let outside = |_| (REQUEST, RequestFailure::Position(position));
            positions.push(u16::try_from(position).map_err(outside)?);
        }
        if self.protocol.is_some() {
            for queue in queues {
                let result = self.frontend.set_vring_enable(usize::from(*queue), false);
                named("SET_VRING_ENABLE", result)?;
            }
        }
        Ok(positions)
    }
}

/// `VHOST_F_LOG_ALL`, if writes are logged.
fn log_bit(logs: bool) -> u64 {
    match logs {
        true => VhostUserVirtioFeatures::LOG_ALL.bits(),
        false => 0,
    }
}

/// Where a queue's rings are: in this process, as the memory table translates it.
fn addresses(memory: &GuestRam, queue: &PeerQueue<'_>) -> Result<VringConfigData, vhost::Error> {
    let host = |address: u64| {
        let pointer = memory.get_host_address(GuestAddress(address));
        pointer.map_or(Err(vhost::Error::InvalidQueue), |p| Ok(p as u64))
    };
    Ok(VringConfigData {
        queue_max_size: queue.size,
        queue_size: queue.size,
        flags: 0,
        desc_table_addr: host(queue.desc_table)?,
        used_ring_addr: host(queue.used_ring)?,
        avail_ring_addr: host(queue.avail_ring)?,
        log_addr: None,
    })
}

/// The ring with its writes to the used ring at `used`, guest-physical, logged or not.
fn with_log(ring: VringConfigData, used: u64, logs: bool) -> VringConfigData {
    VringConfigData {
        flags: if logs { RING_LOG } else { 0 },
        log_addr: logs.then_some(used),
        ..ring
    }
}

/// How many queues a server has that does not tell.
fn queues_of_every_server(device_type: DeviceType) -> u16 {
    match device_type {
        // Receive and transmit; urgent and ordinary requests.
        DeviceType::Net | DeviceType::Fs => 2,
        _ => 1,
    }
}
