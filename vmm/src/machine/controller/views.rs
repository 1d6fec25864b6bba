//! What operators see of a VM.

use std::collections::BTreeMap;

use devices::virtio::balloon::{BalloonHandle, BalloonStats};
use serde::{Deserialize, Serialize};

use crate::machine::lifecycle::VmState;

/// A VM at a glance.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// Running, paused or ended.
    pub state: VmState,
    /// Process id of the VMM.
    pub pid: u32,
    /// Number of vCPUs; null while the VM has not come yet.
    pub vcpus: Option<u32>,
    /// Bytes of RAM; null while the VM has not come yet.
    pub memory_bytes: Option<u64>,
    /// Milliseconds since the VM was started.
    pub uptime_ms: u64,
    /// Path of the serial port's pseudo-terminal or socket.
    pub serial: Option<String>,
    /// Path of the virtio console's pseudo-terminal or socket.
    pub console: Option<String>,
    /// Version of the VMM.
    pub version: String,
}

/// A device at a glance.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceInfo {
    /// Its name.
    pub id: String,
    /// What it is: `virtio-block`.
    pub kind: String,
    /// PCI address, if it has one.
    pub address: Option<String>,
    /// What of the host it is, if it is assigned: a PCI address, a UUID or a socket.
    pub host: Option<String>,
    /// Why its state cannot be saved, if it cannot.
    pub migration_blocked: Option<String>,
}

/// One counted number.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Sample {
    /// The device or vCPU: `disk0`, `vcpu1`.
    pub source: String,
    /// The counter: `block_reads_total`.
    pub name: String,
    /// What it counts.
    pub help: String,
    /// Its value.
    pub value: u64,
}

/// A memory balloon at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BalloonInfo {
    /// What the guest is asked to give up.
    pub target_bytes: u64,
    /// What it says it has given up.
    pub actual_bytes: u64,
    /// What the guest says about its memory, by name, such as `free_bytes`. Empty when it has said
    /// nothing, or was not asked (`stats-interval`).
    pub stats: BTreeMap<String, u64>,
    /// How old the statistics are.
    pub stats_age_ms: Option<u64>,
}

impl BalloonInfo {
    pub(super) fn of(balloon: &BalloonHandle) -> Self {
        let sample = balloon.stats();
        let age = sample.as_ref().map(|sample| sample.age());
        Self {
            target_bytes: balloon.target_bytes(),
            actual_bytes: balloon.actual_bytes(),
            stats: sample
                .map(|sample| named(&sample.stats))
                .unwrap_or_default(),
            stats_age_ms: age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

/// The statistics that there are, under the names of their fields.
fn named(stats: &BalloonStats) -> BTreeMap<String, u64> {
    let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(stats) else {
        return BTreeMap::new();
    };
    let values = fields.into_iter();
    values
        .filter_map(|(name, value)| Some((name, value.as_u64()?)))
        .collect()
}
