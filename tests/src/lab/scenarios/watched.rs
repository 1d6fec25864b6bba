//! What scenarios have in common whose guest is watched by the witness.

use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::ensure;

use crate::lab::protocol::Report;
use crate::lab::vmm::{SOON, Vmm};

/// What may lie between one clock and another, or the host's, after a move: in the lab it can take so
/// long from one line of the program to the next. Clocks that are not carried over differ by more.
pub(super) const MARGIN: Duration = Duration::from_secs(3);

/// What the witness counts: blocks of two writers, numbers over TCP, looks of two watchers.
pub(super) const COUNTS: [&str; 5] = ["written0", "written1", "numbers", "ticks0", "ticks1"];

/// Types `lab_agent witness WORDS` into the guest; its report.
pub(super) fn ask(vmm: &mut Vmm, words: &str) -> anyhow::Result<Report> {
    vmm.send(&format!("lab_agent witness {words}\n"))?;
    let task = words.split(' ').next().unwrap_or_default();
    vmm.report(task, SOON)
}

/// Waits until each of `fields` has gone on by `more` at least since it was as in `done`; where they
/// are then.
pub(super) fn wait_progress<const N: usize>(
    vmm: &mut Vmm,
    fields: [&str; N],
    done: [u64; N],
    more: u64,
) -> anyhow::Result<[u64; N]> {
    let deadline = Instant::now() + SOON;
    loop {
        let report = ask(vmm, "progress")?;
        let mut now = [0; N];
        for (now, field) in now.iter_mut().zip(fields) {
            *now = report.number(field)?;
        }
        if now.iter().zip(done).all(|(now, done)| *now >= done + more) {
            return Ok(now);
        }
        ensure!(
            Instant::now() < deadline,
            "of {fields:?} not all go on: {done:?}, then {now:?}"
        );
    }
}

/// The witness's last report, with its clocks as they must be in a guest that stood still for
/// `blackouts`.
pub(super) fn verdict(vmm: &mut Vmm, blackouts: &[Duration]) -> anyhow::Result<Report> {
    let asked_ms = UNIX_EPOCH.elapsed()?.as_millis();
    let report = ask(vmm, "verdict")?;
    let told_ms = UNIX_EPOCH.elapsed()?.as_millis();
    let longest = blackouts.iter().copied().max().unwrap_or_default() + MARGIN;
    let apart_ms: u128 = report.number("apart_ms")?;
    ensure!(
        apart_ms <= longest.as_millis(),
        "monotonic clock and TSC differ by {apart_ms} ms in one step; blackouts: {blackouts:?}"
    );
    for clock in ["back", "realtime_back", "tsc_back"] {
        let count: u64 = report.number(clock)?;
        ensure!(count == 0, "{clock}: a clock went back {count} times");
    }
    // Guest time stands still while it is paused.
    let lag = blackouts.iter().sum::<Duration>() + MARGIN;
    let guest_ms: u128 = report.number("realtime_ms")?;
    ensure!(
        guest_ms + lag.as_millis() >= asked_ms && guest_ms <= told_ms + MARGIN.as_millis(),
        "the guest's time is {guest_ms}, the host's {asked_ms} to {told_ms}; it may lag by {lag:?}"
    );
    Ok(report)
}
