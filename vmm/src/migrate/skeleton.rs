//! What a destination needs to build the machine that is about to come, in JSON.

use devices::virtio::vhost_user::VhostUserStateV1;
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};
use vfio::function::FunctionShape;

use super::states::{StateVersion, check_states};
use crate::config::VmConfig;

/// Version of the description that this build writes.
const VERSION: u16 = 2;

/// Oldest version that this build reads: without [`Skeleton::states`].
const OLDEST_VERSION: u16 = 1;

/// CPUID leaves at most, as KVM has it (`KVM_MAX_CPUID_ENTRIES`).
const MAX_CPUID_ENTRIES: usize = 256;

/// An assigned device of the source's, as another in its place must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssignedPart {
    /// Its name.
    pub id: String,
    /// Its number on the bus.
    pub number: u8,
    /// What can be told of it from outside.
    pub shape: FunctionShape,
}

/// Description of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Skeleton {
    version: u16,
    /// As it was started, complete with defaults.
    pub config: VmConfig,
    /// What all vCPUs see in common: function, index, flags, EAX, EBX, ECX, EDX.
    cpuid: Vec<[u32; 7]>,
    /// Frequency of the time stamp counter.
    pub tsc_khz: Option<u32>,
    /// Every device, in order: its id and kind.
    pub devices: Vec<(String, String)>,
    /// Whether the machine stands still, and shall do so afterwards.
    pub paused: bool,
    /// Every state that will be sent. Empty: unknown, as in version 1.
    #[serde(default)]
    pub states: Vec<StateVersion>,
    /// What vhost-user servers at the destination must be like, by device. Empty: there are
    /// none, or the source does not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub served: Vec<(String, VhostUserStateV1)>,
    /// Assigned devices. Empty: there are none, or the source does not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub assigned: Vec<AssignedPart>,
    /// Assigned devices that the guest has let go before: what the destination has been told to put in
    /// their place is plugged in once the machine runs there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub detached: Vec<String>,
}

impl Skeleton {
    /// Describes a machine.
    #[must_use]
    pub fn new(
        config: VmConfig,
        cpuid: &[kvm_cpuid_entry2],
        tsc_khz: Option<u32>,
        (devices, states): (Vec<(String, String)>, Vec<StateVersion>),
        paused: bool,
    ) -> Self {
        let words = |entry: &kvm_cpuid_entry2| {
            let kvm_cpuid_entry2 {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                ..
            } = *entry;
            [function, index, flags, eax, ebx, ecx, edx]
        };
        Self {
            version: VERSION,
            config,
            cpuid: cpuid.iter().map(words).collect(),
            tsc_khz,
            devices,
            paused,
            states,
            served: Vec::new(),
            assigned: Vec::new(),
            detached: Vec::new(),
        }
    }

    /// The same with what vhost-user servers are like.
    #[must_use]
    pub fn with_served(self, served: Vec<(String, VhostUserStateV1)>) -> Self {
        Self { served, ..self }
    }

    /// The same with what assigned devices are like.
    #[must_use]
    pub fn with_assigned(self, assigned: Vec<AssignedPart>) -> Self {
        Self { assigned, ..self }
    }

    /// The same with the names of devices that were taken out.
    #[must_use]
    pub fn with_detached(self, detached: Vec<String>) -> Self {
        Self { detached, ..self }
    }

    /// As sent.
    ///
    /// # Panics
    /// Never: every type of the description has a JSON form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("every type has a JSON form")
    }

    /// Reads what a source has sent.
    ///
    /// # Errors
    /// Why it cannot be understood.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            version: u16,
        }
        let malformed = |error| format!("the VM's description is malformed: {error}");
        let Version { version } = serde_json::from_slice(bytes).map_err(malformed)?;
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(format!(
                "the VM's description has version {version}, this build reads {OLDEST_VERSION} to \
                 {VERSION}"
            ));
        }
        let skeleton: Self = serde_json::from_slice(bytes).map_err(malformed)?;
        check_states(version, &skeleton.states)?;
        let found = skeleton.cpuid.len();
        if found > MAX_CPUID_ENTRIES {
            return Err(format!(
                "{found} CPUID leaves, KVM takes {MAX_CPUID_ENTRIES}"
            ));
        }
        Ok(skeleton)
    }

    /// What all vCPUs see in common.
    #[must_use]
    pub fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        let entry = |words: &[u32; 7]| {
            let [function, index, flags, eax, ebx, ecx, edx] = *words;
            kvm_cpuid_entry2 {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                ..kvm_cpuid_entry2::default()
            }
        };
        self.cpuid.iter().map(entry).collect()
    }
}

#[cfg(test)]
mod tests;
