//! The machine's state as sections, saved and restored.
//!
//! One section per vCPU (`vcpu0`...), one for the clock (`clock`), one per device under its id.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::Device;
use devices::state::{DeviceState, RestoreError, SaveError, StateFormat};
use migration::Section;

use super::runtime::{Machine, StoppedTime};
use crate::kvm::{CLOCK_FORMAT, ClockState, HostTsc, KvmError, VCPU_FORMAT, VcpuStateError};
use crate::migrate::StateVersion;

const CLOCK: &str = "clock";

/// The machine's state could not be saved or was refused.
#[derive(Debug, thiserror::Error)]
pub enum MachineStateError {
    /// The machine runs.
    #[error("the machine's state can be saved only while it is paused")]
    Running,
    /// The machine has run, so that its state can no longer be replaced.
    #[error("the machine's state can be restored only before its first start")]
    AlreadyStarted,
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU could not be saved, or its state was refused.
    #[error("section {id}")]
    Vcpu {
        /// The section.
        id: String,
        /// Why.
        #[source]
        source: VcpuStateError,
    },
    /// A device could not be saved.
    #[error("section {id}")]
    Save {
        /// The section.
        id: String,
        /// Why.
        #[source]
        source: SaveError,
    },
    /// The clock's or a device's state was refused.
    #[error("section {id}")]
    Restore {
        /// The section.
        id: String,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// Two sections have the same name.
    #[error("two sections are named {0:?}")]
    Duplicate(String),
    /// The sections are not those of this machine.
    #[error("the sections do not fit the machine: {}", mismatch(missing, unknown))]
    Mismatch {
        /// What the machine has and no section is there for.
        missing: Vec<String>,
        /// Sections that nothing in the machine is named like.
        unknown: Vec<String>,
    },
}

fn mismatch(missing: &[String], unknown: &[String]) -> String {
    let said = [("missing", missing), ("unknown", unknown)];
    let said = said.iter().filter(|(_, names)| !names.is_empty());
    let said: Vec<_> = said
        .map(|(what, names)| format!("{what} {}", names.join(", ")))
        .collect();
    said.join("; ")
}

fn vcpu_section(index: usize) -> String {
    format!("vcpu{index}")
}

fn section(id: String, state: DeviceState) -> Section {
    Section {
        id,
        kind: state.kind,
        version: state.version,
        bytes: state.bytes,
    }
}

fn device_state(section: Section) -> DeviceState {
    DeviceState {
        kind: section.kind,
        version: section.version,
        bytes: section.bytes,
    }
}

impl Machine {
    /// Which states [`Machine::save`] will write, those within others included.
    pub(super) fn state_versions(&self) -> Vec<StateVersion> {
        let state = |section: &str, format: StateFormat| StateVersion {
            section: section.to_owned(),
            kind: format.kind.to_owned(),
            version: format.newest,
        };
        let vcpus = (0..self.vcpus.len()).map(|index| state(&vcpu_section(index), VCPU_FORMAT));
        let mut states: Vec<_> = vcpus.chain([state(CLOCK, CLOCK_FORMAT)]).collect();
        for entry in &self.devices {
            let id = entry.device.id().as_str();
            let formats = entry.device.state_formats().into_iter();
            states.extend(formats.map(|format| state(id, format)));
        }
        states
    }

    /// The state of vCPUs, clock and devices. Guest memory is not part of it. Changes nothing.
    ///
    /// # Errors
    /// [`MachineStateError`] names the part that cannot be saved.
    pub fn save(&self) -> Result<Vec<Section>, MachineStateError> {
        let time = match self.stopped {
            Some(time) => time,
            None if self.has_run => return Err(MachineStateError::Running),
            None => StoppedTime::now(&self.vm)?,
        };
        let vcpus = self.vcpus.call(move |vcpu| vcpu.save(time.tsc))?;
        let mut sections = Vec::with_capacity(vcpus.len() + 1 + self.devices.len());
        for (index, state) in vcpus.into_iter().enumerate() {
            let id = vcpu_section(index);
            match state {
                Ok(state) => sections.push(section(id, state)),
                Err(source) => return Err(MachineStateError::Vcpu { id, source }),
            }
        }
        let failed = |id: &str| {
            let id = id.to_owned();
            move |source| MachineStateError::Save { id, source }
        };
        let clock = time.clock.save().map_err(failed(CLOCK))?;
        sections.push(section(CLOCK.to_owned(), clock));
        for entry in &self.devices {
            let id = entry.device.id().as_str();
            let state = entry.device.save().map_err(failed(id))?;
            sections.push(section(id.to_owned(), state));
        }
        // A device that is named like a vCPU could not be told from it.
        by_name(sections.clone())?;
        Ok(sections)
    }

    /// Takes over saved state, before the first start. Every section must be for a part of this
    /// machine and every part must have one. After an error the machine is of no use.
    ///
    /// # Errors
    /// [`MachineStateError`] names the section at fault, or all that are missing or unknown.
    pub fn restore(&mut self, sections: Vec<Section>) -> Result<(), MachineStateError> {
        if self.has_run {
            return Err(MachineStateError::AlreadyStarted);
        }
        let mut sections = by_name(sections)?;
        self.check_names(&sections)?;
        let mut take = |id: &str| sections.remove(id).map(device_state);

        let clock = take(CLOCK).map(|state| ClockState::restore(&state));
        let clock = clock.transpose().map_err(|source| {
            let id = CLOCK.to_owned();
            MachineStateError::Restore { id, source }
        })?;
        let vcpus = (0..self.vcpus.len()).filter_map(|index| take(&vcpu_section(index)));
        let vcpus: Vec<_> = vcpus.collect();
        for entry in &self.devices {
            restore_device(&*entry.device, take(entry.device.id().as_str()))?;
        }
        self.pci.map_restored();
        if let Some(clock) = clock {
            self.restore_vcpus(clock, vcpus)?;
        }
        Ok(())
    }

    /// The clock comes first: KVM computes from it what the guest's clock registers tell.
    fn restore_vcpus(
        &mut self,
        clock: ClockState,
        states: Vec<DeviceState>,
    ) -> Result<(), MachineStateError> {
        self.vm.set_clock(clock)?;
        let tsc = HostTsc::now();
        let states = Arc::new(states);
        let restored = self.vcpus.call(move |vcpu| {
            let index = usize::try_from(vcpu.index()).ok();
            let state = index.and_then(|index| states.get(index));
            state.map_or(Ok(()), |state| vcpu.restore(state, tsc))
        })?;
        for (index, restored) in restored.into_iter().enumerate() {
            let id = vcpu_section(index);
            restored.map_err(|source| MachineStateError::Vcpu { id, source })?;
        }
        self.stopped = Some(StoppedTime { clock, tsc });
        self.announce_due = true;
        Ok(())
    }

    fn check_names(&self, sections: &BTreeMap<String, Section>) -> Result<(), MachineStateError> {
        let vcpus = (0..self.vcpus.len()).map(vcpu_section);
        let devices = self.devices.iter();
        let devices = devices.map(|entry| entry.device.id().to_string());
        let parts: Vec<_> = vcpus.chain([CLOCK.to_owned()]).chain(devices).collect();
        let missing = parts.iter().filter(|id| !sections.contains_key(*id));
        let missing: Vec<_> = missing.cloned().collect();
        let unknown = sections.keys().filter(|id| !parts.contains(id));
        let unknown: Vec<_> = unknown.cloned().collect();
        if missing.is_empty() && unknown.is_empty() {
            return Ok(());
        }
        Err(MachineStateError::Mismatch { missing, unknown })
    }
}

fn restore_device(
    device: &dyn Device,
    state: Option<DeviceState>,
) -> Result<(), MachineStateError> {
    let restored = state.map_or(Ok(()), |state| device.restore(&state));
    restored.map_err(|source| {
        let id = device.id().to_string();
        MachineStateError::Restore { id, source }
    })
}

fn by_name(sections: Vec<Section>) -> Result<BTreeMap<String, Section>, MachineStateError> {
    let mut named = BTreeMap::new();
    for section in sections {
        if let Some(twice) = named.insert(section.id.clone(), section) {
            return Err(MachineStateError::Duplicate(twice.id));
        }
    }
    Ok(named)
}

#[cfg(test)]
mod tests;
