//! Configuration space, features and queue numbers (sections 5.1.2 to 5.1.4).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::backend::{NetInfo, Offloads};

/// Entries of the control queue: commands come one at a time.
pub(super) const CONTROL_QUEUE_SIZE: u16 = 64;

/// `struct virtio_net_config` up to the MTU; no feature that needs more is offered.
#[derive(Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigSpace {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

impl ConfigSpace {
    pub(super) fn new(mac: [u8; 6], announce: bool, pairs: u16, mtu: Option<u16>) -> Self {
        let announce = if announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let status = VIRTIO_NET_S_LINK_UP | announce;
        Self {
            mac,
            status: ((status & 0xffff) as u16).into(),
            max_virtqueue_pairs: pairs.into(),
            mtu: mtu.unwrap_or(0).into(),
        }
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(self.as_bytes().iter().skip(start)) {
            *byte = *value;
        }
    }
}

/// Features offered over `info` when `offloads` may be used.
pub(super) fn features(info: NetInfo, offloads: Offloads, mtu: Option<u16>) -> u64 {
    let mut bits = vec![
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_CTRL_RX,
        VIRTIO_NET_F_CTRL_MAC_ADDR,
        VIRTIO_NET_F_GUEST_ANNOUNCE,
    ];
    if mtu.is_some() {
        bits.push(VIRTIO_NET_F_MTU);
    }
    if info.queue_pairs > 1 {
        bits.push(VIRTIO_NET_F_MQ);
    }
    // What the host leaves to the guest it also takes from it.
    for (guest, host) in [
        (Offloads::CSUM, VIRTIO_NET_F_CSUM),
        (Offloads::TSO4, VIRTIO_NET_F_HOST_TSO4),
        (Offloads::TSO6, VIRTIO_NET_F_HOST_TSO6),
        (Offloads::ECN, VIRTIO_NET_F_HOST_ECN),
        (Offloads::UFO, VIRTIO_NET_F_HOST_UFO),
        (Offloads::USO4.with(Offloads::USO6), VIRTIO_NET_F_HOST_USO),
    ] {
        if offloads.contains(guest) {
            bits.push(host);
        }
    }
    if offloads != Offloads::NONE {
        bits.push(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
    }
    bits.into_iter()
        .fold(offloads.bits(), |features, bit| features | 1 << bit)
}

/// Number of the receive queue of a pair; the transmit queue is the next.
pub(super) fn receive_queue(pair: u16) -> u16 {
    2 * pair
}

/// Pairs that a driver with these features can reach.
pub(super) fn reachable_pairs(features: u64, pairs: u16) -> u16 {
    if features & 1 << VIRTIO_NET_F_MQ != 0 {
        pairs
    } else {
        1
    }
}

/// Number of the control queue. It follows the pairs that the driver knows of.
pub(super) fn control_queue(features: u64, pairs: u16) -> u16 {
    2 * reachable_pairs(features, pairs)
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_USO6};

    use super::*;

    #[test]
    fn control_queue_follows_the_negotiated_pairs() {
        assert_eq!(control_queue(1 << VIRTIO_NET_F_MQ, 4), 8);
        assert_eq!(control_queue(0, 4), 2);
        assert_eq!(receive_queue(3), 6);
    }

    #[test]
    fn offers_follow_the_host_end_and_the_options() {
        let info = |queue_pairs| NetInfo {
            queue_pairs,
            offloads: Offloads::ALL,
        };
        let plain = features(info(1), Offloads::NONE, None);
        for bit in [
            VIRTIO_NET_F_MQ,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        ] {
            assert_eq!(plain & 1 << bit, 0, "bit {bit}");
        }
        let full = features(info(2), Offloads::ALL, Some(9000));
        for bit in [
            VIRTIO_NET_F_MQ,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_UFO,
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_GUEST_USO6,
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        ] {
            assert_ne!(full & 1 << bit, 0, "bit {bit}");
        }
    }

    #[test]
    fn configuration_reads_as_laid_out_and_as_zeroes_beyond() {
        let config = ConfigSpace::new([2, 1, 2, 3, 4, 5], true, 4, Some(9000));
        let mut bytes = [0xff; 16];
        config.read(0, &mut bytes);
        assert_eq!(
            bytes,
            [2, 1, 2, 3, 4, 5, 3, 0, 4, 0, 0x28, 0x23, 0, 0, 0, 0]
        );
        let mut half = [0xff; 2];
        config.read(6, &mut half);
        assert_eq!(half, [3, 0]);
        config.read(u64::MAX, &mut half);
        assert_eq!(half, [0, 0]);
    }
}
