//! Unexpected exceptions and panics: say what happened, then end as `fault_end=` says.

use crate::{end, heartbeat, serial};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use drover_guest::heartbeat::State;
use drover_guest::line::Line;

static CRASHED: AtomicBool = AtomicBool::new(false);

/// What the trap code notes: vector, error code, rip, cs, rsp, cr2.
#[cfg_attr(guest_elf, unsafe(no_mangle))]
static EXCEPTION_RECORD: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];

/// Where the trap code resumes ring 3 after an exception, on a stack of its own.
#[cfg_attr(guest_elf, unsafe(no_mangle))]
extern "C" fn exception_report() -> ! {
    enter_crash();
    let [vector, error, rip, cs, rsp, cr2] = EXCEPTION_RECORD
        .each_ref()
        .map(|field| field.load(Ordering::Acquire));
    let mut line = Line::new("exception");
    line.put("vector", vector)
        .put("name", name(vector))
        .hex("error", error)
        .hex("rip", rip);
    line.put("ring", cs & 3).hex("rsp", rsp).hex("cr2", cr2);
    line.put("result", "fail").put("reason", "exception");
    serial::print(&mut line);
    end::after_fault()
}

/// Reports a panic and ends.
pub(crate) fn report_panic(info: &core::panic::PanicInfo<'_>) -> ! {
    enter_crash();
    let mut line = Line::new("panic");
    if let Some(place) = info.location() {
        line.foreign("file", place.file().as_bytes())
            .put("line", place.line());
    }
    line.put("result", "fail")
        .put("reason", "panic")
        .put("message", info.message());
    serial::print(&mut line);
    end::after_fault()
}

/// The first crash reports. A second one is another CPU's, which leaves the report time to finish, or comes
/// from inside the report, which then never ends the machine: so this does, late.
fn enter_crash() {
    if CRASHED.swap(true, Ordering::AcqRel) {
        end::after_second_crash();
    }
    heartbeat::set_state(State::Crashed);
}

fn name(vector: u64) -> &'static str {
    match vector {
        0 => "divide-error",
        1 => "debug",
        2 => "nmi",
        3 => "breakpoint",
        6 => "invalid-opcode",
        7 => "device-not-available",
        8 => "double-fault",
        10 => "invalid-tss",
        11 => "segment-not-present",
        12 => "stack-fault",
        13 => "general-protection",
        14 => "page-fault",
        16 => "x87-error",
        17 => "alignment-check",
        18 => "machine-check",
        19 => "simd-error",
        _ => "other",
    }
}
