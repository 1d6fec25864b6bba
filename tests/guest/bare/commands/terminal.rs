//! `serial`: the serial port echoes what it hears, by polling or by interrupt.

use super::{Context, Failure, Outcome, event};
use crate::apic::{self, SERIAL_VECTOR};
use crate::clock::Deadline;
use crate::{cpu, heartbeat, serial};
use drover_guest::heartbeat::State;
use drover_guest::line::Line;

/// `serial ms= bytes= irq=`: echoes until the time is over, so many bytes have come, or a NUL.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let end = Deadline::after_ms(arguments.number("ms", 2000)?);
    let wanted = arguments.number("bytes", u64::MAX)?;
    let by_interrupt = arguments.flag("irq")?;
    let before = apic::interrupts(SERIAL_VECTOR);
    if by_interrupt {
        start_interrupts(context)?;
    }
    serial::print(&mut event(context, "started"));
    heartbeat::set_state(State::Waiting);
    let mut echoed = 0_u64;
    let mut handled = before;
    'echo: while echoed < wanted && !end.passed() {
        if by_interrupt {
            // The watchdog timer's interrupts make the sleeper look at the time.
            cpu::halt_until(|| apic::interrupts(SERIAL_VECTOR) != handled || end.passed());
            let count = apic::interrupts(SERIAL_VECTOR);
            if count == handled {
                continue;
            }
            // Noted before the port is emptied: an interrupt meanwhile means another round.
            handled = count;
        }
        while let Some(byte) = serial::read() {
            if byte == 0 {
                break 'echo;
            }
            serial::write(&[byte]);
            echoed += 1;
        }
        heartbeat::progress(echoed);
        core::hint::spin_loop();
    }
    if by_interrupt {
        serial::set_receive_interrupt(false);
        apic::unroute_isa(&context.machine.firmware, serial::IRQ);
        let interrupts = apic::interrupts(SERIAL_VECTOR) - before;
        line.put("echoed", echoed).put("interrupts", interrupts);
        if echoed != 0 && interrupts == 0 {
            return Err(Failure::new("no-interrupt"));
        }
        return Ok(());
    }
    line.put("echoed", echoed);
    Ok(())
}

fn start_interrupts(context: &mut Context<'_>) -> Outcome {
    let apic = context.machine.apic(context.arguments)?;
    if !apic::route_isa(
        &context.machine.firmware,
        serial::IRQ,
        SERIAL_VECTOR,
        apic.id(),
    ) {
        return Err(Failure::new("no-io-apic"));
    }
    apic.start_watchdog();
    serial::set_receive_interrupt(true);
    Ok(())
}
