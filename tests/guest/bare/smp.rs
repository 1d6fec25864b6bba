//! The other CPUs: started by INIT and SIPI, each in ring 3, running what it is assigned.

use crate::commands::Failure;
use crate::machine::Machine;
use crate::{clock, heartbeat};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use drover_guest::cmdline::Arguments;

/// Where a CPU begins after SIPI: a page below 1 MiB (the SIPI vector is its number).
const TRAMPOLINE: u64 = 0x8000;
const STACK_BYTES: usize = 32 << 10;
const RING0_STACK_BYTES: usize = 4096;

const ICR_INIT: u32 = 0x0000_4500;
const ICR_STARTUP: u32 = 0x0000_4600 | (TRAMPOLINE >> 12) as u32;

/// One CPU's descriptor tables, stacks and mailbox. The first fields are read by smp.s.
#[repr(C, align(16))]
struct Cpu {
    gdt: [u64; 7],
    tss: [u32; 26],
    ring3_stack_top: u64,
    up: AtomicBool,
    /// The work's function and argument; `busy` says that they are set and not yet done.
    work: AtomicUsize,
    argument: AtomicUsize,
    busy: AtomicBool,
    apic_id: u32,
    stack: UnsafeCell<[u8; STACK_BYTES]>,
    ring0_stack: UnsafeCell<[u8; RING0_STACK_BYTES]>,
}

struct Started(UnsafeCell<Vec<&'static Cpu>>);

// SAFETY: only the boot CPU touches the list.
unsafe impl Sync for Started {}

static CPUS: Started = Started(UnsafeCell::new(Vec::new()));

/// What the boot CPU and one other share while the other works.
#[derive(Default)]
pub(crate) struct Control {
    pub(crate) stop: AtomicBool,
    /// Units done.
    pub(crate) done: AtomicU64,
}

/// CPUs at work for one command.
pub(crate) struct Crew {
    cpus: Vec<&'static Cpu>,
}

/// One CPU of a crew.
#[derive(Clone, Copy)]
pub(crate) struct Member(&'static Cpu);

impl Crew {
    pub(crate) fn members(&self) -> impl Iterator<Item = Member> + '_ {
        self.cpus.iter().map(|&cpu| Member(cpu))
    }

    /// Waits until every member has finished its work.
    pub(crate) fn wait(&self) {
        for cpu in &self.cpus {
            while cpu.busy.load(Ordering::Acquire) {
                heartbeat::beat();
                core::hint::spin_loop();
            }
        }
    }
}

impl Member {
    /// Lets the CPU run `work(argument)`.
    ///
    /// # Safety
    /// `argument` stays valid and is used by nobody else until [`Crew::wait`] returns.
    pub(crate) unsafe fn assign<T>(&self, work: fn(&mut T), argument: &mut T) {
        self.0
            .argument
            .store(&raw mut *argument as usize, Ordering::Relaxed);
        self.0.work.store(work as usize, Ordering::Relaxed);
        self.0.busy.store(true, Ordering::Release);
    }

    pub(crate) fn apic_id(&self) -> u32 {
        self.0.apic_id
    }
}

/// A crew of `wanted` CPUs besides the boot CPU; starts those that do not run yet.
pub(crate) fn start(
    machine: &mut Machine,
    arguments: Arguments<'_>,
    wanted: u64,
) -> Result<Crew, Failure> {
    if wanted == 0 {
        return Ok(Crew { cpus: Vec::new() });
    }
    let boot_id = machine.apic(arguments)?.id();
    let others: Vec<u32> = machine
        .firmware
        .cpus
        .iter()
        .copied()
        .filter(|&id| id != boot_id)
        .collect();
    if (others.len() as u64) < wanted {
        return Err(Failure::new("not-enough-cpus").with("cpus", others.len() as u64 + 1));
    }
    // SAFETY: only the boot CPU comes here.
    let running = unsafe { &mut *CPUS.0.get() };
    for &apic_id in others.iter().take(wanted as usize).skip(running.len()) {
        running.push(start_one(machine, arguments, apic_id)?);
    }
    Ok(Crew {
        cpus: running.iter().copied().take(wanted as usize).collect(),
    })
}

fn start_one(
    machine: &mut Machine,
    arguments: Arguments<'_>,
    apic_id: u32,
) -> Result<&'static Cpu, Failure> {
    let apic = machine.apic(arguments)?;
    if machine
        .ram
        .containing(TRAMPOLINE)
        .is_none_or(|region| region.end() < TRAMPOLINE + 4096)
    {
        return Err(Failure::new("no-low-memory"));
    }
    let cpu: &'static Cpu = Box::leak(new_cpu(apic_id));
    if !place_trampoline(cpu) {
        return Err(Failure::new("stub"));
    }
    apic.send_ipi(apic_id, ICR_INIT);
    clock::spin_ms(10);
    for _ in 0..2 {
        apic.send_ipi(apic_id, ICR_STARTUP);
        let deadline = clock::Deadline::after_ms(200);
        while !deadline.passed() {
            if cpu.up.load(Ordering::Acquire) {
                return Ok(cpu);
            }
            heartbeat::beat();
            core::hint::spin_loop();
        }
    }
    Err(Failure::new("cpu-did-not-start").with("apic_id", u64::from(apic_id)))
}

fn new_cpu(apic_id: u32) -> Box<Cpu> {
    let mut cpu = Box::new(Cpu {
        // As in boot.s; the TSS descriptor follows.
        gdt: [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0,
            0,
        ],
        tss: [0; 26],
        ring3_stack_top: 0,
        up: AtomicBool::new(false),
        work: AtomicUsize::new(0),
        argument: AtomicUsize::new(0),
        busy: AtomicBool::new(false),
        apic_id,
        stack: UnsafeCell::new([0; STACK_BYTES]),
        ring0_stack: UnsafeCell::new([0; RING0_STACK_BYTES]),
    });
    let tss = &raw const cpu.tss as u64;
    // A 104-byte available 64-bit TSS (Intel SDM volume 3, 8.2.3).
    cpu.gdt[5] = 103 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
    cpu.gdt[6] = tss >> 32;
    let ring0_top = cpu.ring0_stack.get() as u64 + RING0_STACK_BYTES as u64;
    cpu.tss[1] = ring0_top as u32;
    cpu.tss[2] = (ring0_top >> 32) as u32;
    cpu.tss[25] = 104 << 16;
    cpu.ring3_stack_top = (cpu.stack.get() as u64 + STACK_BYTES as u64) & !15;
    cpu
}

/// Copies the real-mode code and tells it which CPU it starts; `false` in the stub build.
fn place_trampoline(cpu: &'static Cpu) -> bool {
    #[cfg(guest_elf)]
    {
        unsafe extern "C" {
            static ap_trampoline: u8;
            static ap_trampoline_end: u8;
            safe static ap_cpu: AtomicU64;
        }
        let start = &raw const ap_trampoline;
        let len = &raw const ap_trampoline_end as usize - start as usize;
        // SAFETY: low RAM that holds nothing any more: the start info was copied (boot_info.rs).
        unsafe { core::ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, len) };
        // The GDT pointer is the trampoline's last ten bytes: limit, then base.
        let pointer = TRAMPOLINE + len as u64 - 10;
        // SAFETY: inside the copy.
        unsafe { (pointer as *mut u16).write_unaligned(size_of_val(&cpu.gdt) as u16 - 1) };
        // SAFETY: inside the copy.
        unsafe { ((pointer + 2) as *mut u64).write_unaligned(&raw const cpu.gdt as u64) };
        // One CPU starts at a time, and it reads this before it says that it is up.
        ap_cpu.store(&raw const *cpu as u64, Ordering::Release);
    }
    let _ = cpu;
    cfg!(guest_elf)
}

/// A started CPU's life, in ring 3 (smp.s).
#[cfg_attr(guest_elf, unsafe(no_mangle))]
extern "C" fn ap_main(cpu: &'static Cpu) -> ! {
    cpu.up.store(true, Ordering::Release);
    loop {
        if cpu.busy.load(Ordering::Acquire) {
            let work = cpu.work.load(Ordering::Relaxed);
            // SAFETY: `assign` stored a `fn(&mut T)` and a `&mut T`; both are one pointer, whatever T is.
            let work = unsafe { core::mem::transmute::<usize, extern "Rust" fn(usize)>(work) };
            work(cpu.argument.load(Ordering::Relaxed));
            cpu.busy.store(false, Ordering::Release);
        }
        core::hint::spin_loop();
    }
}
