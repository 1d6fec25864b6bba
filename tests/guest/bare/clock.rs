//! Time: the TSC and how fast it runs.

use crate::cpu;
use crate::firmware::Firmware;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering, fence};
use drover_guest::cmdline::{Arguments, BadArgument};

static TSC_KHZ: AtomicU64 = AtomicU64::new(0);

/// Finds the TSC's frequency; says where it came from. `"none"` leaves time unknown.
pub(crate) fn start(
    arguments: Arguments<'_>,
    firmware: &Firmware,
) -> Result<&'static str, BadArgument> {
    let given = arguments.optional_number("tsc_khz")?;
    let (khz, source) = None
        .or_else(|| Some((given?, "argument")))
        .or_else(|| Some((crystal_khz()?, "cpuid-15")))
        .or_else(|| Some((hypervisor_khz()?, "cpuid-40000010")))
        .or_else(|| Some((kvm_clock()?.tsc_khz()?, "kvm-clock")))
        .or_else(|| Some((pm_timer_khz(firmware.pm_timer?)?, "pm-timer")))
        .or_else(|| Some((pit_khz()?, "pit")))
        .or_else(|| Some((rtc_khz()?, "rtc")))
        .unwrap_or((0, "none"));
    TSC_KHZ.store(khz, Ordering::Relaxed);
    Ok(source)
}

/// The TSC's frequency, 0 if unknown.
pub(crate) fn tsc_khz() -> u64 {
    TSC_KHZ.load(Ordering::Relaxed)
}

/// The current tick.
pub(crate) fn now() -> u64 {
    cpu::rdtsc()
}

/// Ticks of a number of milliseconds.
pub(crate) fn ticks(ms: u64) -> u64 {
    ms.saturating_mul(tsc_khz())
}

/// Microseconds of a number of ticks.
pub(crate) fn micros(ticks: u64) -> u64 {
    scaled(ticks, 1000)
}

/// Nanoseconds of a number of ticks.
pub(crate) fn nanos(ticks: u64) -> u64 {
    scaled(ticks, 1_000_000)
}

fn scaled(ticks: u64, per_ms: u64) -> u64 {
    // An unknown frequency gives no time rather than a wrong one.
    let value = (u128::from(ticks) * u128::from(per_ms)).checked_div(u128::from(tsc_khz()));
    u64::try_from(value.unwrap_or(0)).unwrap_or(u64::MAX)
}

/// Busy-waits, with a beating heart.
pub(crate) fn spin_ms(ms: u64) {
    let deadline = Deadline::after_ms(ms);
    while !deadline.passed() {
        crate::heartbeat::beat();
        core::hint::spin_loop();
    }
}

/// A point in time.
#[derive(Clone, Copy)]
pub(crate) struct Deadline {
    start: u64,
    ticks: u64,
}

impl Deadline {
    /// So many milliseconds from now; 0 is never.
    pub(crate) fn after_ms(ms: u64) -> Self {
        Self {
            start: now(),
            ticks: if ms == 0 { u64::MAX } else { ticks(ms) },
        }
    }

    /// As long again, from now.
    pub(crate) fn restarted(self) -> Self {
        Self {
            start: now(),
            ..self
        }
    }

    pub(crate) fn passed(self) -> bool {
        now().wrapping_sub(self.start) >= self.ticks
    }
}

/// CPUID leaf 0x15: crystal frequency and ratio, where the CPU states both.
fn crystal_khz() -> Option<u64> {
    if cpu::cpuid(0, 0).eax < 0x15 {
        return None;
    }
    let leaf = cpu::cpuid(0x15, 0);
    let hertz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax.max(1));
    (leaf.eax != 0 && hertz != 0).then_some(hertz / 1000)
}

const HYPERVISOR_BASE: u32 = 0x4000_0000;

/// The hypervisor timing leaf (first defined by VMware).
fn hypervisor_khz() -> Option<u64> {
    const TIMING_LEAF: u32 = HYPERVISOR_BASE + 0x10;
    if !has_hypervisor() || cpu::cpuid(HYPERVISOR_BASE, 0).eax < TIMING_LEAF {
        return None;
    }
    Some(u64::from(cpu::cpuid(TIMING_LEAF, 0).eax)).filter(|&khz| khz != 0)
}

fn has_hypervisor() -> bool {
    cpu::cpuid(1, 0).ecx & 1 << 31 != 0
}

/// The kernel's `pvclock_vcpu_time_info` (Documentation/virt/kvm/x86/msr.rst).
#[repr(C, align(32))] // so that it lies within a page
#[derive(Clone, Copy)]
pub(crate) struct KvmClock {
    version: u32,
    pad0: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    pad: [u8; 2],
}

struct KvmClockPage(UnsafeCell<KvmClock>);

// SAFETY: written by the hypervisor; read through volatile copies guarded by `version`.
unsafe impl Sync for KvmClockPage {}

static KVM_CLOCK: KvmClockPage = KvmClockPage(UnsafeCell::new(KvmClock {
    version: 0,
    pad0: 0,
    tsc_timestamp: 0,
    system_time: 0,
    tsc_to_system_mul: 0,
    tsc_shift: 0,
    flags: 0,
    pad: [0; 2],
}));

/// Turns kvm-clock on and reads it; `None` if the hypervisor has none.
pub(crate) fn kvm_clock() -> Option<KvmClock> {
    const FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
    const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    const ENABLE: u64 = 1;
    if !has_hypervisor() {
        return None;
    }
    let signature = cpu::cpuid(HYPERVISOR_BASE, 0);
    let is_kvm = [signature.ebx, signature.ecx, signature.edx].map(u32::to_le_bytes)
        == [*b"KVMK", *b"VMKV", *b"M\0\0\0"];
    if !is_kvm || cpu::cpuid(HYPERVISOR_BASE + 1, 0).eax & FEATURE_CLOCKSOURCE2 == 0 {
        return None;
    }
    if !cpu::wrmsr(MSR_KVM_SYSTEM_TIME_NEW, KVM_CLOCK.0.get() as u64 | ENABLE) {
        return None;
    }
    read_kvm_clock()
}

/// A consistent copy: the version is even and the same before and after.
fn read_kvm_clock() -> Option<KvmClock> {
    let page = KVM_CLOCK.0.get();
    // The first field.
    let version = page.cast::<u32>();
    for _ in 0..1_000_000 {
        // SAFETY: a static; the hypervisor writes it, so the read is volatile.
        let before = unsafe { version.read_volatile() };
        fence(Ordering::SeqCst);
        // SAFETY: as above.
        let copy = unsafe { page.read_volatile() };
        fence(Ordering::SeqCst);
        // SAFETY: as above.
        let after = unsafe { version.read_volatile() };
        if before == after && before % 2 == 0 && copy.tsc_to_system_mul != 0 {
            return Some(copy);
        }
    }
    None
}

impl KvmClock {
    /// The frequency that the scale factors stand for.
    fn tsc_khz(&self) -> Option<u64> {
        let khz = (1_000_000_u64 << 32) / u64::from(self.tsc_to_system_mul);
        let shift = u32::from(self.tsc_shift.unsigned_abs());
        if self.tsc_shift < 0 {
            khz.checked_shl(shift)
        } else {
            Some(khz >> shift)
        }
    }

    /// Nanoseconds of guest time now.
    pub(crate) fn nanos(&self) -> u64 {
        let delta = now().wrapping_sub(self.tsc_timestamp);
        let shift = u32::from(self.tsc_shift.unsigned_abs());
        let delta = if self.tsc_shift < 0 {
            delta >> shift
        } else {
            delta << shift
        };
        let scaled = (u128::from(delta) * u128::from(self.tsc_to_system_mul)) >> 32;
        self.system_time
            .wrapping_add(u64::try_from(scaled).unwrap_or(u64::MAX))
    }

    /// Bit 0: the clock is stable across vCPUs. Bit 1: the machine was paused by the host.
    pub(crate) fn flags(&self) -> u8 {
        self.flags
    }
}

/// Measures against the ACPI PM timer: 3.579545 MHz, at least 24 bits (ACPI 4.8.3.3).
fn pm_timer_khz(port: u16) -> Option<u64> {
    const HERTZ: u64 = 3_579_545;
    const WINDOW: u64 = HERTZ / 50;
    let read = || u64::from(cpu::inl(port)) & 0xff_ffff;
    let (begin, start) = (read(), now());
    for _ in 0..10_000_000 {
        let elapsed = read().wrapping_sub(begin) & 0xff_ffff;
        if elapsed >= WINDOW {
            return Some((now() - start) * HERTZ / elapsed / 1000).filter(|&khz| khz != 0);
        }
    }
    None
}

/// Measures against the PIT's channel 0 (8254), whose count can be latched and read.
fn pit_khz() -> Option<u64> {
    const HERTZ: u64 = 1_193_182;
    const WINDOW: u64 = HERTZ / 50;
    const CHANNEL: u16 = 0x40;
    const CONTROL: u16 = 0x43;
    const RATE_GENERATOR: u8 = 0b0011_0100;
    const LATCH: u8 = 0;
    // A count of 0 means 65536. The interrupt it raises is masked or off.
    cpu::outb(CONTROL, RATE_GENERATOR);
    cpu::outb(CHANNEL, 0);
    cpu::outb(CHANNEL, 0);
    let read = || {
        cpu::outb(CONTROL, LATCH);
        u64::from(u16::from_le_bytes([cpu::inb(CHANNEL), cpu::inb(CHANNEL)]))
    };
    let (begin, start) = (read(), now());
    for round in 0..1_000_000 {
        // It counts down.
        let elapsed = begin.wrapping_sub(read()) & 0xffff;
        if elapsed >= WINDOW {
            return Some((now() - start) * HERTZ / elapsed / 1000).filter(|&khz| khz != 0);
        }
        if elapsed == 0 && round == 1000 {
            break; // nothing counts: no PIT
        }
    }
    None
}

/// Measures a second of the real-time clock (MC146818).
fn rtc_khz() -> Option<u64> {
    // Ticks: two seconds of the fastest TSC, twenty of a slow one.
    const PATIENCE: u64 = 20_000_000_000;
    let second = || {
        cpu::outb(0x70, 0);
        cpu::inb(0x71)
    };
    if second() == 0xff {
        return None; // no RTC
    }
    let next_second = || {
        let (current, begin) = (second(), now());
        while second() == current {
            if now() - begin > PATIENCE {
                return None;
            }
        }
        Some(now())
    };
    let start = next_second()?;
    let end = next_second()?;
    Some((end - start) / 1000).filter(|&khz| khz != 0)
}
