//! Guest memory.

use serde::{Deserialize, Serialize};

use super::size::ByteSize;
use crate::memory::{HugePages, RamOptions};

/// How much memory, and how it is backed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct MemoryConfig {
    /// Bytes of RAM.
    pub size: ByteSize,
    /// Pages from the host's hugetlb pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<HugePages>,
    /// Transparent huge pages where the host has them to give. Left out where it is on.
    #[serde(default = "default_thp", skip_serializing_if = "Clone::clone")]
    pub thp: bool,
    /// Touch all memory before the guest starts.
    #[serde(default)]
    pub prefault: bool,
    /// Host NUMA nodes to take memory from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numa: Vec<u32>,
}

fn default_thp() -> bool {
    true
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: ByteSize::mib(512),
            hugepages: None,
            thp: default_thp(),
            prefault: false,
            numa: Vec::new(),
        }
    }
}

impl MemoryConfig {
    /// Bytes per backing page.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        self.hugepages.map_or(4096, HugePages::bytes)
    }

    /// What the allocator needs to know.
    #[must_use]
    pub fn ram_options(&self) -> RamOptions {
        RamOptions {
            hugepages: self.hugepages,
            transparent_hugepages: self.thp,
            prefault: self.prefault,
            numa_nodes: self.numa.clone(),
        }
    }
}
