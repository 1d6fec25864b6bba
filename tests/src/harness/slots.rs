//! What KVM itself takes for what a VMM asks of it.

use std::time::{Duration, Instant};

use anyhow::Context;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// How long this kernel takes to show a guest so many bytes, and to hide them again. Nothing of them is
/// touched.
///
/// # Errors
/// The kernel's refusal.
#[allow(unsafe_code)]
pub fn time_to_show(bytes: usize) -> anyhow::Result<Duration> {
    let vm = Kvm::new()?.create_vm()?;
    let at = GuestAddress(1 << 37);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(at, bytes)])?;
    let mut region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: at.0,
        memory_size: bytes as u64,
        userspace_addr: memory.get_host_address(at)? as u64,
    };
    let begin = Instant::now();
    // SAFETY: it is mapped until the VM, which has no vCPU, is gone.
    let shown = unsafe { vm.set_user_memory_region(region) };
    region.memory_size = 0;
    // SAFETY: as before.
    let hidden = unsafe { vm.set_user_memory_region(region) };
    let took = begin.elapsed();
    drop(vm);
    drop(memory);
    shown.context("KVM does not show it")?;
    hidden.context("KVM does not hide it")?;
    Ok(took)
}
