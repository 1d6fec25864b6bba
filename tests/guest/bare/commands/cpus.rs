//! `cpus`: other CPUs run.

use super::{Context, Failure, Outcome, event};
use crate::smp::{self, Control};
use crate::{clock, serial};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use drover_guest::line::Line;

/// What a CPU does meanwhile.
fn count(control: &mut Arc<Control>) {
    while !control.stop.load(Ordering::Acquire) {
        control.done.fetch_add(1, Ordering::Relaxed);
    }
}

/// `cpus smp= ms=`: starts CPUs until `smp` run (default: all of the MADT); each counts for a while.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let all = context.machine.firmware.cpus.len() as u64;
    let wanted = arguments.number("smp", all)?.max(1);
    let ms = arguments.number("ms", 100)?;
    let start = clock::now();
    let crew = smp::start(context.machine, arguments, wanted - 1)?;
    line.put("cpus", wanted)
        .put("start_us", clock::micros(clock::now() - start));
    let controls: Vec<Arc<Control>> = crew.members().map(|_| Arc::default()).collect();
    let mut theirs = controls.clone();
    for (member, control) in crew.members().zip(theirs.iter_mut()) {
        // SAFETY: `theirs` outlives `crew.wait` below and is not used in between.
        unsafe { member.assign(count, control) };
    }
    clock::spin_ms(ms);
    for control in &controls {
        control.stop.store(true, Ordering::Release);
    }
    crew.wait();
    let count_of = |control: &Arc<Control>| control.done.load(Ordering::Relaxed);
    for (member, control) in crew.members().zip(&controls) {
        let mut item = event(context, "counted");
        item.put("apic_id", member.apic_id())
            .put("count", count_of(control));
        serial::print(&mut item);
    }
    let least = controls.iter().map(count_of).min();
    line.put("least", least.unwrap_or(0));
    if least == Some(0) {
        Err(Failure::new("cpu-stands-still"))
    } else {
        Ok(())
    }
}
