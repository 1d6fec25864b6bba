//! Disks.

use std::path::PathBuf;

use devices::rate::{Rate, RateLimits};
use serde::{Deserialize, Serialize};

use super::size::ByteSize;

/// Format of a disk image. Never guessed: a guest could write another format's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// The bytes of the disk, or a block device.
    #[default]
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// How the host file is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskAio {
    /// `io_uring` where the host has it, else threads.
    #[default]
    Auto,
    /// `io_uring`.
    #[serde(alias = "io_uring")]
    IoUring,
    /// A pool of threads.
    Threads,
}

/// A disk: an image or block device, or another process behind a vhost-user socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// Device name; `diskN` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Image file or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub path: Option<PathBuf>,
    /// Socket of a vhost-user-blk server, instead of a path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vhost_user: Option<PathBuf>,
    /// Image format.
    #[serde(default)]
    pub format: DiskFormat,
    /// Directory that backing files of a qcow2 image may lie in, besides the image's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub backing_dir: Option<PathBuf>,
    /// The guest cannot write.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Serial number, up to 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Request queues.
    #[serde(default = "default_queues")]
    pub queues: u16,
    /// Entries per queue.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// How the host file is read and written.
    #[serde(default)]
    pub aio: DiskAio,
    /// Bytes per second, both directions together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<ByteSize>,
    /// Bytes at once after a quiet time; one second's worth when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<ByteSize>,
    /// Requests per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops_per_second: Option<u64>,
    /// Requests at once after a quiet time; one second's worth when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops_burst: Option<u64>,
}

pub(super) fn default_queues() -> u16 {
    1
}

pub(super) fn default_queue_size() -> u16 {
    256
}

impl DiskConfig {
    /// The limits in the form that the device takes.
    #[must_use]
    pub fn rate_limits(&self) -> RateLimits {
        rate_limits(
            (self.bytes_per_second, self.bytes_burst),
            (self.ops_per_second, self.ops_burst),
        )
    }
}

pub(super) fn rate_limits(
    (bytes, bytes_burst): (Option<ByteSize>, Option<ByteSize>),
    (ops, ops_burst): (Option<u64>, Option<u64>),
) -> RateLimits {
    RateLimits {
        bytes: bytes.map(|rate| Rate {
            per_second: rate.bytes(),
            burst: bytes_burst.map(ByteSize::bytes),
        }),
        ops: ops.map(|per_second| Rate {
            per_second,
            burst: ops_burst,
        }),
    }
}
