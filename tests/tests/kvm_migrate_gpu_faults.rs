//! Moves of VMs with GPUs that fail: a device refuses an arc of its migration states, or a process is killed.
//! The VM computes on with what it had, or runs on without its device and says so; it never runs twice.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tests::harness::computing::{self, LONG_JOB, finish, works_on};
use tests::harness::ground::Ground;
use tests::harness::model_gpu::ModelGpu;
use tests::harness::moving::{Place, Waiting, migrate, reason_not_moved, try_migrate};
use tests::harness::process::{self, Finished};
use tests::harness::vm::{SOON, Vm};
use tests::harness::watch::Watch;

type Outcome = anyhow::Result<()>;

/// Video memory has to come over while the VM stands still, on a busy machine.
const LONG: [&str; 2] = ["--max-downtime", "20s"];

/// What becomes of a VM whose move meets a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// It stays and computes on.
    ComputesHere,
    /// It stays and runs on; its device has failed.
    LostHere,
    /// It stays and runs on; its device has failed, but its state is whole: after the next move it computes.
    StopsHere,
    /// It has moved and computes on.
    Moves,
    /// It has moved; its device there has failed.
    LostThere,
}

fn gpu(ground: &Ground, name: &str, options: &[&str]) -> anyhow::Result<ModelGpu> {
    let options = [&["--vram", "16M"], options].concat();
    ModelGpu::with(ground, name, &options)
}

fn at_work(ground: &Ground, name: &str, gpu: &ModelGpu) -> anyhow::Result<Vm> {
    let spec = ground.vm(LONG_JOB).name(name);
    computing::start(&spec.args(&["--device", &gpu.device()]))
}

fn waiting(ground: &Ground, name: &str, gpu: &ModelGpu) -> anyhow::Result<Waiting> {
    let device = format!("device0={}", gpu.device());
    let place = Place::new(ground, name);
    place.args(&["--device", &device]).start()
}

/// It can move to a healthy device, and all that it has computed is right.
fn moves_on(ground: &Ground, name: &str, mut vm: Vm) -> Outcome {
    let healthy = gpu(ground, &format!("{name}-healthy-gpu"), &[])?;
    let place = waiting(ground, &format!("{name}-healthy"), &healthy)?;
    migrate(vm.control(), &place.url, &LONG).context("a later move")?;
    vm.wait_exit(SOON)?;
    works_on(&place.vm)?;
    finish(place.vm)
}

/// It runs without its device, and says so.
fn has_lost_its_device(vm: &Vm) -> Outcome {
    vm.memory()?.wait_beat(SOON)?;
    let told = || {
        let names = vm.control().event_names().ok()?;
        names
            .iter()
            .any(|name| name == "device-failed")
            .then_some(())
    };
    let told = process::wait_until(Instant::now() + SOON, told);
    ensure!(told.is_some(), "{:?}", vm.control().event_names());
    Ok(())
}

/// Moves a VM from a GPU with these options to another with those.
fn meet(ground: &Ground, name: &str, (here, there): (&[&str], &[&str]), then: Then) -> Outcome {
    let first = gpu(ground, &format!("{name}-gpu"), here)?;
    let second = gpu(ground, &format!("{name}-gpu-there"), there)?;
    let mut vm = at_work(ground, name, &first)?;
    let place = waiting(ground, &format!("{name}-there"), &second)?;
    let finished = try_migrate(vm.control(), &place.url, &LONG)?;
    if matches!(then, Then::Moves | Then::LostThere) {
        ensure!(finished.code() == Some(0), "{finished:?}");
        vm.wait_exit(SOON)?;
        if then == Then::LostThere {
            return has_lost_its_device(&place.vm);
        }
        works_on(&place.vm)?;
        return moves_on(ground, name, place.vm);
    }
    let reason = reason_not_moved(&finished, name)?;
    ensure!(reason.contains("device0"), "{reason}");
    match then {
        Then::ComputesHere => works_on(&vm)?,
        Then::LostHere => return has_lost_its_device(&vm),
        _ => has_lost_its_device(&vm)?,
    }
    moves_on(ground, name, vm)
}

/// Each of the cases: what fails, and what becomes of the VM.
fn meet_all(name: &str, is_source: bool, more: &[&str], cases: &[(&str, Then)]) -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (number, (points, then)) in cases.iter().enumerate() {
        let failing = [more, &["--fail", points]].concat();
        let sides = match is_source {
            true => (&failing[..], more),
            false => (more, &failing[..]),
        };
        let met = meet(&ground, &format!("{name}{number}"), sides, *then);
        met.with_context(|| format!("{points}, {then:?}"))?;
    }
    Ok(())
}

#[test]
fn every_arc_of_the_sources_device_may_fail() -> Outcome {
    let cases = [
        // The pause goes on without it, and the device is stopped when its state is wanted.
        ("running-to-stop", Then::Moves),
        ("running-to-stop,running-to-stop", Then::ComputesHere),
        ("running-to-stop=error", Then::LostHere),
        ("stop-to-stop-copy", Then::ComputesHere),
        ("stop-to-stop-copy=error", Then::LostHere),
        ("read", Then::ComputesHere),
        ("read=error", Then::LostHere),
        ("read,stop-copy-to-stop", Then::ComputesHere),
        ("read,stop-copy-to-stop=error", Then::LostHere),
        ("read,stop-to-running", Then::StopsHere),
        ("read,stop-to-running=error", Then::LostHere),
    ];
    meet_all("arc", true, &[], &cases)
}

#[test]
fn every_arc_of_a_source_with_pre_copy_may_fail() -> Outcome {
    let cases = [
        ("running-to-pre-copy", Then::ComputesHere),
        ("running-to-pre-copy=error", Then::LostHere),
        ("read", Then::ComputesHere),
        ("read=error", Then::LostHere),
        ("read,pre-copy-to-running", Then::ComputesHere),
        ("pre-copy-to-stop-copy", Then::ComputesHere),
        ("pre-copy-to-stop-copy=error", Then::LostHere),
    ];
    meet_all("pre", true, &["--pre-copy", "on"], &cases)
}

#[test]
fn every_arc_of_the_destinations_device_may_fail() -> Outcome {
    let cases = [
        ("running-to-stop", Then::ComputesHere),
        ("running-to-stop=error", Then::ComputesHere),
        ("stop-to-resuming", Then::ComputesHere),
        ("stop-to-resuming=error", Then::ComputesHere),
        ("write", Then::ComputesHere),
        ("resuming-to-stop", Then::ComputesHere),
        ("resuming-to-stop=error", Then::ComputesHere),
        // The VM has been handed over by then.
        ("stop-to-running", Then::LostThere),
        ("stop-to-running=error", Then::LostThere),
    ];
    meet_all("into", false, &[], &cases)
}

/// Whose end it is.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Source,
    Destination,
    GpuHere,
    GpuThere,
}

/// A VM with a GPU that is moved so slowly that something can happen meanwhile.
struct Move {
    vm: Vm,
    place: Waiting,
    here: ModelGpu,
    there: ModelGpu,
}

impl Move {
    fn new(ground: &Ground, name: &str, options: &[&str]) -> anyhow::Result<Self> {
        let here = gpu(ground, &format!("{name}-gpu"), options)?;
        let there = gpu(ground, &format!("{name}-gpu-there"), options)?;
        let vm = at_work(ground, name, &here)?;
        let place = waiting(ground, &format!("{name}-there"), &there)?;
        Ok(Self {
            vm,
            place,
            here,
            there,
        })
    }

    /// Begins to move, and kills when the move is in this phase and a part of the device has been sent.
    fn kill(&mut self, victim: Victim, phase: &str) -> anyhow::Result<Finished> {
        let arguments = ["--max-downtime", "60s", "--bandwidth", "4M"];
        let (control, url) = (self.vm.control().clone(), self.place.url.clone());
        std::thread::scope(|scope| {
            let moving = scope.spawn(|| try_migrate(&control, &url, &arguments));
            let begun = || (at(&self.vm, phase).ok()?).then_some(());
            let begun = process::wait_until(Instant::now() + SOON, begun);
            begun.context("it did not begin")?;
            match victim {
                Victim::Source => self.vm.kill()?,
                Victim::Destination => self.place.vm.kill()?,
                Victim::GpuHere => self.here.signal(libc::SIGKILL)?,
                Victim::GpuThere => self.there.signal(libc::SIGKILL)?,
            }
            moving.join().map_err(|_| anyhow::anyhow!("panicked"))?
        })
    }
}

/// Whether the move is in this phase; before the blackout, after it has sent something.
fn at(vm: &Vm, phase: &str) -> anyhow::Result<bool> {
    let status = vm.control().curl("GET", "/v1/migration")?.json()?;
    let progress = &status["progress"];
    let is_sent = phase != "precopy" || progress["wire_bytes"].as_u64() > Some(1 << 20);
    Ok(progress["phase"] == phase && is_sent)
}

/// Without pre-copy the device's state is under way in the blackout, with it before.
const PHASES: [(&str, &str, &[&str]); 2] = [
    ("still", "switchover", &[]),
    ("running", "precopy", &["--pre-copy", "on"]),
];

#[test]
fn a_source_that_is_killed_leaves_no_copy_and_free_devices() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (name, phase, options) in PHASES {
        let mut of = Move::new(&ground, name, options)?;
        let watch = Watch::start(of.vm.memory()?, of.place.vm.pid())?;
        let finished = of.kill(Victim::Source, phase)?;
        ensure!(finished.code() != Some(0), "{finished:?}");
        let status = of.place.vm.wait_exit(SOON)?;
        of.place.vm.messages.wait_end(SOON)?;
        let said = of.place.vm.messages.text();
        ensure!(
            status.code() == Some(1) && said.contains("no VM has come over: "),
            "{status}: {said}"
        );
        ensure!(watch.finish()?.first.is_none(), "it ran there");
        // Both devices serve others as new.
        for (number, gpu) in [of.here, of.there].iter().enumerate() {
            finish(at_work(&ground, &format!("{name}-next{number}"), gpu)?)?;
        }
    }
    Ok(())
}

#[test]
fn a_destination_that_is_killed_leaves_the_vm_computing_here() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (name, phase, options) in PHASES {
        let mut of = Move::new(&ground, name, options)?;
        let finished = of.kill(Victim::Destination, phase)?;
        reason_not_moved(&finished, name)?;
        works_on(&of.vm)?;
        finish(at_work(&ground, &format!("{name}-next"), &of.there)?)?;
        moves_on(&ground, name, of.vm)?;
    }
    Ok(())
}

#[test]
fn a_gpu_that_dies_here_is_told_and_the_vm_runs_on() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (name, phase, options) in PHASES {
        let mut of = Move::new(&ground, name, options)?;
        let finished = of.kill(Victim::GpuHere, phase)?;
        let reason = reason_not_moved(&finished, name)?;
        ensure!(reason.contains("device0"), "{reason}");
        of.vm.memory()?.wait_beat(SOON)?;
        let names = of.vm.control().event_names()?;
        ensure!(
            names.iter().any(|name| name == "device-backend-lost"),
            "{names:?}"
        );
        // Nobody has it there.
        of.place.vm.wait_exit(SOON)?;
        finish(at_work(&ground, &format!("{name}-next"), &of.there)?)?;
    }
    Ok(())
}

#[test]
fn a_gpu_that_dies_there_before_the_blackout_leaves_the_vm_computing_here() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let (name, phase, options) = PHASES[1];
    let mut of = Move::new(&ground, name, options)?;
    let finished = of.kill(Victim::GpuThere, phase)?;
    let reason = reason_not_moved(&finished, name)?;
    ensure!(reason.contains("device0"), "{reason}");
    works_on(&of.vm)?;
    moves_on(&ground, name, of.vm)
}

#[test]
fn a_part_of_a_gpu_is_free_again_when_the_source_was_killed() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let (here, there) = (
        ModelGpu::divided(&ground, "here", "32M")?,
        ModelGpu::divided(&ground, "there", "32M")?,
    );
    let spec = ground.vm(LONG_JOB).name("vm");
    let mut vm = computing::start(&spec.args(&["--gpu", &here.free_part()]))?;
    let free = there.free_part();
    let place = Place::new(&ground, "moved").args(&["--gpu", &format!("device0={free}")]);
    let mut place = place.start()?;
    let arguments = ["--max-downtime", "60s", "--bandwidth", "4M"];
    let (control, url) = (vm.control().clone(), place.url.clone());
    std::thread::scope(|scope| {
        scope.spawn(|| try_migrate(&control, &url, &arguments));
        let begun = || at(&vm, "switchover").ok()?.then_some(());
        let begun = process::wait_until(Instant::now() + SOON, begun);
        begun.context("it did not begin")?;
        vm.kill()
    })?;
    place.vm.wait_exit(Duration::from_secs(30))?;
    // Both parts can be had.
    let next = |name: &str| {
        let spec = ground.vm(LONG_JOB).name(name);
        computing::start(&spec.args(&["--gpu", &free]))
    };
    let both = [next("one")?, next("two")?];
    both.into_iter().try_for_each(finish)
}
