//! Writing the heartbeat record.

use crate::cpu;
use core::sync::atomic::{AtomicU64, Ordering};
use drover_guest::heartbeat::{self, State};

static COUNTER: AtomicU64 = AtomicU64::new(0);

fn store64(offset: usize, value: u64) {
    let field = (heartbeat::GPA as usize + offset) as *mut u64;
    // SAFETY: the record lies in the image's first page, which nothing else uses (link.ld); aligned.
    unsafe { field.write_volatile(value) }
}

fn store32(offset: usize, value: u32) {
    let field = (heartbeat::GPA as usize + offset) as *mut u32;
    // SAFETY: as in `store64`.
    unsafe { field.write_volatile(value) }
}

/// Shows that the guest runs. Called from every loop.
pub(crate) fn beat() {
    store64(heartbeat::TSC_OFFSET, cpu::rdtsc());
    // Only the boot CPU beats, so load and store need not be one step.
    let counter = COUNTER.load(Ordering::Relaxed) + 1;
    COUNTER.store(counter, Ordering::Relaxed);
    store64(heartbeat::COUNTER_OFFSET, counter);
}

/// A beat that also says how far the current command is.
pub(crate) fn progress(units: u64) {
    store64(heartbeat::PROGRESS_OFFSET, units);
    beat();
}

/// Starts the record.
pub(crate) fn start() {
    set_state(State::Ready);
    store64(heartbeat::MAGIC_OFFSET, heartbeat::MAGIC);
    beat();
}

/// Tells the counter's frequency.
pub(crate) fn set_tsc_khz(khz: u64) {
    store64(heartbeat::TSC_KHZ_OFFSET, khz);
}

/// Tells what the guest is doing.
pub(crate) fn set_state(state: State) {
    store32(heartbeat::STATE_OFFSET, state as u32);
    beat();
}

/// Tells which command of `run=` begins, counted from 1.
pub(crate) fn set_command(number: u32) {
    store32(heartbeat::COMMAND_OFFSET, number);
    progress(0);
}

/// Tells how many commands failed.
pub(crate) fn set_failures(count: u64) {
    store64(heartbeat::FAILURES_OFFSET, count);
}

/// Tells which generation is being written.
pub(crate) fn set_generation(generation: u64) {
    store64(heartbeat::GENERATION_OFFSET, generation);
}
