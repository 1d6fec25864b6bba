//! Live migration of VMs with assigned GPUs (`docs/gpu-migration.md`): the guest computes on, on
//! another device, with what the first one had.
//!
//! `DROVER_GPU_MIGRATIONS=50` makes the chain longer, `DROVER_GPU_VRAM_MIB=2048` its video memory larger.

use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::harness::computing::{self, LONG_JOB, finish, works_on};
use tests::harness::ground::Ground;
use tests::harness::model_gpu::ModelGpu;
use tests::harness::moving::{Place, migrate, reason_not_moved, repetitions, try_migrate};
use tests::harness::process;
use tests::harness::vm::{SOON, Vm};

type Outcome = anyhow::Result<()>;

/// Video memory has to come over while the VM stands still.
const LONG: [&str; 2] = ["--max-downtime", "5s"];

/// Of guests that are given no other memory.
const MEMORY_PAGES: u64 = (64 << 20) / 4096;

/// A VM whose guest computes on all of `gpus`, each result checked, after the first.
fn at_work(ground: &Ground, name: &str, gpus: &[&ModelGpu]) -> anyhow::Result<Vm> {
    let devices = gpus.iter();
    let devices: Vec<_> = devices
        .flat_map(|gpu| ["--device".to_owned(), gpu.device()])
        .collect();
    computing::start(&ground.vm(LONG_JOB).name(name).args(&devices))
}

/// A place where devices are these GPUs.
fn place<'a>(ground: &'a Ground, name: &str, gpus: &[&ModelGpu]) -> Place<'a> {
    let devices = (0..).zip(gpus);
    let devices: Vec<_> = devices
        .flat_map(|(number, gpu)| {
            let device = format!("device{number}={}", gpu.device());
            ["--device".to_owned(), device]
        })
        .collect();
    Place::new(ground, name).args(&devices)
}

fn hop(place: &Place<'_>, vm: Vm) -> anyhow::Result<(Vm, Value)> {
    hop_with(place, vm, &LONG)
}

fn hop_with(place: &Place<'_>, mut vm: Vm, arguments: &[&str]) -> anyhow::Result<(Vm, Value)> {
    let place = place.start()?;
    let report = migrate(vm.control(), &place.url, arguments)?;
    let status = vm.wait_exit(SOON)?;
    ensure!(status.code() == Some(0), "the source ended with {status}");
    Ok((place.vm, report))
}

#[test]
fn computations_go_on_through_many_moves() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vram_mib = repetitions("DROVER_GPU_VRAM_MIB", 64)?;
    let vram = format!("{vram_mib}M");
    let mut gpu = ModelGpu::on(&ground, "gpu", &vram)?;
    let mut vm = at_work(&ground, "vm", &[&gpu])?;
    for number in 1..=repetitions("DROVER_GPU_MIGRATIONS", 5)? {
        let next = ModelGpu::on(&ground, &format!("gpu{number}"), &vram)?;
        let place = place(&ground, &format!("vm{number}"), &[&next]);
        let (moved, report) = hop_with(&place, vm, &["--max-downtime", "60s"])
            .with_context(|| format!("move {number}"))?;
        let pages = report["blackout"]["pages"].as_u64();
        // The device says which it has written.
        ensure!(
            pages.is_some_and(|pages| pages < MEMORY_PAGES / 4),
            "{report}"
        );
        let vram_bytes = u64::from(vram_mib) << 20;
        ensure!(
            report["device_bytes"].as_u64() > Some(vram_bytes),
            "{report}"
        );
        vm = moved;
        works_on(&vm).with_context(|| format!("after move {number}"))?;
        // The one before serves nobody any more.
        drop(std::mem::replace(&mut gpu, next));
    }
    finish(vm)
}

#[test]
fn video_memory_comes_over_while_the_gpu_computes() -> Outcome {
    const VRAM: u64 = 256 << 20;
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = |name: &str| {
        let options = ["--vram", "256M", "--pre-copy", "on"];
        ModelGpu::with(&ground, name, &options)
    };
    let mut gpus = vec![gpu("gpu")?];
    let mut vm = at_work(&ground, "vm", &[&gpus[0]])?;
    for number in 1..=3 {
        let next = gpu(&format!("gpu{number}"))?;
        let place = place(&ground, &format!("vm{number}"), &[&next]);
        // All of video memory would not fit into that.
        let (moved, report) = hop_with(&place, vm, &["--max-downtime", "50ms"])?;
        let sent = |report: &Value| report["device_bytes"].as_u64();
        ensure!(sent(&report) > Some(VRAM), "{report}");
        let last = sent(&report["blackout"]).context("device_bytes")?;
        ensure!((1..VRAM / 50).contains(&last), "{report}");
        vm = moved;
        works_on(&vm).with_context(|| format!("after move {number}"))?;
        gpus.push(next);
    }
    finish(vm)
}

#[test]
fn gpus_of_one_vm_move_together() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = |name: &str, vram: &str| ModelGpu::on(&ground, name, vram);
    let (small, large) = (gpu("small", "64M")?, gpu("large", "256M")?);
    let there = (gpu("small-there", "64M")?, gpu("large-there", "256M")?);
    let vm = at_work(&ground, "vm", &[&small, &large])?;
    let place = place(&ground, "there", &[&there.0, &there.1]);
    let (moved, _) = hop(&place, vm)?;
    works_on(&moved)?;
    finish(moved)
}

#[test]
fn devices_that_do_not_fit_are_refused_before_anything_moves() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let other = ModelGpu::on(&ground, "other", "128M")?;
    let vm = at_work(&ground, "vm", &[&gpu])?;
    let nowhere = "device0: which device it is here has to be said: --device device0=vfio=BDF, \
                   --device device0=vfio-user=SOCKET or --gpu device0=auto";
    let smaller = "device0: the source's is BAR 0 of 0x1000 bytes, BAR 2 of 0x2000 bytes, BAR 4 of \
                   0x4000000 bytes, the one here BAR 0 of 0x1000 bytes, BAR 2 of 0x2000 bytes, BAR 4 \
                   of 0x8000000 bytes";
    let still = ModelGpu::with(&ground, "still", &["--migration", "off"])?;
    let places = [
        (Place::new(&ground, "nowhere"), nowhere),
        (place(&ground, "larger", &[&other]), smaller),
        (
            place(&ground, "immobile", &[&still]),
            "device0: the device's driver cannot save its state",
        ),
    ];
    for (place, expected) in places {
        let place = place.start()?;
        let finished = try_migrate(vm.control(), &place.url, &LONG)?;
        let reason = reason_not_moved(&finished, "vm")?;
        ensure!(reason.contains(expected), "{reason}");
        works_on(&vm)?;
    }
    let fit = ModelGpu::on(&ground, "fit", "64M")?;
    let later = place(&ground, "later", &[&fit]).start()?;
    let arguments = [&LONG[..], &["--on-timeout", "postcopy"]].concat();
    let finished = try_migrate(vm.control(), &later.url, &arguments)?;
    let reason = reason_not_moved(&finished, "vm")?;
    let expected = "post-copy is not possible: its assigned devices cannot wait for pages";
    ensure!(reason.contains(expected), "{reason}");
    works_on(&vm)?;
    finish(vm)
}

#[test]
fn a_part_that_is_free_there_is_taken_and_the_one_here_given_back() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let (here, there) = (
        ModelGpu::divided(&ground, "here", "128M")?,
        ModelGpu::divided(&ground, "there", "128M")?,
    );
    let spec = ground.vm(LONG_JOB).name("vm");
    let vm = computing::start(&spec.args(&["--gpu", &here.free_part()]))?;
    assert_eq!(here.owners(&ground)?, ["vm"]);
    let device = format!("device0={}", there.free_part());
    let place = Place::new(&ground, "moved").args(&["--gpu", &device]);
    let (moved, _) = hop(&place, vm)?;
    works_on(&moved)?;
    assert_eq!(here.owners(&ground)?, [""; 0]);
    assert_eq!(there.owners(&ground)?, ["moved"]);
    finish(moved)
}

#[test]
fn a_device_without_a_log_has_written_all_of_memory() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::with(&ground, "gpu", &["--dma-log", "off"])?;
    let there = ModelGpu::on(&ground, "gpu-there", "64M")?;
    let vm = at_work(&ground, "vm", &[&gpu])?;
    let (moved, report) = hop(&place(&ground, "there", &[&there]), vm)?;
    let pages = report["blackout"]["pages"].as_u64();
    ensure!(
        pages.is_some_and(|pages| pages > MEMORY_PAGES * 3 / 4),
        "{report}"
    );
    works_on(&moved)?;
    finish(moved)
}

/// Moves a VM several times whose results wait in memory most of the time, written by the device alone;
/// whether all came over.
fn results_survive(ground: &Ground, dma_log: &str) -> anyhow::Result<bool> {
    let gpu = |number: u32| {
        let options = ["--vram", "2M", "--dma-log", dma_log];
        ModelGpu::with(ground, &format!("{dma_log}{number}"), &options)
    };
    let mut gpus = vec![gpu(0)?];
    let cmdline = "run=gpu,heartbeat gpu.job=long gpu.words=64K gpu.rounds=1 gpu.poll_ms=50 \
                   gpu.progress_ms=0";
    let spec = ground.vm(cmdline).name(&format!("{dma_log}0"));
    let mut vm = computing::start(&spec.args(&["--device", &gpus[0].device()]))?;
    for number in 1..=5 {
        let next = gpu(number)?;
        let place = place(ground, &format!("{dma_log}{number}"), &[&next]);
        // So slow that the device writes each page again after it was sent.
        vm = hop_with(&place, vm, &[&LONG[..], &["--bandwidth", "2M"]].concat())?.0;
        gpus.push(next);
        let ram = vm.memory()?;
        let jobs = ram.heartbeat()?.progress;
        let end = ram.wait_heartbeat(SOON, |beat| beat.command != 1 || beat.progress > jobs + 1);
        if end.is_err() || ram.heartbeat()?.command != 1 {
            return Ok(false);
        }
    }
    finish(vm)?;
    Ok(true)
}

#[test]
fn writes_that_a_device_keeps_to_itself_are_lost_and_no_others() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    ensure!(results_survive(&ground, "on")?, "a write was lost");
    ensure!(
        !results_survive(&ground, "lossy")?,
        "nobody has missed them"
    );
    Ok(())
}

#[test]
fn a_gpu_that_dies_there_leaves_the_vm_computing_here() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let gpu = ModelGpu::on(&ground, "gpu", "64M")?;
    let there = ModelGpu::on(&ground, "gpu-there", "64M")?;
    let vm = at_work(&ground, "vm", &[&gpu])?;
    let place = place(&ground, "there", &[&there]).start()?;
    // So slow that its state is under way for long.
    let arguments = ["--max-downtime", "60s", "--bandwidth", "4M"];
    let finished = std::thread::scope(|scope| {
        let moving = scope.spawn(|| try_migrate(vm.control(), &place.url, &arguments));
        let begun = || (phase(&vm).ok()? == "switchover").then_some(());
        process::wait_until(Instant::now() + SOON, begun).context("it did not begin")?;
        there.signal(libc::SIGKILL)?;
        moving.join().map_err(|_| anyhow::anyhow!("panicked"))?
    })?;
    let reason = reason_not_moved(&finished, "vm")?;
    ensure!(reason.contains("device0"), "{reason}");
    works_on(&vm)?;
    // And it can be tried again.
    let again = ModelGpu::on(&ground, "again", "64M")?;
    let (moved, _) = hop(&self::place(&ground, "second", &[&again]), vm)?;
    works_on(&moved)?;
    finish(moved)
}

/// Where the migration under way is.
fn phase(vm: &Vm) -> anyhow::Result<Value> {
    let status = vm.control().curl("GET", "/v1/migration")?.json()?;
    Ok(status["progress"]["phase"].clone())
}
