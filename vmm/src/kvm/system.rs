//! `/dev/kvm`.

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::error::KvmError;

/// A KVM capability by name.
pub type Capability = (Cap, &'static str);

/// What Drover cannot do without.
pub const REQUIRED: [Capability; 15] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// The host's KVM.
pub struct System {
    kvm: Kvm,
}

impl System {
    /// Opens `/dev/kvm` and checks what the kernel offers.
    ///
    /// # Errors
    /// [`KvmError`] when there is no KVM or it lacks something required.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|source| KvmError::Open(source.into()))?;
        let version = kvm.get_api_version();
        if u32::try_from(version).ok() != Some(KVM_API_VERSION) {
            return Err(KvmError::ApiVersion(version));
        }
        let system = Self { kvm };
        match REQUIRED.into_iter().find(|(cap, _)| !system.has(*cap)) {
            Some((_, name)) => Err(KvmError::MissingCapability(name)),
            None => Ok(system),
        }
    }

    /// Whether the kernel has a capability.
    #[must_use]
    pub fn has(&self, cap: Cap) -> bool {
        self.kvm.check_extension(cap)
    }

    /// Whether the kernel has a capability that `kvm-ioctls` has no name for
    /// (`KVM_CAP_...` of `kvm-bindings`).
    #[must_use]
    pub fn has_number(&self, cap: u32) -> bool {
        self.kvm.check_extension_raw(u64::from(cap)) > 0
    }

    /// Most vCPUs in one VM.
    #[must_use]
    pub fn max_vcpus(&self) -> u32 {
        u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX)
    }

    /// Largest vCPU id, and so APIC id, plus one.
    #[must_use]
    pub fn max_vcpu_id(&self) -> u32 {
        u32::try_from(self.kvm.get_max_vcpu_id()).unwrap_or(u32::MAX)
    }

    /// CPUID leaves that KVM can give to a guest.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("get supported CPUID"))
    }

    /// MSRs that make up a vCPU's state.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self
            .kvm
            .get_msr_index_list()
            .map_err(KvmError::ioctl("list MSRs"))?;
        Ok(list.as_slice().to_vec())
    }

    pub(super) fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}
