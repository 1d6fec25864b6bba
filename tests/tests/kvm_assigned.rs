//! Assigned devices on KVM: guests that compute on model GPUs (`docs/model-gpu.md`).

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::harness::computing::{self, LONG_JOB, finish, works_on};
use tests::harness::ground::Ground;
use tests::harness::model_gpu::{ModelGpu, user_device};
use tests::harness::moving::{Place, reason_not_moved, try_migrate};
use tests::harness::process;
use tests::harness::report::Report;
use tests::harness::slots::time_to_show;
use tests::harness::vm::{LATER, SOON, Vm};

type Outcome = anyhow::Result<()>;

const MIB: u64 = 1 << 20;

/// Why a device cannot move whose state cannot be taken.
const BLOCKED: &str = "the device's driver cannot save its state";

fn mmio_exits(vm: &Vm) -> anyhow::Result<u64> {
    let samples = vm.control().json("metrics")?;
    let mut samples = samples.as_array().into_iter().flatten();
    let found = samples.find(|sample| sample["name"] == "vcpu_mmio_exits_total");
    let value = found.and_then(|sample| sample["value"].as_u64());
    value.context("exits are not counted")
}

/// What the guest said of every GPU that it has computed on once.
fn verdicts(reports: Vec<Report>) -> Vec<Report> {
    let is_verdict = |report: &Report| report.get("event") == Some("device");
    reports.into_iter().filter(is_verdict).collect()
}

/// A VM at work, after its first result.
fn at_work(ground: &Ground, gpu: &ModelGpu, more: &str) -> anyhow::Result<Vm> {
    let spec = ground.vm(&format!("{LONG_JOB} {more}"));
    computing::start(&spec.args(&["--device", &gpu.device()]))
}

#[test]
fn guest_computes_on_its_gpus_asleep_until_their_interrupts() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let small = ModelGpu::on(&ground, "small", "64M")?;
    let large = ModelGpu::on(&ground, "large", "2G")?;
    for gpus in [vec![(&small, 64)], vec![(&small, 64), (&large, 2048)]] {
        let arguments = gpus
            .iter()
            .flat_map(|(gpu, _)| ["--device".to_owned(), gpu.device()]);
        let arguments: Vec<_> = arguments.collect();
        let ended = ground.vm("run=gpu").args(&arguments).run(LATER)?;
        ended.check()?;
        let seen = verdicts(ended.reports());
        assert_eq!(seen.len(), gpus.len(), "{ended:?}");
        for (verdict, (_, mib)) in seen.iter().zip(gpus) {
            assert_eq!(verdict.get("verdict"), Some("ok"), "{verdict:?}");
            assert_eq!(verdict.number("vram_bytes")?, mib * MIB);
            assert_eq!(verdict.number("interrupts")?, 1);
        }
    }
    Ok(())
}

/// As long as KVM takes for so much, once, and no longer: the guest is given a window for it, and nobody
/// touches all of it.
#[test]
fn bar_of_128_gib_does_not_slow_the_boot_down() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let time = |name: &str, vram: &str, mib: u64| -> anyhow::Result<Duration> {
        let gpu = ModelGpu::on(&ground, name, vram)?;
        let begin = Instant::now();
        let spec = ground.vm("run=gpu").args(&["--device", &gpu.device()]);
        let ended = spec.run(LATER)?;
        let took = begin.elapsed();
        ended.check()?;
        let seen = verdicts(ended.reports());
        assert_eq!(seen.len(), 1, "{ended:?}");
        assert_eq!(seen[0].get("verdict"), Some("ok"), "{ended:?}");
        assert_eq!(seen[0].number("vram_bytes")?, mib * MIB);
        Ok(took)
    };
    let mut rounds = Vec::new();
    for round in 0..5 {
        let small = time(&format!("small-{round}"), "64M", 64)?;
        let large = time(&format!("large-{round}"), "128G", 128 << 10)?;
        let kernel = time_to_show(128 << 30)?;
        rounds.push((large, small, kernel));
    }
    // The best of them: others are at work on this machine, too.
    let is_quick = rounds.iter().any(|(large, small, kernel)| {
        let more = large.saturating_sub(*small);
        more < *kernel * 2 + *small / 2
    });
    println!("128 GiB, 64 MiB, the kernel's part: {rounds:?}");
    ensure!(is_quick, "128 GiB, 64 MiB, the kernel's part: {rounds:?}");
    Ok(())
}

#[test]
fn video_memory_is_the_guests_without_exits() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    const JOBS: u64 = 40;
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let vm = at_work(&ground, &gpu, "gpu.rounds=1 gpu.poll_ms=10")?;
    let ram = vm.memory()?;
    let before = ram.heartbeat()?.progress;
    let exits_before = mmio_exits(&vm)?;
    ram.wait_heartbeat(SOON, |beat| beat.progress >= before + JOBS)?;
    let exits = mmio_exits(&vm)? - exits_before;
    let jobs = ram.heartbeat()?.progress - before;
    // A job looks at its result in 259 places, and accesses registers about three times.
    assert!(exits > 0, "registers are trapped");
    assert!(exits < jobs * 60, "{exits} exits in {jobs} jobs");
    finish(vm)
}

#[test]
fn assigned_device_is_listed_with_why_it_cannot_move_and_its_vm_stays() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::with(&ground, "gpu", &["--migration", "off"])?;
    let mut vm = at_work(&ground, &gpu, "gpu.progress_ms=10")?;
    let name = "device0";
    let seen = vm.control().device(name)?;
    assert_eq!(seen["kind"], "vfio-user");
    assert_eq!(seen["host"], gpu.place().display().to_string());
    assert_eq!(seen["migration_blocked"], BLOCKED);
    // The guest has it where the list says that it is.
    let address = seen["address"].as_str().context("no address")?;
    let short = address.strip_prefix("0000:").unwrap_or(address);
    let said = format!(" gpu={short} ");
    let line = |line: &str| line.contains(&said).then_some(());
    vm.console.wait_line(SOON, line).context(short.to_owned())?;
    let text = ground.run_drover(&["device", "list", "vm"])?.success()?;
    assert_eq!(text, vm.control().drover("devices", &[])?);
    let line = text.lines().find(|line| line.starts_with(name));
    let line = line.context("not in the table")?;
    for word in ["vfio-user", address, &format!("no: {BLOCKED}")] {
        ensure!(line.contains(word), "no {word:?} in {line}");
    }
    let text = ground
        .run_drover(&["device", "list", "vm", "--json"])?
        .success()?;
    let devices: Value = serde_json::from_str(&text)?;
    assert_eq!(devices, vm.control().json("devices")?);

    let place = Place::new(&ground, "there").start()?;
    let finished = try_migrate(vm.control(), &place.url, &[])?;
    let expected = format!("the VM cannot be moved: {name}: {BLOCKED}");
    assert_eq!(reason_not_moved(&finished, "vm")?, expected);
    assert_eq!(place.vm.control().state()?, "receiving");
    works_on(&vm)?;
    let folder = ground.scratch().join("snapshot");
    let folder_text = folder.display().to_string();
    let finished = vm.control().try_drover("snapshot", &[&folder_text])?;
    ensure!(finished.code() == Some(1), "{finished:?}");
    ensure!(
        finished.stderr.contains(&format!("{name}: {BLOCKED}")),
        "{finished:?}"
    );
    ensure!(!folder.exists(), "something was written");
    works_on(&vm)?;
    finish(vm)
}

/// The result of the next command `gpu`, whatever it is.
fn gpu_result(vm: &mut Vm) -> anyhow::Result<Report> {
    vm.console.wait_line(SOON, |line| {
        let report = Report::from_line(line)?;
        (report.subject() == "command=gpu" && report.is_final()).then_some(report)
    })
}

/// A VM whose server gets `signal` while it computes: guest and operator hear of it, and nobody
/// hangs.
fn server_is_lost(signal: libc::c_int) -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let mut vm = at_work(&ground, &gpu, "")?;
    let mut events = vm.control().follow_events()?;
    gpu.signal(signal)?;
    let lost = events.wait("device-backend-lost", SOON)?;
    assert_eq!(lost["device"], "device0");
    let reason = lost["reason"].as_str().context("no reason")?;
    let socket = gpu.place().display().to_string();
    ensure!(reason.contains(&socket), "{reason}");
    let failed = gpu_result(&mut vm)?;
    // All bits set: what is read where nothing answers.
    assert_eq!(failed.get("reason"), Some("gpu-error"), "{failed:?}");
    assert_eq!(failed.number("error")?, u64::from(u32::MAX));
    let ram = vm.memory()?;
    ram.wait_heartbeat(SOON, |beat| beat.command == 2)?;
    ram.wait_beat(SOON)?;
    assert_eq!(vm.control().state()?, "running");
    vm.control().device("device0")?;
    vm.control().post("/v1/pause")?;
    vm.control().post("/v1/resume")?;
    ram.wait_beat(SOON)?;
    // The next guest finds a device that does not answer.
    vm.control().drover("reset", &[])?;
    assert_eq!(gpu_result(&mut vm)?.get("result"), Some("fail"));
    ram.wait_heartbeat(SOON, |beat| beat.alive && beat.command == 2)?;
    vm.type_text("s")?;
    let ended = vm.wait_end(SOON)?;
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    ensure!(!ended.messages.contains("panicked"), "{ended:?}");
    Ok(())
}

#[test]
fn vm_goes_on_when_the_server_dies_at_work() -> Outcome {
    server_is_lost(libc::SIGKILL)
}

#[test]
fn vm_goes_on_when_the_server_is_stuck_at_work() -> Outcome {
    server_is_lost(libc::SIGSTOP)
}

/// A notice of the host's is no loss: the device works on.
#[test]
fn vm_goes_on_when_its_device_reports_an_error() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let failing = ModelGpu::on(&ground, "failing", "64M")?;
    let sound = ModelGpu::on(&ground, "sound", "64M")?;
    let spec = ground.vm("run=gpu,heartbeat gpu.job=long gpu.words=1K gpu.progress_ms=0");
    let mut arguments = Vec::new();
    for (gpu, id) in [(&sound, "sound"), (&failing, "failing")] {
        arguments.push("--device".to_owned());
        arguments.push(format!("{},id={id}", gpu.device()));
    }
    let vm = spec.args(&arguments).start_controlled()?;
    vm.memory()?
        .wait_heartbeat(SOON, |beat| beat.command == 1 && beat.progress > 0)?;
    let before = vm.control().json("devices")?;
    let mut events = vm.control().follow_events()?;
    // Each is told, though not more often than once a second.
    for _ in 0..2 {
        failing.report_error()?;
        let failed = events.wait("device-failed", SOON)?;
        assert_eq!(failed["device"], "failing", "{failed}");
    }
    works_on(&vm)?;
    assert_eq!(vm.control().state()?, "running");
    assert_eq!(vm.control().json("devices")?, before);
    vm.control().post("/v1/pause")?;
    vm.control().post("/v1/resume")?;
    works_on(&vm)?;
    let names = vm.control().event_names()?;
    let count = names.iter().filter(|name| *name == "device-failed").count();
    assert_eq!(count, 2, "{names:?}");
    ensure!(
        !names.iter().any(|name| name == "device-backend-lost"),
        "{names:?}"
    );
    finish(vm)
}

#[test]
fn next_vm_has_the_device_and_nothing_of_the_last_ones_memory() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let spec = ground.vm("run=heartbeat,gpu,heartbeat");
    let spec = spec.args(&["--device", &gpu.device()]);
    let mut seen: Vec<File> = Vec::new();
    for round in 0..3 {
        let mut vm = spec.start_controlled()?;
        vm.memory()?.wait_beat(SOON)?;
        // Before the guest's driver has touched it: it would clear it.
        let memory = gpu.video_memory()?;
        let number = memory.metadata()?.ino();
        for earlier in &seen {
            ensure!(earlier.metadata()?.ino() != number, "the same memory");
        }
        let mut bytes = vec![0xff; usize::try_from(64 * MIB)?];
        memory.read_exact_at(&mut bytes, 0)?;
        ensure!(
            bytes.iter().all(|byte| *byte == 0),
            "round {round}: something is left"
        );
        vm.type_text("s")?;
        vm.result("gpu")?;
        // What the guest leaves: a result at the start, its filling at the end.
        for offset in [0, 64 * MIB - 8] {
            let mut word = [0; 8];
            memory.read_exact_at(&mut word, offset)?;
            assert_ne!(word, [0; 8], "nothing at {offset:#x}");
        }
        seen.push(memory);
        match round {
            0 => vm.kill()?,
            _ => {
                vm.type_text("s")?;
                vm.wait_end(SOON)?.check()?;
            }
        }
    }
    Ok(())
}

#[test]
fn device_that_another_vm_has_is_refused_in_time() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let vm = at_work(&ground, &gpu, "")?;
    let second = ground
        .vm("run=gpu")
        .name("second")
        .args(&["--device", &gpu.device()]);
    let finished = process::run(ground.drover().args(second.arguments()), SOON)?;
    assert_eq!(finished.code(), Some(1), "{finished:?}");
    let message = finished.stderr.lines().next_back().context("no word")?;
    let socket = gpu.place().display().to_string();
    for word in ["device0: ", &socket] {
        ensure!(message.contains(word), "no {word:?} in {message}");
    }
    works_on(&vm)?;
    finish(vm)
}

#[test]
fn devices_that_are_none_are_refused_by_name() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let missing = ground.scratch().join("missing");
    let closing = ground.scratch().join("closing");
    let listener = UnixListener::bind(&closing)?;
    let closer = std::thread::spawn(move || listener.accept().map(drop));
    // It takes connections, as far as the kernel does that for it, and says nothing.
    let silent = ground.scratch().join("silent");
    let _listener = UnixListener::bind(&silent)?;
    let path = |path: &Path| path.display().to_string();
    let gone = "it has closed the connection";
    for (device, name, why) in [
        (
            user_device(&missing),
            path(&missing),
            "No such file or directory",
        ),
        (user_device(&closing), path(&closing), gone),
        (
            user_device(&silent),
            path(&silent),
            "no answer to VERSION within 5s",
        ),
        (
            "vfio=0000:99:00.0".to_owned(),
            "0000:99:00.0".to_owned(),
            "there is no device",
        ),
    ] {
        let spec = ground.vm("run=hello").args(&["--device", &device]);
        let finished = process::run(ground.drover().args(spec.arguments()), SOON)?;
        assert_eq!(finished.code(), Some(1), "{finished:?}");
        ensure!(!finished.stderr.contains("panicked"), "{finished:?}");
        let message = finished.stderr.lines().next_back().context("no word")?;
        ensure!(message.starts_with("drover: VM vm: "), "{message}");
        for word in ["device0: ", &name, why] {
            ensure!(message.contains(word), "no {word:?} in {message}");
        }
        assert_eq!(ground.runtime_files(), [""; 0]);
    }
    closer.join().expect("it only accepts")?;
    Ok(())
}

#[test]
fn device_options_that_do_not_go_together_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let misconfigured = |arguments: &[&str]| ground.vm("run=hello").args(arguments).misconfigured();
    let message = misconfigured(&["--device", "vfio=0000:99:00.0", "--balloon", "size=0"])?;
    ensure!(message.contains("balloon"), "{message}");
    ensure!(message.contains("device[0]"), "{message}");
    let message = misconfigured(&["--device", "vfio-user=/tmp/gpu,iommufd=on"])?;
    ensure!(message.contains("device[0].iommufd"), "{message}");
    let message = misconfigured(&[
        "--device",
        "vfio-user=/tmp/gpu",
        "--device",
        "vfio-user=/tmp/gpu",
    ])?;
    ensure!(message.contains("/tmp/gpu"), "{message}");
    ensure!(message.contains("twice"), "{message}");
    Ok(())
}

#[test]
fn guest_computes_again_after_every_reset_in_the_middle_of_it() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let mut vm = at_work(&ground, &gpu, "")?;
    let address = vm.control().device("device0")?["address"].clone();
    vm.ready()?;
    let mut before = None;
    for _ in 0..3 {
        vm.control().drover("reset", &[])?;
        vm.ready()?;
        let ram = vm.memory()?;
        ram.wait_heartbeat(SOON, |beat| beat.command == 1 && beat.progress > 1)?;
        match &before {
            None => before = Some(vm.process().taken()?),
            Some(before) => assert_eq!(*before, vm.process().taken()?),
        }
        assert_eq!(vm.control().device("device0")?["address"], address);
    }
    finish(vm)
}
