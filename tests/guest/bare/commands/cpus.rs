//! `cpus`: other CPUs run.

use super::{Context, Failure, Outcome, event};
use crate::{clock, serial, smp};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use drover_guest::line::Line;

/// What a CPU does meanwhile.
struct Count {
    stop: AtomicBool,
    value: AtomicU64,
}

fn count(count: &mut Count) {
    while !count.stop.load(Ordering::Acquire) {
        count.value.fetch_add(1, Ordering::Relaxed);
    }
}

/// `cpus smp= ms=`: starts CPUs until `smp` run (default: all of the MADT); each counts for a while.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let all = context.machine.firmware.cpus.len() as u64;
    let wanted = arguments.number("smp", all)?.max(1);
    let start = clock::now();
    let crew = smp::start(context.machine, arguments, wanted - 1)?;
    line.put("cpus", wanted)
        .put("start_us", clock::micros(clock::now() - start));
    let fresh = || Count {
        stop: AtomicBool::new(false),
        value: AtomicU64::new(0),
    };
    let mut counts: Vec<Count> = crew.members().map(|_| fresh()).collect();
    let pointers: Vec<*const Count> = counts.iter().map(|count| &raw const *count).collect();
    for (member, mine) in crew.members().zip(counts.iter_mut()) {
        // SAFETY: `counts` outlives `crew.wait` below.
        unsafe { member.assign(count, mine) };
    }
    clock::spin_ms(arguments.number("ms", 100)?);
    for &pointer in &pointers {
        // SAFETY: only the atomic field is touched while the CPU runs.
        unsafe { &*(&raw const (*pointer).stop) }.store(true, Ordering::Release);
    }
    crew.wait();
    for (member, count) in crew.members().zip(&counts) {
        let mut item = event(context, "counted");
        item.put("apic_id", member.apic_id())
            .put("count", count.value.load(Ordering::Relaxed));
        serial::print(&mut item);
    }
    let least = counts
        .iter()
        .map(|count| count.value.load(Ordering::Relaxed))
        .min();
    line.put("least", least.unwrap_or(0));
    if least == Some(0) {
        Err(Failure::new("cpu-stands-still"))
    } else {
        Ok(())
    }
}
