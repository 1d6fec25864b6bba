//! Configuration space and features (section 5.2.3, 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::backend::{BlockInfo, SECTOR_BYTES};

/// Largest discard or write-zeroes range: one gigabyte keeps a request's time bounded.
pub(super) const MAX_RANGE_SECTORS: u32 = (1 << 30) / 512;
/// Ranges per discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 16;

/// `writeback` lies at this offset.
pub(super) const WRITEBACK_OFFSET: u64 = 32;

/// `struct virtio_blk_config` up to the write-zeroes fields.
#[derive(Debug, Default, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigSpace {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

impl ConfigSpace {
    pub(super) fn new(info: &BlockInfo, queue_size: u16, queues: u16, writeback: bool) -> Self {
        let block_sectors = info.block_bytes / 512;
        Self {
            capacity: (info.capacity_bytes / SECTOR_BYTES).into(),
            // Header and status take two descriptors.
            seg_max: u32::from(queue_size.saturating_sub(2).max(1)).into(),
            blk_size: info.block_bytes.into(),
            physical_block_exp: physical_block_exp(info),
            min_io_size: 1.into(),
            writeback: u8::from(writeback),
            num_queues: queues.into(),
            max_discard_sectors: MAX_RANGE_SECTORS.into(),
            max_discard_seg: MAX_RANGES.into(),
            discard_sector_alignment: block_sectors.into(),
            max_write_zeroes_sectors: MAX_RANGE_SECTORS.into(),
            max_write_zeroes_seg: MAX_RANGES.into(),
            write_zeroes_may_unmap: 1,
            ..Self::default()
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

/// Logical blocks per physical block, as a power of two.
fn physical_block_exp(info: &BlockInfo) -> u8 {
    let blocks = info.physical_block_bytes / info.block_bytes.max(1);
    u8::try_from(blocks.max(1).ilog2()).unwrap_or(0)
}

pub(super) fn features(info: &BlockInfo, queues: u16) -> u64 {
    let mut bits = vec![
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    if info.read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        if info.discard {
            bits.push(VIRTIO_BLK_F_DISCARD);
        }
        if info.write_zeroes {
            bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
        }
    }
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    bits.into_iter()
        .fold(0, |features, bit| features | 1 << bit)
}
