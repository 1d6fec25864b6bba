//! `heartbeat`: nothing but a beating heart.

use super::{Context, Outcome};
use crate::clock::Deadline;
use crate::{heartbeat, serial};
use drover_guest::line::Line;

/// `heartbeat seconds= poll_ms=`: until the time is over (0: never) or a stop byte arrives.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let end = Deadline::after_ms(context.arguments.number("seconds", 0)?.saturating_mul(1000));
    let poll_ms = context.arguments.number("poll_ms", 20)?.max(1);
    let mut poll = Deadline::after_ms(poll_ms);
    let mut beats = 0_u64;
    while !end.passed() {
        beats += 1;
        heartbeat::progress(beats);
        core::hint::spin_loop();
        if poll.passed() {
            poll = Deadline::after_ms(poll_ms);
            if matches!(serial::read(), Some(b's' | b'S')) {
                break;
            }
        }
    }
    line.put("beats", beats);
    Ok(())
}
