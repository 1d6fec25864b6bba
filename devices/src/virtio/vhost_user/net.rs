//! Network device (virtio 1.2 section 5.1) with one pair of queues and no control queue.
//!
//! Address and MTU are ours even where the peer has a configuration space: an interface must not
//! change its address with the server that it is plugged into.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::kind::{UnfitPeer, mask};
use super::peer::PeerOffer;
use super::state::{KIND, check_bytes};
use crate::state::RestoreError;
use crate::virtio::net::is_unicast;

/// Checksum and segmentation offloads of both directions.
const OFFLOADS: [u32; 13] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
];

/// How a vhost-user network device appears to the guest.
#[derive(Clone, Debug)]
pub struct VhostUserNetOptions {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// MTU told to the guest.
    pub mtu: Option<u16>,
    /// Whether the peer's checksum and segmentation offloads are offered.
    pub offload: bool,
    /// Queue pairs: 1.
    pub queue_pairs: u16,
    /// Entries per queue, a power of two.
    pub queue_size: u16,
}

/// `struct virtio_net_config` up to the MTU.
#[derive(Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ConfigSpace {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// Length of the address, which the configuration space begins with.
const MAC_BYTES: usize = 6;

pub(super) struct NetKind {
    options: VhostUserNetOptions,
}

impl NetKind {
    pub(super) fn new(options: VhostUserNetOptions) -> Result<Self, UnfitPeer> {
        match options.queue_pairs {
            1 => Ok(Self { options }),
            pairs => Err(UnfitPeer::QueuePairs(pairs)),
        }
    }

    pub(super) fn features(&self, offer: &PeerOffer) -> u64 {
        let mut own = vec![VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS];
        if self.options.mtu.is_some() {
            own.push(VIRTIO_NET_F_MTU);
        }
        let mut peers = 1 << VIRTIO_NET_F_MRG_RXBUF;
        if self.options.offload {
            peers |= mask(&OFFLOADS);
        }
        mask(&own) | offer.features & peers
    }

    /// Takes the address of a configuration space that was checked: a driver keeps the one it has
    /// been told.
    pub(super) fn take_address(&mut self, config: &[u8]) {
        if let Some(mac) = config.first_chunk() {
            self.options.mac = *mac;
        }
    }

    pub(super) fn queue_sizes(&self) -> Vec<u16> {
        vec![self.options.queue_size; 2]
    }

    pub(super) fn config(&self) -> Vec<u8> {
        self.config_with_status((VIRTIO_NET_S_LINK_UP & 0xffff) as u16)
    }

    pub(super) fn without_link(&self) -> Vec<u8> {
        self.config_with_status(0)
    }

    fn config_with_status(&self, status: u16) -> Vec<u8> {
        let config = ConfigSpace {
            mac: self.options.mac,
            status: status.into(),
            max_virtqueue_pairs: 1.into(),
            mtu: self.options.mtu.unwrap_or(0).into(),
        };
        config.as_bytes().to_vec()
    }
}

/// Whether an interface that is as `ours` can go on as `theirs`, of the same length: with its
/// address.
pub(super) fn check_config(ours: &[u8], theirs: &[u8]) -> Result<(), RestoreError> {
    let mac: [u8; MAC_BYTES] = theirs.first_chunk().copied().unwrap_or_default();
    if !is_unicast(mac) {
        let value = format!("{mac:02x?}");
        let why = "not a unicast address";
        return Err(RestoreError::field(KIND, "mac", value, why));
    }
    check_bytes(ours, theirs, 0..MAC_BYTES)
}
