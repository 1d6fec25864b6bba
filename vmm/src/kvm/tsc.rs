//! The time stamp counter across a move.
//!
//! Guest time stands still from the pause on the source to the restore on the destination, as it
//! does for the paravirtual clock: two hosts' clocks need not agree, so that neither the time in
//! between nor a counter of the other host could be trusted to add. All vCPUs' counters are taken
//! at one instant of the host's counter and continue from one instant, so that they stay in step.

#![expect(unsafe_code)]

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::error::KvmError;
use super::msrs::{self, IA32_TSC};
use super::vcpu_state::VcpuStateError;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// The host's time stamp counter at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostTsc(u64);

impl HostTsc {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        // SAFETY: every x86-64 processor has the instruction, and Linux lets processes use it.
        Self(unsafe { std::arch::x86_64::_rdtsc() })
    }
}

/// A vCPU's counter at an instant, and how fast it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TscState {
    pub(super) value: u64,
    /// Unknown on hosts whose counter is not constant.
    pub(super) khz: Option<u32>,
}

/// How this host counts for a vCPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct TscSource {
    vcpu: u32,
    /// Frequency of a vCPU that nobody has told otherwise: the host's.
    host_khz: Option<u32>,
    can_scale: bool,
}

impl TscSource {
    /// For a vCPU that was just created.
    pub(super) fn new(fd: &VcpuFd, vcpu: u32, can_scale: bool) -> Self {
        Self {
            vcpu,
            host_khz: frequency(fd),
            can_scale,
        }
    }

    /// The vCPU's counter when the host's was at `at`.
    pub(super) fn read(&self, fd: &VcpuFd, at: HostTsc) -> Result<TscState, KvmError> {
        let khz = frequency(fd);
        if let (true, Some(offset)) = (khz == self.host_khz, offset(fd)) {
            let value = at.0.wrapping_add(offset);
            return Ok(TscState { value, khz });
        }
        let now = msrs::get(fd, self.vcpu, &[IA32_TSC])?;
        let now = now.first().map_or(0, |msr| msr.data);
        let elapsed = self.in_guest_ticks(HostTsc::now().0.saturating_sub(at.0), khz);
        let value = now.saturating_sub(elapsed);
        Ok(TscState { value, khz })
    }

    /// Lets the vCPU's counter go on from `state` as of the host's `at`.
    pub(super) fn write(
        &self,
        fd: &VcpuFd,
        state: TscState,
        at: HostTsc,
    ) -> Result<(), VcpuStateError> {
        self.set_frequency(fd, state.khz)?;
        let wanted = state.value.wrapping_sub(at.0);
        // A KVM without hardware behind it may say yes and do nothing.
        let is_set =
            frequency(fd) == self.host_khz && set_offset(fd, wanted) && offset(fd) == Some(wanted);
        if !is_set {
            self.write_msr(fd, state.value)?;
        }
        let here = self.read(fd, HostTsc::now())?.value;
        if here < state.value {
            return Err(VcpuStateError::TscBackwards {
                vcpu: self.vcpu,
                saved: state.value,
                here,
            });
        }
        let ahead = here - state.value;
        let second = u64::from(state.khz.unwrap_or(u32::MAX)) * 1000;
        if ahead > second {
            log::warn!(vcpu = self.vcpu, ticks = ahead; "the time stamp counter jumps ahead, this host's KVM does not set it");
        }
        Ok(())
    }

    fn write_msr(&self, fd: &VcpuFd, value: u64) -> Result<(), VcpuStateError> {
        // KVM gives vCPUs whose counters are written within a second of each other, to nearly
        // the same time, the same offset (kvm_synchronize_tsc): they stay in step. So the value
        // is not advanced by what has passed since the instant that the others are told from.
        let written = msrs::entry(IA32_TSC, value);
        msrs::set(fd, self.vcpu, &[written], |msr| {
            Err(VcpuStateError::Msr {
                vcpu: self.vcpu,
                index: msr.index,
                value: msr.data,
            })
        })
    }

    fn set_frequency(&self, fd: &VcpuFd, wanted: Option<u32>) -> Result<(), VcpuStateError> {
        let (Some(wanted), Some(here)) = (wanted, frequency(fd)) else {
            return Ok(());
        };
        if is_same_frequency(wanted, here) {
            return Ok(());
        }
        let refused = VcpuStateError::TscFrequency {
            vcpu: self.vcpu,
            wanted,
            here,
        };
        if wanted > 0 && self.can_scale && fd.set_tsc_khz(wanted).is_ok() {
            return Ok(());
        }
        Err(refused)
    }

    fn in_guest_ticks(&self, host_ticks: u64, khz: Option<u32>) -> u64 {
        let (Some(guest), Some(host)) = (khz, self.host_khz) else {
            return host_ticks;
        };
        let ticks = u128::from(host_ticks) * u128::from(guest) / u128::from(host.max(1));
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }
}

/// Whether two frequencies in kHz count as one. Hosts of one model measure theirs with an error of
/// a few millionths at each boot; the kernel itself tolerates 250 (`tsc_tolerance_ppm`).
#[must_use]
pub fn is_same_frequency(a: u32, b: u32) -> bool {
    const TOLERANCE_PPM: u64 = 250;
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(a) * TOLERANCE_PPM
}

/// Frequency of a vCPU's counter, if KVM knows it.
pub(super) fn frequency(fd: &VcpuFd) -> Option<u32> {
    fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
}

/// What is added to the host's counter (Documentation/virt/kvm/devices/vcpu.rst, 4.1); Linux 5.16.
fn offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0_u64;
    let attr = offset_attr((&raw mut offset) as u64);
    // SAFETY: the kernel writes 8 bytes to `offset`, which outlives the call.
    let result = unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attr) };
    (result == 0).then_some(offset)
}

/// Whether the offset could be set.
fn set_offset(fd: &VcpuFd, offset: u64) -> bool {
    let attr = offset_attr((&raw const offset) as u64);
    // SAFETY: the kernel reads 8 bytes of `offset`, which outlives the call.
    let result = unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attr) };
    result == 0
}

fn offset_attr(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_measured_on_two_boots_count_as_one() {
        assert!(is_same_frequency(2_600_000, 2_600_649));
        assert!(!is_same_frequency(2_600_000, 2_600_651));
        assert!(!is_same_frequency(0, 1));
    }
}
