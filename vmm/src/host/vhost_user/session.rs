//! The exchanges of one connection, in the order that the protocol asks for.

use devices::GuestRam;
use devices::virtio::DeviceType;
use devices::virtio::vhost_user::{PeerOffer, PeerQueue};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::error::RequestFailure;

/// `SET_VRING_KICK` and `SET_VRING_CALL` have 8 bits for a queue's number.
pub(super) const MAX_QUEUES: u16 = 256;

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
    pub(super) offer: PeerOffer,
    protocol: Option<VhostUserProtocolFeatures>,
}

impl Session {
    /// Agrees on the protocol's features.
    pub(super) fn negotiate(
        mut frontend: Frontend,
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
        };
        Ok(Self {
            frontend,
            offer,
            protocol,
        })
    }

    fn negotiate_protocol(frontend: &mut Frontend) -> Result<VhostUserProtocolFeatures, Failure> {
        let offered = named("GET_PROTOCOL_FEATURES", frontend.get_protocol_features())?;
        let known = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG;
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

    /// Hands over memory and rings.
    pub(super) fn start(
        &mut self,
        memory: &GuestRam,
        features: u64,
        queues: &[PeerQueue<'_>],
    ) -> Result<(), Failure> {
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = features | self.offer.features & protocol_bit;
        named("SET_FEATURES", self.frontend.set_features(features))?;
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| ("SET_MEM_TABLE", RequestFailure::NotShared))?;
        named("SET_MEM_TABLE", self.frontend.set_mem_table(&regions))?;
        for queue in queues {
            self.set_up(memory, queue)?;
        }
        if self.protocol.is_some() {
            for queue in queues {
                let result = self
                    .frontend
                    .set_vring_enable(usize::from(queue.index), true);
                named("SET_VRING_ENABLE", result)?;
            }
        }
        let acknowledges = VhostUserProtocolFeatures::REPLY_ACK;
        if !self.protocol.is_some_and(|p| p.contains(acknowledges)) {
            // Requests are worked on in order: an answer to the last means that none has failed.
            named("GET_FEATURES", self.frontend.get_features())?;
        }
        Ok(())
    }

    fn set_up(&mut self, memory: &GuestRam, queue: &PeerQueue<'_>) -> Result<(), Failure> {
        let index = usize::from(queue.index);
        // Rings are told by their addresses in this process, which the memory table translates.
        let host = |address: u64| {
            let pointer = memory.get_host_address(GuestAddress(address));
            pointer.map_or(Err(vhost::Error::InvalidQueue), |p| Ok(p as u64))
        };
        let addresses = || -> Result<_, vhost::Error> {
            Ok(VringConfigData {
                queue_max_size: queue.size,
                queue_size: queue.size,
                flags: 0,
                desc_table_addr: host(queue.desc_table)?,
                used_ring_addr: host(queue.used_ring)?,
                avail_ring_addr: host(queue.avail_ring)?,
                log_addr: None,
            })
        };
        let rings = named("SET_VRING_ADDR", addresses())?;
        let frontend = &self.frontend;
        named("SET_VRING_NUM", frontend.set_vring_num(index, queue.size))?;
        named(
            "SET_VRING_BASE",
            frontend.set_vring_base(index, queue.next_avail),
        )?;
        named("SET_VRING_ADDR", frontend.set_vring_addr(index, &rings))?;
        // The kick starts the ring, so it comes last.
        named("SET_VRING_CALL", frontend.set_vring_call(index, queue.call))?;
        named("SET_VRING_KICK", frontend.set_vring_kick(index, queue.kick))
    }

    /// Takes the rings back. They are stopped before they are disabled: a network server drops
    /// what it finds in a ring that is disabled and not stopped.
    pub(super) fn stop(&mut self, queues: &[u16]) -> Result<Vec<u16>, Failure> {
        const REQUEST: &str = "GET_VRING_BASE";
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

/// How many queues a server has that does not tell.
fn queues_of_every_server(device_type: DeviceType) -> u16 {
    match device_type {
        // Receive and transmit; urgent and ordinary requests.
        DeviceType::Net | DeviceType::Fs => 2,
        _ => 1,
    }
}
