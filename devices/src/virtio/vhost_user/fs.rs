//! File system device (virtio 1.2 section 5.11).

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::kind::UnfitPeer;

/// Length of `struct virtio_fs_config.tag`.
pub const MAX_TAG_BYTES: usize = 36;

/// How a vhost-user file system appears to the guest.
#[derive(Clone, Debug)]
pub struct VhostUserFsOptions {
    /// Name by which the guest mounts it, 1 to [`MAX_TAG_BYTES`] bytes.
    pub tag: String,
    /// Request queues, at least 1; the queue for urgent requests comes on top.
    pub queues: u16,
    /// Entries per queue, a power of two.
    pub queue_size: u16,
}

/// `struct virtio_fs_config` without the notification queue's field.
#[derive(Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ConfigSpace {
    tag: [u8; MAX_TAG_BYTES],
    num_request_queues: U32,
}

pub(super) struct FsKind {
    tag: [u8; MAX_TAG_BYTES],
    queues: u16,
    queue_size: u16,
}

impl FsKind {
    pub(super) fn new(options: &VhostUserFsOptions) -> Result<Self, UnfitPeer> {
        let bytes = options.tag.as_bytes();
        let mut tag = [0; MAX_TAG_BYTES];
        match tag.get_mut(..bytes.len()) {
            Some(start) if !bytes.is_empty() => start.copy_from_slice(bytes),
            _ => return Err(UnfitPeer::Tag(options.tag.clone())),
        }
        Ok(Self {
            tag,
            queues: options.queues,
            queue_size: options.queue_size,
        })
    }

    /// The queue for urgent requests, then the request queues (section 5.11.2).
    pub(super) fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; usize::from(self.queues) + 1]
    }

    pub(super) fn config(&self) -> Vec<u8> {
        let config = ConfigSpace {
            tag: self.tag,
            num_request_queues: u32::from(self.queues).into(),
        };
        config.as_bytes().to_vec()
    }
}
