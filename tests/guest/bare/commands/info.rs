//! Short commands: `hello`, `cpuid`, `tsc`, `clock`, `pci`, and the deliberate crashes `fault`, `panic`.

use super::{Context, Failure, Outcome, event};
use crate::{clock, cpu, serial};
use alloc::vec::Vec;
use drover_guest::line::Line;
use virtio_drivers::transport::pci::virtio_device_type;

/// `hello`: an empty test.
pub(crate) fn hello(_: &mut Context<'_>, _: &mut Line) -> Outcome {
    Ok(())
}

/// `cpuid leaf= sub=`: one leaf.
pub(crate) fn cpuid(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let leaf = cpu::low32(context.arguments.number("leaf", 0)?);
    let subleaf = cpu::low32(context.arguments.number("sub", 0)?);
    let found = cpu::cpuid(leaf, subleaf);
    line.hex("leaf", u64::from(leaf))
        .hex("sub", u64::from(subleaf));
    for (name, value) in [
        ("eax", found.eax),
        ("ebx", found.ebx),
        ("ecx", found.ecx),
        ("edx", found.edx),
    ] {
        line.hex(name, u64::from(value));
    }
    Ok(())
}

/// `tsc ms=`: never goes back, and what a reading costs.
pub(crate) fn tsc(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    if clock::tsc_khz() == 0 {
        return Err(Failure::new("no-clock"));
    }
    let deadline = clock::Deadline::after_ms(context.arguments.number("ms", 100)?.max(1));
    let start = clock::now();
    let (mut last, mut readings, mut backward, mut largest_gap) = (start, 0_u64, 0_u64, 0);
    while !deadline.passed() {
        let now = clock::now();
        if now < last {
            backward += 1;
        }
        largest_gap = largest_gap.max(now.saturating_sub(last));
        last = now;
        readings += 1;
        crate::heartbeat::beat();
    }
    line.put("tsc_khz", clock::tsc_khz())
        .put("readings", readings)
        .put("backward", backward);
    line.put("largest_gap_us", clock::micros(largest_gap))
        .hex("start", start)
        .hex("end", last);
    if backward != 0 {
        return Err(Failure::new("tsc-went-back"));
    }
    Ok(())
}

/// `clock ms=`: kvm-clock against the TSC.
pub(crate) fn clock(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let reading = clock::kvm_clock().ok_or(Failure::new("no-kvm-clock"))?;
    let (before, start) = (reading.nanos(), clock::now());
    clock::spin_ms(context.arguments.number("ms", 50)?);
    let reading = clock::kvm_clock().ok_or(Failure::new("no-kvm-clock"))?;
    let (after, end) = (reading.nanos(), clock::now());
    line.put("ns", after)
        .put("elapsed_ns", after.saturating_sub(before));
    line.put("tsc_elapsed_ns", clock::nanos(end - start))
        .put("flags", reading.flags());
    if after <= before {
        return Err(Failure::new("clock-stood-still"));
    }
    Ok(())
}

/// `pci`: every function with its memory BARs.
pub(crate) fn pci(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let pci = context.machine.pci(arguments)?;
    let found: Vec<_> = pci
        .functions
        .iter()
        .map(|function| (function.address, function.info.clone()))
        .collect();
    let (access, assigned, count) = (pci.access_name(), pci.bars_assigned, found.len());
    for (address, info) in found {
        let bars = context.machine.pci(arguments)?.memory_bars(address);
        let mut item = event(context, "function");
        item.put("address", address);
        item.put(
            "id",
            format_args!("{:04x}:{:04x}", info.vendor_id, info.device_id),
        );
        item.put(
            "class",
            format_args!(
                "{:02x}{:02x}{:02x}",
                info.class, info.subclass, info.prog_if
            ),
        );
        if let Some(kind) = virtio_device_type(&info) {
            item.put("virtio", kind as u8);
        }
        for (index, base, size, wide) in bars {
            let name = ["bar0", "bar1", "bar2", "bar3", "bar4", "bar5"][usize::from(index)];
            item.put(
                name,
                format_args!("{base:#x}+{size:#x}/{}", if wide { 64 } else { 32 }),
            );
        }
        serial::print(&mut item);
    }
    line.put("functions", count)
        .put("access", access)
        .put("bars_assigned", assigned);
    Ok(())
}

/// `fault kind=ud|pf|de|gp`: an exception, to test what a VMM and a harness make of one.
pub(crate) fn fault(context: &mut Context<'_>, _: &mut Line) -> Outcome {
    match context.arguments.text("kind").unwrap_or("ud") {
        // SAFETY: crashing is what was asked for, here and below.
        "ud" => unsafe { core::arch::asm!("ud2") },
        // SAFETY: a non-canonical-free address that no table maps.
        "pf" => unsafe { ((1_u64 << 46) as *mut u8).write_volatile(1) },
        // SAFETY: see above.
        "de" => unsafe {
            core::arch::asm!("div {0:e}", in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _)
        },
        // SAFETY: see above; the trap code does not serve `lldt`.
        "gp" => unsafe { core::arch::asm!("lldt {0:x}", in(reg) 0) },
        _ => return Err(drover_guest::cmdline::BadArgument { key: "kind" }.into()),
    }
    Err(Failure::new("survived"))
}

/// `panic`: a Rust panic, for the same purpose.
#[expect(clippy::panic, reason = "this command exists to panic")]
pub(crate) fn panic(_: &mut Context<'_>, _: &mut Line) -> Outcome {
    panic!("requested by the command line")
}
