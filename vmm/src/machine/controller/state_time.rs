//! How long a machine's state takes: part of a blackout that no round of pre-copy makes shorter.

use std::time::Duration;

/// One vCPU, saved here and restored there (measured with 1, 8 and 32 vCPUs on 2 CPUs, for each that
/// a CPU had to deal with: 0.16 to 0.26 ms and 0.17 to 0.46 ms). vCPUs do it side by side, each on
/// its own thread.
const VCPU: Duration = Duration::from_micros(500);

/// One device.
const DEVICE: Duration = Duration::from_micros(20);

/// For so many vCPUs and devices on hosts with `cpus` CPUs.
pub(super) fn estimate(vcpus: usize, devices: usize, cpus: usize) -> Duration {
    let times = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let rounds = vcpus.div_ceil(cpus.max(1));
    let vcpus = VCPU.saturating_mul(times(rounds));
    vcpus.saturating_add(DEVICE.saturating_mul(times(devices)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_beyond_the_hosts_cpus_wait_for_each_other() {
        let micros = |vcpus, devices, cpus| estimate(vcpus, devices, cpus).as_micros();
        assert_eq!(micros(1, 0, 2), 500);
        assert_eq!(micros(2, 5, 2), 600);
        assert_eq!(micros(32, 0, 2), 8000);
        assert_eq!(micros(32, 0, 64), 500);
        assert_eq!(micros(1, 0, 0), 500);
    }
}
