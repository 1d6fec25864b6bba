//! Everything that makes up a vCPU's state.

#![expect(unsafe_code)]

use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GIF_SET, Xsave, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};
use zerocopy::IntoBytes;

use super::error::KvmError;
use super::msrs::{self, IA32_TSC, IA32_TSC_DEADLINE};
use super::tsc::{HostTsc, TscSource, TscState};
use super::vcpu_state::VcpuStateError;

/// Bytes before the data of a nested state (`struct kvm_nested_state`).
pub(super) const NESTED_HEADER_BYTES: usize = 128;
/// Where the header has the address of the VMXON region (`kvm_vmx_nested_state_hdr`).
const VMXON_ADDRESS: std::ops::Range<usize> = 8..16;

/// What a vCPU's state looks like on this host.
#[derive(Clone, Copy, Debug)]
pub(super) struct StateShape {
    /// Bytes of the XSAVE area, at least 4 KiB.
    pub(super) xsave_bytes: usize,
    /// Whether KVM knows nested state.
    pub(super) nested: bool,
    /// Whether KVM can let a vCPU count faster or slower than the host.
    pub(super) tsc_control: bool,
}

/// Registers, floating point, MSRs and local APIC of one vCPU.
///
/// The page directory pointers that `KVM_GET_SREGS2` would add are left out: KVM reads them anew
/// from guest memory, which is complete before any state is restored.
pub struct VcpuState {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) xsave: Xsave,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debug_regs: kvm_debugregs,
    pub(super) events: kvm_vcpu_events,
    pub(super) mp_state: kvm_mp_state,
    pub(super) lapic: kvm_lapic_state,
    pub(super) msrs: Vec<kvm_msr_entry>,
    /// Of a guest that is a hypervisor itself; `None` while it makes no use of that.
    pub(super) nested: Option<Box<KvmNestedStateBuffer>>,
}

impl VcpuState {
    /// Reads the state of vCPU `vcpu`; `msr_indices` as [`super::System::msr_indices`] lists them.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`] names what could not be read.
    pub(super) fn capture(
        fd: &VcpuFd,
        vcpu: u32,
        msr_indices: &[u32],
        shape: StateShape,
    ) -> Result<Self, KvmError> {
        let failed = |what| KvmError::vcpu(vcpu, what);
        // The order follows Documentation/virt/kvm/api.rst: reading the MP state first lets
        // pending INIT and SIPI settle, events come after everything that may change them.
        Ok(Self {
            mp_state: fd.get_mp_state().map_err(failed("get MP state"))?,
            regs: fd.get_regs().map_err(failed("get registers"))?,
            sregs: fd.get_sregs().map_err(failed("get system registers"))?,
            xsave: get_xsave(fd, shape).map_err(failed("get XSAVE area"))?,
            xcrs: fd.get_xcrs().map_err(failed("get XCRs"))?,
            debug_regs: fd.get_debug_regs().map_err(failed("get debug registers"))?,
            lapic: fd.get_lapic().map_err(failed("get local APIC"))?,
            msrs: msrs::get(fd, vcpu, msr_indices)?,
            nested: get_nested(fd, shape).map_err(failed("get nested state"))?,
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
        self.set_extended(fd, vcpu)?;
        // The time stamp counter runs on over a reset of the machine: writing it on one vCPU
        // after another would set them apart.
        let msrs = self.msrs_without(&[IA32_TSC]);
        msrs::set::<KvmError>(fd, vcpu, &msrs, |refused| {
            log::debug!(vcpu, msr = refused.index, value = refused.data; "MSR is not writable");
            Ok(())
        })?;
        fd.set_lapic(&self.lapic)
            .map_err(failed("set local APIC"))?;
        fd.set_vcpu_events(&self.events)
            .map_err(failed("set events"))?;
        fd.set_mp_state(self.mp_state)
            .map_err(failed("set MP state"))
    }

    /// Puts a saved state into a vCPU that has not run; its counter goes on from `tsc` as of `at`.
    ///
    /// # Errors
    /// [`VcpuStateError`] names what could not be written.
    pub(super) fn restore(
        &self,
        fd: &VcpuFd,
        vcpu: u32,
        source: &TscSource,
        (tsc, at): (TscState, HostTsc),
        mut refused: impl FnMut(&kvm_msr_entry) -> Result<(), VcpuStateError>,
    ) -> Result<(), VcpuStateError> {
        let failed = |what| KvmError::vcpu(vcpu, what);
        // System registers carry the APIC's base and mode, which its state depends on; nested
        // state needs EFER and the VMX MSRs, and replaces RIP and RSP.
        fd.set_sregs(&self.sregs)
            .map_err(failed("set system registers"))?;
        fd.set_lapic(&self.lapic)
            .map_err(failed("set local APIC"))?;
        source.write(fd, tsc, at)?;
        let early = self.msrs_without(&[IA32_TSC, IA32_TSC_DEADLINE]);
        msrs::set(fd, vcpu, &early, &mut refused)?;
        if let Some(nested) = &self.nested {
            fd.set_nested_state(nested)
                .map_err(failed("set nested state"))?;
        }
        fd.set_regs(&self.regs).map_err(failed("set registers"))?;
        self.set_extended(fd, vcpu)?;
        let is_deadline = |msr: &&kvm_msr_entry| msr.index == IA32_TSC_DEADLINE;
        let deadline: Vec<_> = self.msrs.iter().filter(is_deadline).copied().collect();
        msrs::set(fd, vcpu, &deadline, refused)?;
        fd.set_vcpu_events(&self.events)
            .map_err(failed("set events"))?;
        fd.set_mp_state(self.mp_state)
            .map_err(failed("set MP state"))?;
        Ok(())
    }

    /// Floating point and debug registers.
    fn set_extended(&self, fd: &VcpuFd, vcpu: u32) -> Result<(), KvmError> {
        let failed = |what| KvmError::vcpu(vcpu, what);
        fd.set_xcrs(&self.xcrs).map_err(failed("set XCRs"))?;
        // SAFETY: the area has the size that KVM reported for this VM, see `empty_xsave`.
        unsafe { fd.set_xsave2(&self.xsave) }.map_err(failed("set XSAVE area"))?;
        fd.set_debug_regs(&self.debug_regs)
            .map_err(failed("set debug registers"))
    }

    fn msrs_without(&self, left_out: &[u32]) -> Vec<kvm_msr_entry> {
        let stays = |msr: &&kvm_msr_entry| !left_out.contains(&msr.index);
        self.msrs.iter().filter(stays).copied().collect()
    }
}

/// An XSAVE area of the size that this host uses.
pub(super) fn empty_xsave(shape: StateShape) -> Xsave {
    let beyond = shape.xsave_bytes.saturating_sub(size_of::<kvm_xsave>());
    Xsave::new(beyond.div_ceil(size_of::<u32>())).expect("KVM reports a few pages at most")
}

fn get_xsave(fd: &VcpuFd, shape: StateShape) -> Result<Xsave, kvm_ioctls::Error> {
    let mut xsave = empty_xsave(shape);
    if shape.xsave_bytes > size_of::<kvm_xsave>() {
        // SAFETY: the area has the size that KVM reported for this VM; the process enables no
        // feature that would make it grow later.
        unsafe { fd.get_xsave2(&mut xsave) }?;
    } else {
        let area = fd.get_xsave()?;
        // SAFETY: only the fixed part is replaced; the length stays.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region = area.region;
    }
    Ok(xsave)
}

/// `None` also where KVM claims nested state but cannot name it: then no guest can have any.
fn get_nested(
    fd: &VcpuFd,
    shape: StateShape,
) -> Result<Option<Box<KvmNestedStateBuffer>>, kvm_ioctls::Error> {
    if !shape.nested {
        return Ok(None);
    }
    let mut state = Box::new(KvmNestedStateBuffer::empty());
    match fd.nested_state(&mut state) {
        Ok(_) => Ok(uses_nesting(&state).then_some(state)),
        Err(error) if matches!(error.errno(), libc::EINVAL | libc::ENOTTY) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the guest has begun to be a hypervisor: the state differs from that at power-on.
fn uses_nesting(state: &KvmNestedStateBuffer) -> bool {
    if state.size as usize > NESTED_HEADER_BYTES {
        return true;
    }
    if u32::from(state.format) == KVM_STATE_NESTED_FORMAT_SVM {
        return u32::from(state.flags) != KVM_STATE_NESTED_GIF_SET;
    }
    let vmxon = state.as_bytes().get(VMXON_ADDRESS);
    state.flags != 0 || vmxon.is_some_and(|address| address.iter().any(|byte| *byte != 0xff))
}
