//! A VM whose guest computes on a model GPU, moved from one to the next.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::bench::migrate::link::Link;
use crate::bench::migrate::table::number;
use crate::bench::migrate::watch::Watch;
use crate::bench::round::touch_memory;
use crate::harness::computing::{self, LONG_JOB, finish, works_on};
use crate::harness::ground::Ground;
use crate::harness::model_gpu::ModelGpu;
use crate::harness::moving::{Place, migrate};
use crate::harness::proc::{ProcessView, TICKS_PER_SECOND};
use crate::harness::ram::GuestMemory;
use crate::harness::vm::{SOON, Vm};

/// How long plain sockets are measured after each move, and with how many bytes at a time.
const PLAIN_TIME: Duration = Duration::from_millis(500);
const PLAIN_BYTES: usize = 256 << 10;
/// What the guest has for itself at both ends of video memory.
const GUESTS_BYTES: u64 = 1 << 20;

/// What is touched besides video memory.
const VMM_MIB: u64 = 256;

/// What is moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) vram_mib: u64,
    pub(super) pre_copy: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pre_copy = if self.pre_copy { "on" } else { "off" };
        write!(f, "{} MiB, pre-copy {pre_copy}", self.vram_mib)
    }
}

/// What was seen of a move.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Move {
    /// From the guest's last heartbeat here to its first one there.
    pub(super) blackout_ms: f64,
    /// From the request to the end, in Drover's words.
    pub(super) total_ms: f64,
    /// What was left of the device's state when it was stopped.
    pub(super) last_bytes: f64,
    /// Bytes per second.
    pub(super) plain_rate: f64,
    /// Seconds of CPU of both VMMs and both model GPUs, without those of the vCPU and of computations.
    pub(super) cpu_seconds: f64,
    /// Bytes of the device, all of them.
    pub(super) device_bytes: f64,
    pub(super) source_growth_bytes: f64,
    pub(super) destination_growth_bytes: f64,
}

impl Move {
    /// How long plain sockets take for what was left of the device.
    pub(super) fn bound_ms(&self) -> f64 {
        self.last_bytes / self.plain_rate * 1e3
    }
}

/// Moves a VM so often.
///
/// # Errors
/// When it does not move, or does not compute on.
pub(super) fn measure(ground: &Ground, case: Case, moves: usize) -> anyhow::Result<Vec<Move>> {
    let link = Link::loopback()?;
    let mut gpu = start_gpu(ground, case, 0)?;
    let name = |number: usize| format!("{}{}-{number}", case.vram_mib, case.pre_copy);
    let spec = ground.vm(LONG_JOB).name(&name(0));
    let mut vm = computing::start(&spec.args(&["--device", &gpu.device()]))?;
    fill(&gpu, case)?;
    let mut seen = Vec::new();
    for number in 1..=moves {
        let next = start_gpu(ground, case, number)?;
        let device = format!("device0={}", next.device());
        let place = Place::new(ground, &name(number)).args(&["--device", &device]);
        let (moved, of_move) = one(&link, case, vm, &place, [&gpu, &next])?;
        eprintln!(
            "bench:   move {number}: {:.1} ms of blackout, {:.1} by plain sockets",
            of_move.blackout_ms,
            of_move.bound_ms()
        );
        seen.push(of_move);
        // The one before serves nobody any more.
        (vm, gpu) = (moved, next);
    }
    finish(vm)?;
    drop(gpu);
    Ok(seen)
}

fn start_gpu(ground: &Ground, case: Case, number: usize) -> anyhow::Result<ModelGpu> {
    let name = format!("gpu{}{}-{number}", case.vram_mib, case.pre_copy);
    let vram = format!("{}M", case.vram_mib);
    let pre_copy = if case.pre_copy { "on" } else { "off" };
    ModelGpu::with(ground, &name, &["--vram", &vram, "--pre-copy", pre_copy])
}

/// Fills video memory with what no compression makes smaller, but for what the guest looks at.
fn fill(gpu: &ModelGpu, case: Case) -> anyhow::Result<()> {
    use std::os::unix::fs::FileExt;
    let memory = gpu.video_memory()?;
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    let mut part = vec![0; 1 << 20];
    for offset in (GUESTS_BYTES..(case.vram_mib << 20) - GUESTS_BYTES).step_by(part.len()) {
        for slot in part.as_chunks_mut::<8>().0 {
            // Xorshift.
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            *slot = word.to_le_bytes();
        }
        memory.write_all_at(&part, offset)?;
    }
    Ok(())
}

/// Seconds of CPU of model GPUs so far, without those of computations.
fn serving_seconds(gpus: [&ModelGpu; 2]) -> anyhow::Result<f64> {
    let mut ticks = 0;
    for gpu in gpus {
        let view = ProcessView::of(gpu.pid());
        ticks += view.cpu_ticks_of(&["gpu-serve"])?;
    }
    Ok(number(ticks) / number(TICKS_PER_SECOND))
}

fn one(
    link: &Link,
    case: Case,
    mut vm: Vm,
    place: &Place<'_>,
    gpus: [&ModelGpu; 2],
) -> anyhow::Result<(Vm, Move)> {
    let there = place.start()?;
    // The model's video memory is the host's; see docs/benchmarks.md on warm memory.
    touch_memory(case.vram_mib + VMM_MIB)?;
    let before = serving_seconds(gpus)?;
    let downtime = if case.pre_copy { "20ms" } else { "60s" };
    let watch = Watch::start(vm.pid(), there.vm.pid(), Box::new(GuestMemory::of))?;
    let report = migrate(vm.control(), &there.url, &["--max-downtime", downtime]);
    let seen = watch.finish()?;
    let gpu_seconds = serving_seconds(gpus)? - before;
    let report = report?;
    vm.wait_exit(SOON)?;
    works_on(&there.vm)?;
    // Nor does the guest run in the blackout.
    there.vm.control().drover("pause", &[])?;
    let number_of = |value: &Value| value.as_u64().map(number).context("a number");
    let streams = usize::try_from(report["streams"].as_u64().context("streams")?)?;
    let plain_rate = link.plain_rate_by(streams, PLAIN_TIME, PLAIN_BYTES)?;
    there.vm.control().drover("resume", &[])?;
    works_on(&there.vm)?;
    let blackout = seen.blackout.context("the guest does not go on there")?;
    ensure!(plain_rate > 0.0, "plain sockets carry nothing");
    let of_move = Move {
        blackout_ms: blackout.as_secs_f64() * 1e3,
        total_ms: number_of(&report["total_ms"])?,
        last_bytes: number_of(&report["blackout"]["device_bytes"])?,
        plain_rate,
        cpu_seconds: seen.cpu_seconds + gpu_seconds,
        device_bytes: number_of(&report["device_bytes"])?,
        source_growth_bytes: seen.source_growth_bytes,
        destination_growth_bytes: seen.destination_growth_bytes,
    };
    Ok((there.vm, of_move))
}
