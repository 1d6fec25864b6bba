//! Model-specific registers, many at a time.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::error::KvmError;

/// The time stamp counter. It never travels with the others: see `tsc`.
pub(super) const IA32_TSC: u32 = 0x10;
/// When the local APIC's timer fires in deadline mode. KVM arms the timer as this is written, so
/// that the counter and the APIC's mode must be there already.
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// State that KVM keeps but does not list: the MTRRs (SDM volume 4, table 2-2). Pairs of base and
/// mask, the fixed ranges, the default type.
const UNLISTED: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];

/// What a guest can lose without harm, when this host refuses it: the microcode's revision and
/// two facts of the platform, which only inform, and the state of system management mode, which
/// no Drover VM has.
pub(super) const MAY_BE_LOST: [u32; 4] = [
    0x8b, // IA32_BIOS_SIGN_ID
    0xce, // MSR_PLATFORM_INFO
    0x34, // MSR_SMI_COUNT
    0x9e, // IA32_SMBASE
];

/// `listed`, and what KVM keeps besides.
pub(super) fn complete(listed: &[u32]) -> Vec<u32> {
    let unlisted = UNLISTED.into_iter().flatten();
    let unlisted = unlisted.filter(|index| !listed.contains(index));
    listed.iter().copied().chain(unlisted).collect()
}

/// An entry for a register.
pub(super) fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }
}

/// Reads registers, leaving out those that this host lists but does not let read.
pub(super) fn get(fd: &VcpuFd, vcpu: u32, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut result = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = batch(rest).iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("a batch is within the limit");
        let read = fd
            .get_msrs(&mut msrs)
            .map_err(KvmError::vcpu(vcpu, "get MSRs"))?;
        result.extend_from_slice(msrs.as_slice().get(..read).unwrap_or_default());
        rest = behind(rest, entries.len(), read);
    }
    Ok(result)
}

/// Writes registers; `refused` judges each that the host refuses, and an error of it ends the
/// matter.
pub(super) fn set<E: From<KvmError>>(
    fd: &VcpuFd,
    vcpu: u32,
    entries: &[kvm_msr_entry],
    mut refused: impl FnMut(&kvm_msr_entry) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = entries;
    while !rest.is_empty() {
        let tried = batch(rest);
        let msrs = Msrs::from_entries(tried).expect("a batch is within the limit");
        let written = fd
            .set_msrs(&msrs)
            .map_err(KvmError::vcpu(vcpu, "set MSRs"))?;
        if let Some(entry) = tried.get(written) {
            refused(entry)?;
        }
        rest = behind(rest, tried.len(), written);
    }
    Ok(())
}

/// As many as fit into one request.
fn batch<T>(items: &[T]) -> &[T] {
    items.get(..KVM_MAX_MSR_ENTRIES).unwrap_or(items)
}

/// KVM stops at the first register it refuses: go on behind it.
fn behind<T>(items: &[T], tried: usize, done: usize) -> &[T] {
    let done = if done < tried { done + 1 } else { tried };
    items.get(done..).unwrap_or_default()
}
