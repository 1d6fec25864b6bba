//! Moves of VMs whose assigned devices stay behind: the guest lets them go, and gets others there,
//! or its own back.

use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tests::harness::ground::Ground;
use tests::harness::model_gpu::ModelGpu;
use tests::harness::moving::{Place, parse, try_migrate};
use tests::harness::process;
use tests::harness::vm::{LATER, SOON, Vm};

type Outcome = anyhow::Result<()>;

/// A guest that lets its GPU go when it is asked to, and later looks for one.
const LETS_GO: &str = "run=heartbeat,unplug,heartbeat,gpu";

const LIMIT: [&str; 2] = ["--max-downtime", "2s"];

/// A VM with a GPU that cannot move.
fn started(ground: &Ground, gpu: &ModelGpu) -> anyhow::Result<Vm> {
    let spec = ground.vm(LETS_GO).args(&["--device", &gpu.device()]);
    let vm = spec.start_controlled()?;
    vm.memory()?.wait_beat(SOON)?;
    Ok(vm)
}

/// The guest has a GPU, with which it computes; then it ends.
fn computes(mut vm: Vm) -> Outcome {
    vm.type_text("s")?;
    let result = vm.result("gpu")?;
    assert_eq!(result.number("gpus")?, 1, "{result:?}");
    assert_eq!(result.number("bad")?, 0, "{result:?}");
    vm.wait_end(LATER)?.check()
}

#[test]
fn vm_moves_without_its_device_and_gets_another_there() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::with(&ground, "gpu", &["--migration", "off"])?;
    let there = ModelGpu::with(&ground, "gpu-there", &["--migration", "off"])?;
    let mut vm = started(&ground, &gpu)?;
    let device = format!("device0={}", there.device());
    let place = Place::new(&ground, "there").args(&["--device", &device]);
    let place = place.start()?;
    vm.type_text("s")?;
    let arguments = [&LIMIT[..], &["--detach", "--json"]].concat();
    let finished = try_migrate(vm.control(), &place.url, &arguments)?;
    let report = parse(&finished)?;
    ensure!(finished.code() == Some(0), "{finished:?}");
    assert_eq!(report["detached"], json!(["device0"]), "{report}");
    ensure!(report.get("put_back").is_none(), "{report}");
    let status = vm.wait_exit(SOON)?;
    ensure!(status.code() == Some(0), "the source ended with {status}");
    let moved = place.vm;
    let plugged = || moved.control().device("device0").ok();
    let plugged = process::wait_until(Instant::now() + SOON, plugged);
    let plugged = plugged.context("no device has been plugged in")?;
    assert_eq!(plugged["host"], json!(there.place()), "{plugged}");
    computes(moved)
}

#[test]
fn vm_that_does_not_move_gets_its_device_back() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::with(&ground, "gpu", &["--migration", "off"])?;
    let mut vm = started(&ground, &gpu)?;
    let place = Place::new(&ground, "there").args(&["--disk", "disk9=/nowhere"]);
    let place = place.start()?;
    vm.type_text("s")?;
    let arguments = [&LIMIT[..], &["--detach", "--json"]].concat();
    let finished = try_migrate(vm.control(), &place.url, &arguments)?;
    let report = parse(&finished)?;
    ensure!(finished.code() == Some(1), "{finished:?}");
    assert_eq!(report["outcome"], "resumed", "{report}");
    assert_eq!(report["detached"], json!(["device0"]), "{report}");
    assert_eq!(report["put_back"], json!(["device0"]), "{report}");
    let error = report["error"].as_str().context("no error")?;
    ensure!(error.contains("the VM has no disk disk9"), "{error}");
    let device = vm.control().device("device0")?;
    assert_eq!(device["host"], json!(gpu.place()), "{device}");
    computes(vm)
}

#[test]
fn guest_that_keeps_its_device_keeps_it_and_does_not_move() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::with(&ground, "gpu", &["--migration", "off"])?;
    // It is not told to go on to where it would let the device go.
    let vm = started(&ground, &gpu)?;
    let place = Place::new(&ground, "there").start()?;
    let arguments = ["--detach", "--json"];
    let finished = std::thread::scope(|scope| {
        let moving = scope.spawn(|| try_migrate(vm.control(), &place.url, &arguments));
        let active = || {
            let status = vm.control().curl("GET", "/v1/migration").ok()?;
            (status.json().ok()?["active"] == true).then_some(())
        };
        process::wait_until(Instant::now() + SOON, active).context("it did not begin")?;
        ground.run_drover(&["migration", "cancel", "vm"])?;
        moving.join().map_err(|_| anyhow::anyhow!("panicked"))?
    })?;
    let report: Value = parse(&finished)?;
    ensure!(finished.code() == Some(1), "{finished:?}");
    assert_eq!(report["error"], "it was cancelled", "{report}");
    ensure!(report.get("detached").is_none(), "{report}");
    vm.control().device("device0")?;
    vm.memory()?.wait_beat(SOON)?;
    Ok(())
}
