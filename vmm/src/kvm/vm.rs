//! One virtual machine.

#![expect(unsafe_code)]

use std::sync::Arc;

use devices::GuestRam;
use devices::irqchip::IOAPIC_PINS;
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_clock_data, kvm_enable_cap, kvm_userspace_memory_region,
    kvm_xsave,
};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::clock::ClockState;
use super::dirty_log::DirtyLog;
use super::error::KvmError;
use super::state::StateShape;
use super::system::System;
use crate::memory::{KVM_IDENTITY_MAP_BASE, KVM_TSS_BASE};

/// A KVM virtual machine with RAM and a split interrupt controller: local APICs in the kernel,
/// the I/O APIC in user space.
pub struct Vm {
    fd: Arc<VmFd>,
    /// Keeps the mappings behind the memory slots alive as long as the VM.
    memory: Arc<GuestRam>,
    x2apic_ids: bool,
}

impl Vm {
    /// A VM over `memory`, without vCPUs.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`] names the step.
    pub fn new(system: &System, memory: Arc<GuestRam>) -> Result<Self, KvmError> {
        let fd = system
            .kvm()
            .create_vm()
            .map_err(KvmError::ioctl("create VM"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP_BASE)
            .map_err(KvmError::ioctl("set identity map address"))?;
        fd.set_tss_address(KVM_TSS_BASE)
            .map_err(KvmError::ioctl("set TSS address"))?;
        let mut vm = Self {
            fd: Arc::new(fd),
            memory,
            x2apic_ids: false,
        };
        vm.enable(
            KVM_CAP_SPLIT_IRQCHIP,
            u64::from(IOAPIC_PINS),
            "enable split irqchip",
        )?;
        if vm.fd.check_extension(Cap::X2ApicApi) {
            let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
            vm.enable(KVM_CAP_X2APIC_API, u64::from(flags), "enable x2APIC ids")?;
            vm.x2apic_ids = true;
        }
        vm.set_memory_slots()?;
        Ok(vm)
    }

    /// Whether interrupts reach APIC ids above 254.
    #[must_use]
    pub fn has_x2apic_ids(&self) -> bool {
        self.x2apic_ids
    }

    /// Whether KVM can run time stamp counters at another frequency than the host's.
    #[must_use]
    pub fn can_scale_tsc(&self) -> bool {
        self.fd.check_extension(Cap::TscControl)
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// The paravirtual clock's present value.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn clock(&self) -> Result<ClockState, KvmError> {
        let data = self
            .fd
            .get_clock()
            .map_err(KvmError::ioctl("read the clock"))?;
        Ok(ClockState::of(&data))
    }

    /// Lets the paravirtual clock go on from `state`.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn set_clock(&self, state: ClockState) -> Result<(), KvmError> {
        let data = kvm_clock_data {
            clock: state.nanos,
            ..kvm_clock_data::default()
        };
        self.fd
            .set_clock(&data)
            .map_err(KvmError::ioctl("set the clock"))
    }

    /// The log of what vCPUs write to guest RAM; it may be used by any thread.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn dirty_log(&self) -> Result<DirtyLog, KvmError> {
        DirtyLog::new(&self.fd, &self.memory)
    }

    /// What this host's vCPU states look like.
    pub(super) fn state_shape(&self) -> StateShape {
        let xsave = self.fd.check_extension_int(Cap::Xsave2);
        StateShape {
            xsave_bytes: usize::try_from(xsave)
                .unwrap_or(0)
                .max(size_of::<kvm_xsave>()),
            nested: self.fd.check_extension(Cap::NestedState),
            tsc_control: self.fd.check_extension(Cap::TscControl),
        }
    }

    pub(super) fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    fn enable(&self, cap: u32, arg: u64, what: &'static str) -> Result<(), KvmError> {
        let request = kvm_enable_cap {
            cap,
            args: [arg, 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        self.fd.enable_cap(&request).map_err(KvmError::ioctl(what))
    }

    /// How many memory slots RAM has.
    pub(super) fn ram_slots(&self) -> u32 {
        slots(&self.memory)
            .map(|region| region.slot + 1)
            .max()
            .unwrap_or(0)
    }

    fn set_memory_slots(&self) -> Result<(), KvmError> {
        for region in slots(&self.memory) {
            // SAFETY: the range is a mapping owned by `self.memory`, which lives as long as the
            // VM; regions do not overlap.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(KvmError::ioctl("set memory region"))?;
        }
        Ok(())
    }
}

/// A slot per region, numbered from 0.
pub(super) fn slots(memory: &GuestRam) -> impl Iterator<Item = kvm_userspace_memory_region> {
    memory.iter().zip(0..).map(|(region, slot)| {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .expect("offset 0 lies within every region");
        kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        }
    })
}
