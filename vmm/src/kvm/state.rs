//! Everything that makes up a vCPU's state.

#![expect(unsafe_code)]

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::error::KvmError;

/// The time stamp counter runs on over a reset of the machine: writing it on one vCPU after
/// another would set them apart.
const MSR_IA32_TSC: u32 = 0x10;

/// Registers, floating point, MSRs and local APIC of one vCPU.
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
}

impl VcpuState {
    /// Reads the state of vCPU `vcpu`; `msr_indices` as [`super::System::msr_indices`] lists them.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`] names what could not be read.
    pub(super) fn capture(fd: &VcpuFd, vcpu: u32, msr_indices: &[u32]) -> Result<Self, KvmError> {
        let failed = |what| KvmError::vcpu(vcpu, what);
        // The order follows Documentation/virt/kvm/api.rst: reading the MP state first lets
        // pending INIT and SIPI settle, events come after everything that may change them.
        Ok(Self {
            mp_state: fd.get_mp_state().map_err(failed("get MP state"))?,
            regs: fd.get_regs().map_err(failed("get registers"))?,
            sregs: fd.get_sregs().map_err(failed("get system registers"))?,
            xsave: fd.get_xsave().map_err(failed("get XSAVE area"))?,
            xcrs: fd.get_xcrs().map_err(failed("get XCRs"))?,
            debug_regs: fd.get_debug_regs().map_err(failed("get debug registers"))?,
            lapic: fd.get_lapic().map_err(failed("get local APIC"))?,
            msrs: get_msrs(fd, vcpu, msr_indices)?,
            events: fd.get_vcpu_events().map_err(failed("get events"))?,
        })
    }

    /// Puts a power-on state back for a reset of the machine.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`] names what could not be written.
    pub(super) fn reset(&self, fd: &VcpuFd, vcpu: u32) -> Result<(), KvmError> {
        let failed = |what| KvmError::vcpu(vcpu, what);
        fd.set_regs(&self.regs).map_err(failed("set registers"))?;
        fd.set_sregs(&self.sregs)
            .map_err(failed("set system registers"))?;
        fd.set_xcrs(&self.xcrs).map_err(failed("set XCRs"))?;
        // SAFETY: no dynamically enabled XSAVE feature is in use, so that the state fits into the
        // 4 KiB of `kvm_xsave`.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(failed("set XSAVE area"))?;
        fd.set_debug_regs(&self.debug_regs)
            .map_err(failed("set debug registers"))?;
        let msrs: Vec<_> = self
            .msrs
            .iter()
            .filter(|msr| msr.index != MSR_IA32_TSC)
            .copied()
            .collect();
        set_msrs(fd, vcpu, &msrs)?;
        fd.set_lapic(&self.lapic)
            .map_err(failed("set local APIC"))?;
        fd.set_vcpu_events(&self.events)
            .map_err(failed("set events"))?;
        fd.set_mp_state(self.mp_state)
            .map_err(failed("set MP state"))
    }
}

/// Reads MSRs, leaving out those that this host lists but does not let read.
fn get_msrs(fd: &VcpuFd, vcpu: u32, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut result = Vec::with_capacity(indices.len());
    each_msr_run(indices, |run| {
        let entries: Vec<_> = run
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..kvm_msr_entry::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).expect("KVM lists far fewer than the limit");
        let read = fd
            .get_msrs(&mut msrs)
            .map_err(KvmError::vcpu(vcpu, "get MSRs"))?;
        result.extend_from_slice(msrs.as_slice().get(..read).unwrap_or_default());
        Ok(read)
    })?;
    Ok(result)
}

/// Writes MSRs; one that the host refuses is left as it is and logged.
fn set_msrs(fd: &VcpuFd, vcpu: u32, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    each_msr_run(entries, |run| {
        let msrs = Msrs::from_entries(run).expect("KVM lists far fewer than the limit");
        let written = fd
            .set_msrs(&msrs)
            .map_err(KvmError::vcpu(vcpu, "set MSRs"))?;
        if let Some(refused) = run.get(written) {
            log::debug!(vcpu, msr = refused.index, value = refused.data; "MSR is not writable");
        }
        Ok(written)
    })
}

/// KVM stops at the first MSR it refuses: go on behind it.
fn each_msr_run<T>(
    mut items: &[T],
    mut transfer: impl FnMut(&[T]) -> Result<usize, KvmError>,
) -> Result<(), KvmError> {
    while !items.is_empty() {
        let done = transfer(items)?;
        items = items.get(done + 1..).unwrap_or_default();
    }
    Ok(())
}
