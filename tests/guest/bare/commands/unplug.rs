//! `unplug`: lets PCI devices go that the machine wants back.

use super::{Context, Failure, Outcome};
use crate::clock::Deadline;
use crate::{cpu, heartbeat};
use drover_guest::acpi::Register;
use drover_guest::line::Line;

/// Drover's registers for PCI devices that come and go lie behind the sleep control register: which
/// shall leave, one bit each, is read here,
const LEAVING_OFFSET: u16 = 12;
/// and which may, written here.
const EJECT_OFFSET: u16 = 16;

/// `unplug count=1 seconds=60`: until so many have been let go.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let count = context.arguments.number("count", 1)?;
    let seconds = context.arguments.number("seconds", 60)?;
    let Some(Register::Port(base)) = context.machine.firmware.sleep_control else {
        return Err(Failure::new("no-hotplug"));
    };
    let end = Deadline::after_ms(seconds.saturating_mul(1000));
    let mut gone = 0;
    while gone < count {
        if end.passed() {
            return Err(Failure::new("timeout").with("gone", gone));
        }
        heartbeat::progress(gone);
        let leaving = cpu::inl(base + LEAVING_OFFSET);
        if leaving != 0 {
            cpu::outl(base + EJECT_OFFSET, leaving);
            gone += u64::from(leaving.count_ones());
        }
    }
    line.put("gone", gone);
    Ok(())
}
