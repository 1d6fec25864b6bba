//! How the machine ends.

use crate::firmware::Firmware;
use crate::{apic, clock, cpu, heartbeat};
use core::cell::UnsafeCell;
use drover_guest::acpi::Register;
use drover_guest::cmdline::{Arguments, BadArgument};

/// What to do after the last command (`end=`) or after a crash (`fault_end=`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// ACPI S5, or the given port.
    PowerOff,
    /// The keyboard controller's reset line.
    Reset,
    /// A triple fault.
    Triple,
    /// The pvpanic device.
    Panic,
    /// QEMU's isa-debug-exit, or any port.
    Exit,
    /// Interrupts off, asleep for ever.
    Halt,
    /// Awake for ever, heart beating.
    Spin,
}

impl End {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "poweroff" => Self::PowerOff,
            "reset" => Self::Reset,
            "triple" => Self::Triple,
            "panic" => Self::Panic,
            "exit" => Self::Exit,
            "halt" => Self::Halt,
            "spin" => Self::Spin,
            _ => return None,
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PowerOff => "poweroff",
            Self::Reset => "reset",
            Self::Triple => "triple",
            Self::Panic => "panic",
            Self::Exit => "exit",
            Self::Halt => "halt",
            Self::Spin => "spin",
        }
    }
}

/// The registers that end the machine, settled at start so that a crash needs nothing else.
#[derive(Clone, Copy)]
pub(crate) struct Exits {
    /// Register and the value that powers off.
    power_off: Option<(Register, u16)>,
    pvpanic_port: u16,
    /// Port and code.
    exit: (u16, u8),
    fault_end: End,
}

struct Stored(UnsafeCell<Exits>);

// SAFETY: written once by `start`, on the boot CPU, before other CPUs run.
unsafe impl Sync for Stored {}

static EXITS: Stored = Stored(UnsafeCell::new(Exits {
    power_off: None,
    pvpanic_port: 0x505,
    exit: (0xf4, 0),
    fault_end: End::Panic,
}));

/// Settles the registers.
pub(crate) fn start(arguments: Arguments<'_>, firmware: &Firmware) -> Result<(), BadArgument> {
    let port = |key, default| -> Result<u16, BadArgument> {
        u16::try_from(arguments.number(key, default)?).map_err(|_| BadArgument { key })
    };
    let power_off = match arguments.optional_number("poweroff_port")? {
        Some(_) => Some((
            Register::Port(port("poweroff_port", 0)?),
            port("poweroff_value", 0)?,
        )),
        None => acpi_power_off(firmware),
    };
    let exit_code = u8::try_from(arguments.number("exit_code", 0)?)
        .map_err(|_| BadArgument { key: "exit_code" })?;
    let exits = Exits {
        power_off,
        pvpanic_port: port("pvpanic_port", 0x505)?,
        exit: (port("exit_port", 0xf4)?, exit_code),
        fault_end: arguments
            .parsed("fault_end", End::parse)?
            .unwrap_or(End::Panic),
    };
    // SAFETY: see `Stored`.
    unsafe { EXITS.0.get().write(exits) };
    Ok(())
}

fn exits() -> Exits {
    // SAFETY: see `Stored`.
    unsafe { *EXITS.0.get() }
}

/// S5 by the sleep control register (ACPI 4.8.3.7) or PM1a (4.8.3.2.1).
fn acpi_power_off(firmware: &Firmware) -> Option<(Register, u16)> {
    let sleep_type = u16::from(firmware.s5_sleep_type?);
    match (firmware.sleep_control, firmware.pm1a_control) {
        (Some(register), _) => Some((register, sleep_type << 2 | 1 << 5)),
        (None, Some(port)) => Some((Register::Port(port), sleep_type << 10 | 1 << 13)),
        (None, None) => None,
    }
}

/// Ends the machine. A way that has no effect falls back to a reset, then to a triple fault.
pub(crate) fn end(way: End) -> ! {
    match way {
        End::PowerOff => power_off(),
        End::Panic => cpu::outb(exits().pvpanic_port, 1),
        End::Exit => cpu::outb(exits().exit.0, exits().exit.1),
        End::Reset => {}
        End::Triple => triple_fault(),
        End::Halt => stop_here(),
        End::Spin => loop {
            heartbeat::beat();
            core::hint::spin_loop();
        },
    }
    // The effect may be asynchronous: give it time.
    if way != End::Reset {
        wait();
    }
    cpu::outb(0x64, 0xfe);
    wait();
    triple_fault()
}

/// Ends the machine after an exception or a panic.
pub(crate) fn after_fault() -> ! {
    match exits().fault_end {
        // A crash must not look like a reset where pvpanic is missing.
        End::Panic => {
            cpu::outb(exits().pvpanic_port, 1);
            wait();
            triple_fault()
        }
        way => end(way),
    }
}

/// Ends the machine when a crash has not done so within seconds.
pub(crate) fn after_second_crash() -> ! {
    for _ in 0..10 {
        wait();
    }
    triple_fault()
}

/// 200 ms, or so if the TSC's frequency is unknown.
fn wait() {
    let deadline = clock::Deadline::after_ms(200);
    for _ in 0..50_000_000 {
        if clock::tsc_khz() != 0 && deadline.passed() {
            break;
        }
        core::hint::spin_loop();
    }
}

fn power_off() {
    let Some((register, value)) = exits().power_off else {
        return;
    };
    let [low, _] = value.to_le_bytes();
    match register {
        // The sleep control register is a byte, PM1a a word; a given port takes what fits.
        Register::Port(port) if value <= 0xff => cpu::outb(port, low),
        Register::Port(port) => cpu::outw(port, value),
        // SAFETY: the FADT's sleep control register; mapped, as it lies below 4 GiB on every known VMM.
        Register::Memory(address) => unsafe { (address as *mut u8).write_volatile(low) },
    }
}

/// Stops this CPU for good. What still interrupts it puts it back to sleep.
pub(crate) fn stop_here() -> ! {
    // The firmware's timer would arrive on an exception's vector.
    apic::mask_pics();
    loop {
        cpu::disable_interrupts();
        cpu::halt();
    }
}

/// Empties the interrupt descriptor table, then faults: the CPU finds no handler three times.
fn triple_fault() -> ! {
    #[cfg(guest_elf)]
    {
        unsafe extern "C" {
            safe static idt: [core::sync::atomic::AtomicU64; 512];
        }
        for word in &idt {
            word.store(0, core::sync::atomic::Ordering::Release);
        }
    }
    loop {
        // SAFETY: raises #UD, with no handler left.
        unsafe { core::arch::asm!("ud2") }
    }
}
