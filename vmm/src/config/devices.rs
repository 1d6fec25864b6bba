//! The smaller devices: console, entropy, balloon, sockets, shared directories.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::disk::default_queues;
use super::size::ByteSize;
use super::target::CharTarget;

/// A virtio console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConsoleConfig {
    /// Host end.
    pub target: CharTarget,
}

/// An entropy source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RngConfig {
    /// File that random bytes are read from.
    #[serde(default = "default_rng_source")]
    #[schema(value_type = String)]
    pub source: PathBuf,
    /// Bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<ByteSize>,
}

fn default_rng_source() -> PathBuf {
    PathBuf::from("/dev/urandom")
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            source: default_rng_source(),
            bytes_per_second: None,
        }
    }
}

/// A memory balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BalloonConfig {
    /// Memory to take out of the guest at first.
    #[serde(default = "default_balloon_size")]
    pub size: ByteSize,
    /// The guest may take memory back before its out-of-memory killer strikes.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// The guest reports free pages, which the host then reuses.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Seconds between the statistics that the guest is asked for; 0: never.
    #[serde(default)]
    pub stats_interval: u16,
}

fn default_balloon_size() -> ByteSize {
    ByteSize(0)
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self {
            size: default_balloon_size(),
            deflate_on_oom: false,
            free_page_reporting: false,
            stats_interval: 0,
        }
    }
}

/// Sockets between guest and host, over a unix socket on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// Host path: `PATH` takes connections to the guest, `PATH_PORT` gets those from it.
    #[schema(value_type = String)]
    pub socket: PathBuf,
}

/// A directory of the host, served by a vhost-user-fs process such as virtiofsd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FsConfig {
    /// Device name; `fsN` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name by which the guest mounts it, up to 36 bytes.
    pub tag: String,
    /// The server's socket.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// Request queues.
    #[serde(default = "default_queues")]
    pub queues: u16,
    /// Entries per queue.
    #[serde(default = "default_fs_queue_size")]
    pub queue_size: u16,
}

fn default_fs_queue_size() -> u16 {
    1024
}
