//! The bare-metal test guest: boots by PVH, runs in ring 3, does what its command line says, reports on
//! the serial port, ends the machine. The command line and the output format are in README.md.
//!
//! Not here: anything that runs without a machine (the library of this package).
//!
//! - `boot.s`, `traps.s`: entry, descriptor tables, ring-0 services
//! - `cpu`, `intrinsics`, `paging`, `heap`, `exceptions`: the bare CPU made usable
//! - `serial`, `heartbeat`, `clock`, `end`: talking to the outside, time, the end
//! - `boot_info`, `firmware`, `machine`: what machine this is
//! - `apic`, `pci`, `virtio`, `gpu`, `smp`: devices and other CPUs
//! - `commands`: one module per group of commands
//!
//! Only the release profile builds the guest; elsewhere this is a stub (README.md, "Building").
#![cfg_attr(guest_elf, no_std, no_main)]
// The guest owns the machine: registers, page tables, device memory.
#![allow(unsafe_code)]
// An address is a u64 and a usize alike: the guest exists for x86-64 only.
#![allow(clippy::cast_possible_truncation)]
#![cfg_attr(not(guest_elf), allow(dead_code, non_upper_case_globals))]

extern crate alloc;

mod apic;
mod boot_info;
mod clock;
mod commands;
mod cpu;
mod end;
mod exceptions;
mod firmware;
mod gpu;
mod heap;
mod heartbeat;
#[cfg(guest_elf)]
mod intrinsics;
mod machine;
mod paging;
mod pci;
mod serial;
mod smp;
mod virtio;

use boot_info::BootInfo;
use commands::{Context, Failure};
use drover_guest::cmdline::{Arguments, BadArgument};
use drover_guest::heartbeat::State;
use drover_guest::line::{Line, PREFIX};
use end::End;
use machine::Machine;

#[cfg(guest_elf)]
core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));
#[cfg(guest_elf)]
core::arch::global_asm!(include_str!("traps.s"), options(att_syntax));
#[cfg(guest_elf)]
core::arch::global_asm!(include_str!("smp.s"), options(att_syntax));

#[cfg(all(guest_elf, not(panic = "abort")))]
compile_error!("the guest ELF is built with panic=abort (the release profile) only");

#[cfg(guest_elf)]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    exceptions::report_panic(info)
}

#[cfg(not(guest_elf))]
fn main() -> std::process::ExitCode {
    eprintln!(
        "drover-guest: this is a stub; `cargo build --release -p drover-guest` builds the guest"
    );
    std::process::ExitCode::from(2)
}

/// Ring 3 starts here (boot.s). `start_info` is what the VMM put into EBX.
#[cfg_attr(guest_elf, unsafe(no_mangle))]
extern "C" fn guest_main(start_info: u64) -> ! {
    serial::write_blindly(PREFIX.as_bytes());
    serial::write_blindly(b"ready");
    heartbeat::start();
    serial::enable_fifo();
    // SAFETY: the VMM's own word, read once.
    let Some(boot) = (unsafe { BootInfo::read(start_info) }) else {
        give_up("bad-start-info")
    };
    let Some(mut machine) = Machine::new(&boot) else {
        give_up("no-memory")
    };
    let arguments = machine.command_line.general();
    let end = match prepare(&mut machine, arguments) {
        Ok(end) => end,
        Err(error) => {
            serial::write(b"\n");
            let mut line = Line::new("start");
            Failure::from(error).print_to(&mut line);
            serial::print(&mut line);
            end::end(End::PowerOff)
        }
    };
    finish_banner(&machine);
    let failed = run_commands(&mut machine);
    let mut line = Line::new("done");
    line.put("commands", machine.command_line.commands().count())
        .put("failed", failed);
    line.put("end", end.name())
        .put("result", if failed == 0 { "ok" } else { "fail" });
    if failed != 0 {
        line.put("reason", "command-failed");
    }
    heartbeat::set_state(State::Done);
    serial::print(&mut line);
    end::end(end)
}

fn prepare(machine: &mut Machine, arguments: Arguments<'_>) -> Result<End, BadArgument> {
    // First, so that a crash from here on ends as asked.
    end::start(arguments, &machine.firmware)?;
    machine.tsc_source = clock::start(arguments, &machine.firmware)?;
    heartbeat::set_tsc_khz(clock::tsc_khz());
    Ok(arguments
        .parsed("end", End::parse)?
        .unwrap_or(End::PowerOff))
}

/// The rest of the line that `guest_main` began.
fn finish_banner(machine: &Machine) {
    let mut line = Line::new("ready");
    let begun = PREFIX.len() + "ready".len();
    line.put("version", env!("CARGO_PKG_VERSION"))
        .put("ring", cpu::ring());
    line.put("ram_bytes", machine.ram.total())
        .put("free_bytes", machine.free.total());
    line.put("tsc_khz", clock::tsc_khz())
        .put("tsc_source", machine.tsc_source);
    line.put("acpi", u8::from(machine.firmware.present))
        .put("cpus", machine.firmware.cpus.len());
    line.hex("heartbeat", drover_guest::heartbeat::GPA);
    serial::write(&line.finish()[begun..]);
}

fn run_commands(machine: &mut Machine) -> u64 {
    let command_line = machine.command_line;
    let mut failed = 0;
    for (number, name) in (1..).zip(command_line.commands()) {
        heartbeat::set_command(number);
        heartbeat::set_state(State::Running);
        let mut context = Context {
            name,
            arguments: command_line.arguments(name, u64::from(number)),
            machine,
        };
        let mut line = Line::of_command(name);
        match commands::run(&mut context, &mut line) {
            Ok(()) => {
                line.put("result", "ok");
            }
            Err(failure) => {
                failure.print_to(&mut line);
                failed += 1;
                heartbeat::set_failures(failed);
            }
        }
        machine.quiesce();
        machine::check_stack();
        serial::print(&mut line);
        heartbeat::set_state(State::Ready);
    }
    failed
}

/// Ends before there is anything to work with.
fn give_up(reason: &str) -> ! {
    serial::write(b"\n");
    let mut line = Line::new("start");
    line.put("result", "fail").put("reason", reason);
    serial::print(&mut line);
    end::end(End::Reset)
}
