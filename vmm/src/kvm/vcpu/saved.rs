//! A vCPU's state, saved and restored.

use devices::state::DeviceState;
use kvm_bindings::kvm_msr_entry;

use super::Vcpu;
use crate::kvm::msrs;
use crate::kvm::state::VcpuState;
use crate::kvm::tsc::HostTsc;
use crate::kvm::vcpu_state::{self, VcpuStateError};

impl Vcpu {
    /// Everything that makes up the vCPU, with its time stamp counter as of the host's `at`: the
    /// same instant for all vCPUs, so that they stay in step. Only a paused vCPU has no access
    /// half done; then this changes nothing.
    ///
    /// # Errors
    /// [`VcpuStateError`].
    pub fn save(&self, at: HostTsc) -> Result<DeviceState, VcpuStateError> {
        let indices: Vec<_> = self.msrs_at_power_on().map(|msr| msr.index).collect();
        let state = VcpuState::capture(&self.fd, self.index, &indices, self.shape)?;
        let tsc = self.tsc.read(&self.fd, at)?;
        Ok(vcpu_state::encode(&state, tsc)?)
    }

    /// Takes over a saved state, before the first run. The time stamp counter goes on from its
    /// saved value as of the host's `at`, the same instant for all vCPUs.
    ///
    /// # Errors
    /// [`VcpuStateError`] says what is malformed, or what this host cannot do.
    pub fn restore(&self, state: &DeviceState, at: HostTsc) -> Result<(), VcpuStateError> {
        let vcpu = self.index;
        let decoded = vcpu_state::decode(state, self.shape);
        let (mut state, tsc) =
            decoded.map_err(|source| VcpuStateError::Restore { vcpu, source })?;
        let known: Vec<_> = self.msrs_at_power_on().map(|msr| msr.index).collect();
        let is_known = |msr: &kvm_msr_entry| known.contains(&msr.index);
        let (msrs, unknown): (Vec<_>, Vec<_>) = state.msrs.iter().copied().partition(is_known);
        for msr in &unknown {
            self.forgo_msr(msr)?;
        }
        state.msrs = msrs;
        let refused = |msr: &kvm_msr_entry| self.forgo_msr(msr);
        state.restore(&self.fd, vcpu, &self.tsc, (tsc, at), refused)
    }

    fn msrs_at_power_on(&self) -> impl Iterator<Item = &kvm_msr_entry> {
        self.power_on.iter().flat_map(|state| &state.msrs)
    }

    /// Whether the guest can do without a register that this host does not let us write.
    fn forgo_msr(&self, msr: &kvm_msr_entry) -> Result<(), VcpuStateError> {
        let (vcpu, index, value) = (self.index, msr.index, msr.data);
        let here = msrs::get(&self.fd, vcpu, &[index])?;
        if value == 0 || here.first().is_some_and(|msr| msr.data == value) {
            return Ok(());
        }
        if msrs::MAY_BE_LOST.contains(&index) {
            log::info!(vcpu, msr = index, value; "this host does not have the guest's value of an MSR");
            return Ok(());
        }
        Err(VcpuStateError::Msr { vcpu, index, value })
    }
}
