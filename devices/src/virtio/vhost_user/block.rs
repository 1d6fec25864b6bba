//! Block device (virtio 1.2 section 5.2): the peer knows the disk.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::config;
use super::kind::{UnfitPeer, has, mask};
use super::peer::{PeerError, PeerOffer, VhostUserPeer};
use super::state::{KIND, check_bytes};
use crate::state::RestoreError;

/// `struct virtio_blk_config` up to the write-zeroes fields. Peers give an error for a byte more
/// than they have, and this much they all have.
const CONFIG_BYTES: usize = 60;
/// Offsets within it.
const CAPACITY_AT: u64 = 0;
const SEG_MAX_AT: u64 = 12;
pub(super) const WRITEBACK_AT: u64 = 32;
const WRITEBACK_RANGE: std::ops::Range<usize> = 32..33;
const NUM_QUEUES_AT: u64 = 34;

/// Features whose configuration fields lie within [`CONFIG_BYTES`].
const KNOWN_FEATURES: [u32; 10] = [
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_WRITE_ZEROES,
];

/// How a vhost-user block device appears to the guest, as far as its peer does not decide.
#[derive(Clone, Debug)]
pub struct VhostUserBlockOptions {
    /// Request queues, at least 1.
    pub queues: u16,
    /// Entries per queue, a power of two.
    pub queue_size: u16,
}

pub(super) struct BlockKind {
    pub(super) options: VhostUserBlockOptions,
}

impl BlockKind {
    pub(super) fn features(&self, offer: &PeerOffer) -> Result<u64, UnfitPeer> {
        if !offer.config {
            return Err(UnfitPeer::MissingFeature(
                "VHOST_USER_PROTOCOL_F_CONFIG, which tells the size of a disk",
            ));
        }
        let known = offer.features & mask(&KNOWN_FEATURES);
        if self.options.queues == 1 {
            return Ok(known);
        }
        if !has(offer.features, VIRTIO_BLK_F_MQ) {
            return Err(UnfitPeer::MissingFeature(
                "VIRTIO_BLK_F_MQ, which more than one queue needs",
            ));
        }
        Ok(known | 1 << VIRTIO_BLK_F_MQ)
    }

    pub(super) fn queue_sizes(&self) -> Vec<u16> {
        vec![self.options.queue_size; usize::from(self.options.queues)]
    }

    pub(super) fn config(&self, peer: &mut dyn VhostUserPeer) -> Result<Vec<u8>, PeerError> {
        let mut bytes = vec![0; CONFIG_BYTES];
        peer.read_config(&mut bytes)?;
        // Header and status take two descriptors of a chain, which a queue must have room for.
        let mut seg_max = [0; 4];
        config::read(&bytes, SEG_MAX_AT, &mut seg_max);
        let room = u32::from(self.options.queue_size.saturating_sub(2).max(1));
        let seg_max = u32::from_le_bytes(seg_max).min(room);
        config::write(&mut bytes, SEG_MAX_AT, &seg_max.to_le_bytes());
        config::write(
            &mut bytes,
            NUM_QUEUES_AT,
            &self.options.queues.to_le_bytes(),
        );
        Ok(bytes)
    }

    pub(super) fn is_writable(&self, offset: u64, data: &[u8]) -> bool {
        matches!((offset, data), (WRITEBACK_AT, [0 | 1]))
    }
}

/// Whether a disk that is as `ours` can go on as `theirs`, of the same length: all is the peer's but
/// the cache mode.
pub(super) fn check_config(ours: &[u8], theirs: &[u8]) -> Result<(), RestoreError> {
    let sectors = |bytes| {
        let mut sectors = [0; 8];
        config::read(bytes, CAPACITY_AT, &mut sectors);
        u64::from_le_bytes(sectors)
    };
    let (found, wanted) = (sectors(ours), sectors(theirs));
    if found != wanted {
        let why = format!("the vhost-user server here has a disk of {found} sectors");
        return Err(RestoreError::field(KIND, "capacity", wanted, why));
    }
    let mode = writeback(theirs);
    if mode > 1 {
        return Err(RestoreError::field(KIND, "writeback", mode, "it is 0 or 1"));
    }
    check_bytes(ours, theirs, WRITEBACK_RANGE)
}

/// The cache mode within a configuration space.
pub(super) fn writeback(bytes: &[u8]) -> u8 {
    let mut mode = [0];
    config::read(bytes, WRITEBACK_AT, &mut mode);
    let [mode] = mode;
    mode
}
