//! Configuration space and features (section 5.5.3, 5.5.4).

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{Immutable, IntoBytes, KnownLayout};

/// `VIRTIO_BALLOON_F_MUST_TELL_HOST`: pages are used again only after a deflate request.
pub(super) const F_MUST_TELL_HOST: u32 = 0;
/// `VIRTIO_BALLOON_F_STATS_VQ`: there is a queue for statistics.
pub(super) const F_STATS_VQ: u32 = 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the guest takes pages back before it runs out of memory.
pub(super) const F_DEFLATE_ON_OOM: u32 = 2;
/// `VIRTIO_BALLOON_F_PAGE_POISON`: `poison_val` is valid.
pub(super) const F_PAGE_POISON: u32 = 4;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`: there is a queue for free pages.
pub(super) const F_PAGE_REPORTING: u32 = 5;

/// `actual` lies at this offset.
pub(super) const ACTUAL_OFFSET: u64 = 4;
/// `poison_val` lies at this offset.
pub(super) const POISON_VAL_OFFSET: u64 = 12;

/// `struct virtio_balloon_config`.
#[derive(Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigSpace {
    num_pages: U32,
    actual: U32,
    free_page_hint_cmd_id: U32,
    poison_val: U32,
}

impl ConfigSpace {
    pub(super) fn new(target_pages: u32, actual_pages: u32, poison: u32) -> Self {
        Self {
            num_pages: target_pages.into(),
            actual: actual_pages.into(),
            free_page_hint_cmd_id: 0.into(),
            poison_val: poison.into(),
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
