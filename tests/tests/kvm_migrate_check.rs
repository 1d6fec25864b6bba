//! Migrations that are only asked about: the answer is right, the guest runs on, and the
//! destination waits for the real one afterwards.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::harness::computing::{self, LONG_JOB, finish, works_on};
use tests::harness::ground::Ground;
use tests::harness::model_gpu::ModelGpu;
use tests::harness::moving::{Place, Waiting, migrate, parse, try_migrate};
use tests::harness::process::Finished;
use tests::harness::vm::{SOON, Vm, VmSpec};

type Outcome = anyhow::Result<()>;

fn started(spec: &VmSpec<'_>) -> anyhow::Result<Vm> {
    let mut vm = spec.start_controlled()?;
    vm.ready()?;
    Ok(vm)
}

/// Asks whether `vm` would move; the answer, and what the check found out.
fn ask(vm: &Vm, url: &str, arguments: &[&str]) -> anyhow::Result<(Finished, Value)> {
    let arguments = [&["--check", "--json"], arguments].concat();
    let finished = try_migrate(vm.control(), url, &arguments)?;
    let mut report = parse(&finished)?;
    ensure!(report["outcome"] == "resumed", "{report}");
    ensure!(report["blackout"].is_null(), "{report}");
    let code = match report["check"]["would_move"].as_bool() {
        Some(true) => 0,
        _ => 1,
    };
    ensure!(finished.code() == Some(code), "{finished:?}");
    let check = report["check"].take();
    Ok((finished, check))
}

/// Moves `vm` to a place that has been asked before.
fn moved(mut vm: Vm, place: Waiting, arguments: &[&str]) -> anyhow::Result<Vm> {
    migrate(vm.control(), &place.url, arguments)?;
    let status = vm.wait_exit(SOON)?;
    ensure!(status.code() == Some(0), "the source ended with {status}");
    Ok(place.vm)
}

fn texts(list: &Value) -> Vec<&str> {
    let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(Value::as_str).collect()
}

/// Asks the state of a VM that computes, and lets it go on for a while.
fn runs(vm: &Vm) -> Outcome {
    ensure!(vm.control().state()? == "running");
    let ram = vm.memory()?;
    let before = ram.heartbeat()?;
    ram.wait_heartbeat(SOON, |beat| beat.counter > before.counter)?;
    Ok(())
}

#[test]
fn what_would_move_does_so_to_the_destination_that_was_asked() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground.vm("run=heartbeat"))?;
    let place = Place::new(&ground, "there").start()?;
    // A generous limit: not this host's speed is in question.
    let limit = ["--max-downtime", "2s"];
    for _ in 0..3 {
        let (_, check) = ask(&vm, &place.url, &limit)?;
        ensure!(check["would_move"] == true, "{check}");
        ensure!(check["converges"] == true, "{check}");
        for figure in [
            "predicted_total_ms",
            "predicted_blackout_us",
            "used_bytes",
            "round_trip_us",
            "rounds",
        ] {
            ensure!(
                check[figure].as_u64().is_some_and(|found| found > 0),
                "{check}"
            );
        }
        runs(&vm)?;
    }
    let finished = try_migrate(
        vm.control(),
        &place.url,
        &["--check", "--max-downtime", "2s"],
    )?;
    let said = finished.success()?;
    ensure!(
        said.starts_with("vm would move to tcp://127.0.0.1:"),
        "{said}"
    );
    ensure!(said.contains("; nothing has moved\n"), "{said}");
    let events = vm.control().event_names()?;
    ensure!(!events.contains(&"paused".to_owned()), "{events:?}");
    let there = moved(vm, place, &limit)?;
    runs(&there)
}

#[test]
fn downtime_that_cannot_be_kept_is_told_beforehand() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = started(&ground.vm("run=heartbeat"))?;
    let place = Place::new(&ground, "there").start()?;
    let (_, check) = ask(&vm, &place.url, &["--max-downtime", "10us"])?;
    let objections = texts(&check["objections"]).join("\n");
    let expected = "a downtime of 0.01 ms cannot be kept: ";
    ensure!(objections.starts_with(expected), "{check}");
    ensure!(texts(&check["blockers"]).is_empty() && texts(&check["refusals"]).is_empty());
    // As slow as this, memory does not go in so short a time.
    let slow = [
        "--bandwidth",
        "1M",
        "--timeout",
        "50ms",
        "--max-downtime",
        "5s",
    ];
    let (_, check) = ask(&vm, &place.url, &slow)?;
    let objections = texts(&check["objections"]).join("\n");
    let expected = "memory would not be sent once within 0.05 s: ";
    ensure!(objections.contains(expected), "{check}");
    runs(&moved(vm, place, &["--max-downtime", "2s"])?)
}

#[test]
fn reasons_of_both_hosts_are_told_at_once_and_nobody_ends() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let still = ModelGpu::with(&ground, "still", &["--migration", "off"])?;
    let gpu = ["--device".to_owned(), still.device()];
    let vm = computing::start(&ground.vm(LONG_JOB).args(&gpu))?;
    // It has no device for this one, and takes no serial port of that name.
    let place = Place::new(&ground, "there").start()?;
    let (finished, check) = ask(&vm, &place.url, &[])?;
    let blockers = texts(&check["blockers"]);
    let expected = "device0: the device's driver cannot save its state";
    ensure!(blockers == [expected], "{check}");
    let refusals = texts(&check["refusals"]).join("\n");
    ensure!(
        refusals.contains("device0: which device it is here has to be said"),
        "{check}"
    );
    ensure!(check["predicted_total_ms"].is_null(), "{finished:?}");
    works_on(&vm)?;
    let finished = try_migrate(vm.control(), &place.url, &["--check"])?;
    ensure!(finished.code() == Some(1), "{finished:?}");
    for line in [
        "vm would not move to tcp://127.0.0.1:",
        "\n- here: device0: the device's driver cannot save its state\n",
        "\n- there: device0: which device it is here has to be said",
    ] {
        ensure!(finished.stdout.contains(line), "{finished:?}");
    }
    // Nobody listens: what is known here is told all the same.
    let (_, check) = ask(&vm, "tcp://127.0.0.1:1", &[])?;
    ensure!(texts(&check["blockers"]) == [expected], "{check}");
    let unknown = check["unknown"].as_str().context("nothing said")?;
    ensure!(unknown.contains("no connection"), "{unknown}");
    works_on(&vm)?;
    finish(vm)?;
    // Another VM may have the place.
    let plain = started(&ground.vm("run=heartbeat").name("plain"))?;
    runs(&moved(plain, place, &["--max-downtime", "2s"])?)
}

#[test]
fn part_of_a_gpu_that_was_claimed_for_a_check_is_free_again() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let (here, there) = (
        ModelGpu::divided(&ground, "here", "128M")?,
        ModelGpu::divided(&ground, "there", "128M")?,
    );
    let spec = ground.vm(LONG_JOB).name("vm");
    let vm = computing::start(&spec.args(&["--gpu", &here.free_part()]))?;
    let device = format!("device0={}", there.free_part());
    let place = Place::new(&ground, "there")
        .args(&["--gpu", &device])
        .start()?;
    // Where others use the CPUs, too, what was measured for a moment may be slow.
    let limit = ["--max-downtime", "120s"];
    for _ in 0..2 {
        let (_, check) = ask(&vm, &place.url, &limit)?;
        ensure!(check["would_move"] == true, "{check}");
        ensure!(check["device_bytes"].as_u64() > Some(32 << 20), "{check}");
        works_on(&vm)?;
        let is_free = || (there.owners(&ground).ok()?.is_empty()).then_some(());
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        tests::harness::process::wait_until(deadline, is_free).context("it is still claimed")?;
    }
    let moved = moved(vm, place, &limit)?;
    assert_eq!(there.owners(&ground)?, ["there"]);
    assert_eq!(here.owners(&ground)?, [""; 0]);
    works_on(&moved)?;
    finish(moved)
}

#[test]
fn another_version_of_the_driver_there_is_named_before_anything_moves() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let (here, there) = (
        ModelGpu::divided(&ground, "here", "128M")?,
        ModelGpu::divided(&ground, "there", "128M")?,
    );
    let version = |model: &ModelGpu, text: &str| {
        let module = model.place().join("module/model_gpu/version");
        std::fs::write(module, text).context("the driver's version")
    };
    version(&here, "2.1\n")?;
    version(&there, "2.0\n")?;
    let spec = ground.vm(LONG_JOB).name("vm");
    let vm = computing::start(&spec.args(&["--gpu", &here.free_part()]))?;
    let device = format!("device0={}", there.free_part());
    let place = Place::new(&ground, "there").args(&["--gpu", &device]);
    let place = place.start()?;
    let limit = ["--max-downtime", "5s"];
    let (_, check) = ask(&vm, &place.url, &limit)?;
    let refusals = texts(&check["refusals"]).join("\n");
    let named = refusals.contains(" 2.1, the one here of driver ");
    ensure!(named && refusals.ends_with(" 2.0"), "{check}");
    // The same on both hosts, and the same destination takes it.
    version(&there, "2.1\n")?;
    let moved = moved(vm, place, &limit)?;
    works_on(&moved)?;
    finish(moved)
}
