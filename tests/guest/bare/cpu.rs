//! The CPU's privileged and special instructions, as ring 3 uses them.
//!
//! Port I/O, `cli`, `sti`, `hlt` and the MSR instructions raise #GP in ring 3; the trap code (`traps.s`)
//! performs them in ring 0 and returns as if nothing had happened.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, _rdtsc, CpuidResult};

/// Writes a byte to an I/O port.
pub(crate) fn outb(port: u16, value: u8) {
    // SAFETY: the guest owns the machine; a port write touches none of its memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// Writes 16 bits to an I/O port.
pub(crate) fn outw(port: u16, value: u16) {
    // SAFETY: as for `outb`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) }
}

/// Writes 32 bits to an I/O port.
pub(crate) fn outl(port: u16, value: u32) {
    // SAFETY: as for `outb`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags))
    }
}

/// Reads a byte from an I/O port.
pub(crate) fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as for `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) }
    value
}

/// Reads 32 bits from an I/O port.
pub(crate) fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as for `outb`.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags))
    }
    value
}

/// Writes bytes to one I/O port with a single instruction.
pub(crate) fn out_bytes(port: u16, bytes: &[u8]) {
    // SAFETY: reads exactly `bytes`; otherwise as for `outb`.
    unsafe {
        asm!(
            "rep outsb",
            in("dx") port,
            inout("rcx") bytes.len() => _,
            inout("rsi") bytes.as_ptr() => _,
            options(nostack, preserves_flags, readonly)
        );
    }
}

/// Reads a model-specific register; `None` if the CPU lacks it.
pub(crate) fn rdmsr(register: u32) -> Option<u64> {
    let (low, high, missing): (u32, u32, u64);
    // SAFETY: reading a register changes nothing; a missing one is reported in R10 (traps.s).
    unsafe {
        asm!(
            "rdmsr",
            in("ecx") register,
            out("eax") low,
            out("edx") high,
            inout("r10") 0_u64 => missing,
            options(nostack)
        );
    }
    (missing == 0).then_some(u64::from(high) << 32 | u64::from(low))
}

/// Writes a model-specific register; `false` if the CPU refuses it.
pub(crate) fn wrmsr(register: u32, value: u64) -> bool {
    let refused: u64;
    // SAFETY: callers write only registers whose effect they want (APIC, kvm-clock).
    unsafe {
        asm!(
            "wrmsr",
            in("ecx") register,
            in("eax") low32(value),
            in("edx") low32(value >> 32),
            inout("r10") 0_u64 => refused,
            options(nostack)
        );
    }
    refused == 0
}

/// The time-stamp counter.
pub(crate) fn rdtsc() -> u64 {
    // SAFETY: every CPU this ELF starts on has the instruction.
    unsafe { _rdtsc() }
}

/// One CPUID leaf.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// Sets the interrupt flag.
pub(crate) fn enable_interrupts() {
    // SAFETY: the trap code has a handler for every vector.
    unsafe { asm!("sti", options(nostack)) }
}

/// Clears the interrupt flag.
pub(crate) fn disable_interrupts() {
    // SAFETY: at worst no interrupt arrives any more.
    unsafe { asm!("cli", options(nostack)) }
}

/// Sleeps until `ready` holds, looking again after each interrupt; leaves interrupts enabled.
///
/// No wake-up is lost: `ready` is looked at with interrupts off, and `hlt` turns them on in the same step.
pub(crate) fn halt_until(mut ready: impl FnMut() -> bool) {
    loop {
        disable_interrupts();
        if ready() {
            break;
        }
        halt();
    }
    enable_interrupts();
}

/// Sleeps until an interrupt arrives, whatever the interrupt flag says.
pub(crate) fn halt() {
    // SAFETY: the trap code performs `sti; hlt; cli` and returns with the flag as it was.
    unsafe { asm!("hlt", options(nostack)) }
}

/// The low half of a 64-bit value.
pub(crate) const fn low32(value: u64) -> u32 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low half is what is asked for"
    )]
    {
        value as u32
    }
}

/// The privilege level the guest runs at.
pub(crate) fn ring() -> u64 {
    let selector: u64;
    // SAFETY: reads a register.
    unsafe {
        core::arch::asm!("mov {}, cs", out(reg) selector, options(nomem, nostack, preserves_flags))
    }
    selector & 3
}
