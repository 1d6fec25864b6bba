//! Guests that compute on model GPUs, one computation after the other, and check each result.

use super::vm::{LATER, SOON, Vm, VmSpec};

/// What such a guest is told; it computes until it is told to stop.
pub const LONG_JOB: &str = "run=gpu,heartbeat gpu.job=long gpu.words=1K gpu.progress_ms=0";

/// Starts a VM whose guest has been told [`LONG_JOB`], or the like, and waits for its first results.
///
/// # Errors
/// When there are none in time.
pub fn start(spec: &VmSpec<'_>) -> anyhow::Result<Vm> {
    let vm = spec.start_controlled()?;
    works_on(&vm)?;
    Ok(vm)
}

/// Waits for further results.
///
/// # Errors
/// When there are none in time.
pub fn works_on(vm: &Vm) -> anyhow::Result<()> {
    let ram = vm.memory()?;
    let jobs = ram.heartbeat()?.progress;
    ram.wait_heartbeat(SOON, |beat| beat.command == 1 && beat.progress > jobs + 1)?;
    Ok(())
}

/// Ends the computations, and the machine.
///
/// # Errors
/// When one of them was wrong, or the guest does not end.
pub fn finish(mut vm: Vm) -> anyhow::Result<()> {
    vm.type_text("s")?;
    let result = vm.result("gpu")?;
    assert_eq!(result.number("bad")?, 0, "{result:?}");
    vm.type_text("s")?;
    vm.wait_end(LATER)?.check()
}
