//! The time stamp counter, and how fast it counts.

use std::time::{Duration, Instant};

/// How long it is watched: an error of a microsecond at either end is one of 5 millionths.
const SPAN: Duration = Duration::from_millis(200);
/// Looks of which the one that was disturbed least is taken.
const LOOKS: usize = 20;

/// The counter now.
#[must_use]
// The standard library has no clock that reads the counter itself.
#[allow(unsafe_code)]
pub fn now() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets user space execute it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Its frequency in kHz, measured. `QEMU`'s software emulation hands this machine's counter to L1.
#[must_use]
pub fn khz() -> u64 {
    let (began, first) = look();
    std::thread::sleep(SPAN);
    let (ended, last) = look();
    let nanos = ended.duration_since(began).as_nanos().max(1);
    let khz = u128::from(last.wrapping_sub(first)) * 1_000_000 / nanos;
    u64::try_from(khz).unwrap_or(u64::MAX)
}

/// Both clocks at one instant, as far as that goes on a busy machine.
fn look() -> (Instant, u64) {
    let looks = (0..LOOKS).map(|_| {
        let before = now();
        let instant = Instant::now();
        let after = now();
        let took = after.saturating_sub(before);
        (took, (instant, before + took / 2))
    });
    let best = looks.min_by_key(|(took, _)| *took);
    best.map_or_else(|| (Instant::now(), now()), |(_, look)| look)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree_to_what_a_kernel_tolerates() {
        let (one, other) = (khz(), khz());
        assert!(one > 100_000, "{one} kHz");
        // tsc_tolerance_ppm of KVM is 250.
        assert!(
            one.abs_diff(other) * 1_000_000 < one * 250,
            "{one} and {other} kHz"
        );
    }
}
