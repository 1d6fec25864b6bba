//! The local APIC (xAPIC or x2APIC) and the I/O APIC (Intel SDM volume 3, chapter 11).

use crate::firmware::Firmware;
use crate::{clock, cpu};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Vector of the LAPIC timer.
pub(crate) const TIMER_VECTOR: u8 = 0x40;
/// Vector of MSI-X interrupts.
pub(crate) const MSIX_VECTOR: u8 = 0x41;
/// Vector of the serial port.
pub(crate) const SERIAL_VECTOR: u8 = 0x42;
const SPURIOUS_VECTOR: u8 = 0xff;

const IA32_APIC_BASE: u32 = 0x1b;
const APIC_BASE_X2APIC: u64 = 1 << 10;
const APIC_BASE_ENABLE: u64 = 1 << 11;

// Register offsets of the memory-mapped form; the x2APIC MSR is 0x800 + offset / 16.
const ID: u32 = 0x20;
const EOI: u32 = 0xb0;
const SPURIOUS: u32 = 0xf0;
const ICR_LOW: u32 = 0x300;
const ICR_HIGH: u32 = 0x310;
const LVT_TIMER: u32 = 0x320;
const TIMER_INITIAL: u32 = 0x380;
const TIMER_CURRENT: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3e0;

const SOFTWARE_ENABLE: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
const TIMER_PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

// Shared with the trap code (traps.s), hence the names.
/// Deliveries of each vector.
#[cfg_attr(guest_elf, unsafe(no_mangle))]
static IRQ_COUNTS: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];
/// Address of the memory-mapped EOI register.
#[cfg_attr(guest_elf, unsafe(no_mangle))]
static LAPIC_EOI: AtomicU64 = AtomicU64::new(0);
/// Whether EOI goes through the MSR instead.
#[cfg_attr(guest_elf, unsafe(no_mangle))]
static LAPIC_IS_X2APIC: AtomicU8 = AtomicU8::new(0);

/// How often a vector has been delivered.
pub(crate) fn interrupts(vector: u8) -> u64 {
    IRQ_COUNTS[usize::from(vector)].load(Ordering::Acquire)
}

/// The boot CPU's local APIC, enabled.
#[derive(Clone, Copy)]
pub(crate) struct LocalApic {
    base: u64,
    x2apic: bool,
}

impl LocalApic {
    /// Masks the legacy PICs and enables the APIC, in x2APIC mode if it is in it or `want_x2apic`.
    pub(crate) fn start(want_x2apic: bool) -> Option<Self> {
        mask_pics();
        let base = cpu::rdmsr(IA32_APIC_BASE)?;
        let mut x2apic = base & APIC_BASE_X2APIC != 0;
        let has_x2apic = cpu::cpuid(1, 0).ecx & 1 << 21 != 0;
        if !x2apic && want_x2apic && has_x2apic {
            x2apic = cpu::wrmsr(IA32_APIC_BASE, base | APIC_BASE_ENABLE | APIC_BASE_X2APIC);
        }
        let apic = Self {
            base: base & 0x000f_ffff_ffff_f000,
            x2apic,
        };
        LAPIC_EOI.store(apic.base + u64::from(EOI), Ordering::Release);
        LAPIC_IS_X2APIC.store(u8::from(x2apic), Ordering::Release);
        apic.write(SPURIOUS, SOFTWARE_ENABLE | u32::from(SPURIOUS_VECTOR));
        Some(apic)
    }

    pub(crate) fn is_x2apic(&self) -> bool {
        self.x2apic
    }

    pub(crate) fn id(&self) -> u32 {
        if self.x2apic {
            self.read(ID)
        } else {
            self.read(ID) >> 24
        }
    }

    /// The timer's ticks per millisecond, measured against the TSC.
    pub(crate) fn ticks_per_ms(&self) -> u64 {
        const WINDOW_MS: u64 = 10;
        self.write(TIMER_DIVIDE, DIVIDE_BY_1);
        self.write(LVT_TIMER, LVT_MASKED | u32::from(TIMER_VECTOR));
        self.write(TIMER_INITIAL, u32::MAX);
        let start = clock::now();
        clock::spin_ms(WINDOW_MS);
        let ticks = u64::from(u32::MAX - self.read(TIMER_CURRENT));
        let micros = clock::micros(clock::now() - start).max(1);
        ticks * 1000 / micros
    }

    /// Timer interrupts at a leisurely pace, so that no sleep lasts for ever.
    pub(crate) fn start_watchdog(&self) {
        const PERIOD_MS: u64 = 50;
        self.start_periodic(u32::try_from(self.ticks_per_ms() * PERIOD_MS).unwrap_or(u32::MAX));
    }

    /// Interrupts with `TIMER_VECTOR` every `count` timer ticks.
    pub(crate) fn start_periodic(&self, count: u32) {
        self.write(TIMER_DIVIDE, DIVIDE_BY_1);
        self.write(LVT_TIMER, TIMER_PERIODIC | u32::from(TIMER_VECTOR));
        self.write(TIMER_INITIAL, count);
    }

    pub(crate) fn stop_timer(&self) {
        self.write(LVT_TIMER, LVT_MASKED | u32::from(TIMER_VECTOR));
        self.write(TIMER_INITIAL, 0);
    }

    /// Sends an inter-processor interrupt. `command` is the low half of the ICR.
    pub(crate) fn send_ipi(&self, apic_id: u32, command: u32) {
        if self.x2apic {
            let msr = 0x800 + (ICR_LOW >> 4);
            cpu::wrmsr(msr, u64::from(apic_id) << 32 | u64::from(command));
        } else {
            self.write(ICR_HIGH, apic_id << 24);
            self.write(ICR_LOW, command);
        }
    }

    fn read(&self, register: u32) -> u32 {
        if self.x2apic {
            return cpu::low32(cpu::rdmsr(0x800 + (register >> 4)).unwrap_or(0));
        }
        let address = (self.base + u64::from(register)) as *const u32;
        // SAFETY: the APIC's page is mapped (it lies below 4 GiB) and aligned.
        unsafe { address.read_volatile() }
    }

    fn write(&self, register: u32, value: u32) {
        if self.x2apic {
            cpu::wrmsr(0x800 + (register >> 4), u64::from(value));
            return;
        }
        let address = (self.base + u64::from(register)) as *mut u32;
        // SAFETY: as in `read`.
        unsafe { address.write_volatile(value) }
    }
}

/// The 8259s would deliver on vectors the firmware left behind, exceptions among them.
pub(crate) fn mask_pics() {
    cpu::outb(0x21, 0xff);
    cpu::outb(0xa1, 0xff);
}

/// Routes an ISA interrupt to a vector on one CPU; `false` without an I/O APIC for it.
pub(crate) fn route_isa(firmware: &Firmware, irq: u8, vector: u8, apic_id: u32) -> bool {
    let (gsi, flags) = firmware.gsi(irq);
    let Some(&(address, base)) = firmware
        .io_apics
        .iter()
        .filter(|&&(_, base)| base <= gsi)
        .max_by_key(|io| io.1)
    else {
        return false;
    };
    // MPS INTI flags: polarity 3 is active low, trigger 3 is level; 0 is the ISA bus's own way.
    let polarity = u32::from(flags & 0b11 == 0b11) << 13;
    let trigger = u32::from(flags >> 2 & 0b11 == 0b11) << 15;
    let entry = 0x10 + 2 * (gsi - base);
    io_apic_write(address, entry + 1, apic_id << 24);
    io_apic_write(address, entry, u32::from(vector) | polarity | trigger);
    true
}

/// Masks what `route_isa` routed.
pub(crate) fn unroute_isa(firmware: &Firmware, irq: u8) {
    let (gsi, _) = firmware.gsi(irq);
    if let Some(&(address, base)) = firmware
        .io_apics
        .iter()
        .filter(|&&(_, base)| base <= gsi)
        .max_by_key(|io| io.1)
    {
        io_apic_write(address, 0x10 + 2 * (gsi - base), LVT_MASKED);
    }
}

fn io_apic_write(address: u32, register: u32, value: u32) {
    const SELECT: u64 = 0;
    const WINDOW: u64 = 0x10;
    // SAFETY: the MADT's I/O APIC, below 4 GiB and so mapped.
    unsafe { ((u64::from(address) + SELECT) as *mut u32).write_volatile(register) };
    // SAFETY: as above.
    unsafe { ((u64::from(address) + WINDOW) as *mut u32).write_volatile(value) };
}
