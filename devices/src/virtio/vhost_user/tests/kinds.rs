//! What each kind of device shows its driver.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SIZE_MAX};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::virtio::DeviceType;

fn block(offer: PeerOffer, queues: u16) -> Result<VhostUser, UnfitPeer> {
    let peer = Box::new(FakePeer::new(offer));
    VhostUser::block(peer, block_options(queues), reporter().0)
}

fn net(offer: PeerOffer, options: VhostUserNetOptions) -> Result<VhostUser, UnfitPeer> {
    VhostUser::net(Box::new(FakePeer::new(offer)), options, reporter().0)
}

fn fs(offer: PeerOffer, tag: &str, queues: u16) -> Result<VhostUser, UnfitPeer> {
    let options = VhostUserFsOptions {
        tag: tag.to_owned(),
        queues,
        queue_size: 1024,
    };
    VhostUser::fs(Box::new(FakePeer::new(offer)), &options, reporter().0)
}

fn net_options() -> VhostUserNetOptions {
    VhostUserNetOptions {
        mac: [0x52, 0x54, 0, 1, 2, 3],
        mtu: None,
        offload: true,
        queue_pairs: 1,
        queue_size: 256,
    }
}

fn config(device: &VhostUser, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    device.read_config(0, &mut data);
    data
}

/// Everything that a peer may claim, known or not.
fn everything() -> PeerOffer {
    PeerOffer {
        features: u64::MAX,
        queues: 256,
        config: true,
        log: true,
    }
}

#[test]
fn disk_offers_what_its_peer_offers_and_drover_knows() {
    let device = block(offer(), 1).unwrap();
    let identity = device.identity();
    assert_eq!(identity.device_type, DeviceType::Block);
    let expected = [
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    assert_eq!(identity.features, mask(&expected));
    assert_eq!(identity.ring_features, 1 << VIRTIO_RING_F_INDIRECT_DESC);
    assert_eq!(identity.queue_sizes, [64]);

    let all = block(everything(), 2).unwrap();
    let identity = all.identity();
    // Bits 24 and up belong to rings and transports; those above 14 have longer configurations.
    assert_eq!(identity.features >> 15, 0, "{:#x}", identity.features);
    for bit in [VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SIZE_MAX] {
        assert_ne!(identity.features & 1 << bit, 0, "bit {bit}");
    }
    let rings = mask(&[VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX]);
    assert_eq!(identity.ring_features, rings);
}

#[test]
fn disk_configuration_is_the_peers_but_for_queues_and_segments() {
    let peer = FakePeer::new(offer());
    let huge = u32::MAX.to_le_bytes();
    peer.with(|state| state.config[12..16].copy_from_slice(&huge));
    let device = VhostUser::block(Box::new(peer), block_options(3), reporter().0).unwrap();
    let mut expected = config_bytes();
    expected[12..16].copy_from_slice(&62_u32.to_le_bytes());
    expected[34..36].copy_from_slice(&3_u16.to_le_bytes());
    expected.extend([0; 4]);
    assert_eq!(config(&device, 64), expected);
}

#[test]
fn peers_limit_of_segments_is_kept_where_it_is_lower() {
    let peer = FakePeer::new(offer());
    peer.with(|state| state.config[12..16].copy_from_slice(&5_u32.to_le_bytes()));
    let device = VhostUser::block(Box::new(peer), block_options(1), reporter().0).unwrap();
    assert_eq!(config(&device, 16)[12..16], 5_u32.to_le_bytes());
}

#[test]
fn interface_has_our_address_and_the_peers_offloads() {
    let device = net(everything(), net_options()).unwrap();
    let identity = device.identity();
    assert_eq!(identity.device_type, DeviceType::Net);
    assert_eq!(identity.queue_sizes, [256, 256]);
    let has = |bit: u32| identity.features & 1 << bit != 0;
    for bit in [
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
    ] {
        assert!(has(bit), "bit {bit}");
    }
    // No control queue, one pair, no MTU given.
    for bit in [VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU] {
        assert!(!has(bit), "bit {bit}");
    }
    assert_eq!(
        config(&device, 12),
        [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0, 0]
    );
}

#[test]
fn interface_without_offload_keeps_only_its_own_features() {
    let options = VhostUserNetOptions {
        mtu: Some(9000),
        offload: false,
        ..net_options()
    };
    let device = net(everything(), options).unwrap();
    let expected = [
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_MRG_RXBUF,
    ];
    assert_eq!(device.identity().features, mask(&expected));
    assert_eq!(config(&device, 12)[10..12], 9000_u16.to_le_bytes());
}

#[test]
fn file_system_has_its_tag_and_a_queue_for_urgent_requests() {
    let device = fs(everything(), "share", 3).unwrap();
    let identity = device.identity();
    assert_eq!(identity.device_type, DeviceType::Fs);
    assert_eq!(
        (identity.features, identity.queue_sizes.len()),
        (0, 4),
        "{identity:?}"
    );
    let mut expected = [0; 44];
    expected[..5].copy_from_slice(b"share");
    expected[36..40].copy_from_slice(&3_u32.to_le_bytes());
    assert_eq!(config(&device, 44), expected);
    let longest = "t".repeat(MAX_TAG_BYTES);
    let device = fs(everything(), &longest, 1).unwrap();
    assert_eq!(config(&device, 36), longest.as_bytes());
}

#[test]
fn unfit_peers_are_refused_with_what_they_lack() {
    let without = |bit: u32| PeerOffer {
        features: offer().features & !(1 << bit),
        ..offer()
    };
    let no_config = PeerOffer {
        config: false,
        ..offer()
    };
    let two_queues = PeerOffer {
        queues: 2,
        ..offer()
    };
    let one_queue = PeerOffer {
        queues: 1,
        ..offer()
    };
    let two_pairs = VhostUserNetOptions {
        queue_pairs: 2,
        ..net_options()
    };
    let table = [
        (
            block(without(VIRTIO_F_VERSION_1), 1),
            "does not offer VIRTIO_F_VERSION_1",
        ),
        (
            block(no_config, 1),
            "does not offer VHOST_USER_PROTOCOL_F_CONFIG",
        ),
        (
            block(without(VIRTIO_BLK_F_MQ), 2),
            "does not offer VIRTIO_BLK_F_MQ",
        ),
        (block(two_queues, 3), "works on 2 queues, 3 are needed"),
        (
            net(one_queue, net_options()),
            "works on 1 queues, 2 are needed",
        ),
        (net(offer(), two_pairs), "has 1 queue pair, not 2"),
        (
            fs(two_queues, "share", 2),
            "works on 2 queues, 3 are needed",
        ),
        (fs(offer(), "", 1), "tag \"\" is not usable"),
        (fs(offer(), &"t".repeat(37), 1), "is not usable"),
    ];
    for (result, expected) in table {
        let error = result.err().expect(expected).to_string();
        assert!(error.contains(expected), "{error}, not {expected}");
    }
}

#[test]
fn disk_whose_configuration_cannot_be_read_is_refused() {
    let peer = FakePeer::new(offer());
    peer.fail("read_config", "too short");
    let result = VhostUser::block(Box::new(peer), block_options(1), reporter().0);
    let error = result.err().unwrap();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "too short");
}
