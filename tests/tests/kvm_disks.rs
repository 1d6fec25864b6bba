//! Disks on KVM: raw and qcow2 images, their locks, hosts that fail.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use tests::harness::ground::Ground;
use tests::harness::image::{self, qemu_img, try_qemu_img};
use tests::harness::process;
use tests::harness::report::Report;
use tests::harness::vm::{LATER, SOON, Vm, VmSpec};

type Outcome = anyhow::Result<()>;

const MIB: u64 = 1 << 20;

/// A disk's argument, with further keys.
fn disk(path: &Path, keys: &str) -> [String; 2] {
    [
        "--disk".to_owned(),
        format!("path={}{keys}", path.display()),
    ]
}

/// Runs a guest to its good end; the results of its `blk` commands.
fn run_blk(spec: &VmSpec<'_>) -> anyhow::Result<Vec<Report>> {
    let ended = spec.run(LATER)?;
    ended.check()?;
    Ok(ended.results("blk"))
}

#[test]
fn raw_image_holds_what_the_guest_wrote_whatever_the_engine() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (engine, seed) in [
        ("", 1),
        (",aio=io-uring", 2),
        (",aio=threads", 3),
        (",aio=threads,direct", 4),
        (",direct", 5),
        (",queues=2,queue-size=128", 6),
    ] {
        let path = ground.scratch().join("disk.raw");
        image::new_raw(&path, 16 * MIB)?;
        let keys = format!("{engine},serial=drover-{seed}");
        let cmdline = format!("run=blk blk.len=4M blk.seed={seed} blk.offset=1M");
        let spec = ground.vm(&cmdline).cpus("2").args(&disk(&path, &keys));
        let results = run_blk(&spec).with_context(|| keys.clone())?;
        let result = &results[0];
        assert_eq!(result.number("capacity")?, 16 * MIB, "{keys}");
        assert_eq!(result.get("id"), Some(format!("drover-{seed}").as_str()));
        assert_eq!(result.get("discard"), Some("ok"), "{keys}");
        assert_eq!(result.get("write_zeroes"), Some("ok"), "{keys}");
        image::check_pattern(&path, (MIB, 5 * MIB), seed).context(keys)?;
    }
    Ok(())
}

#[test]
fn every_queue_of_a_disk_works() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, 16 * MIB)?;
    let cmdline = "run=blk,blk,blk,blk blk.len=1M 2.queue=1 2.offset=1M 3.queue=2 3.offset=2M \
                   4.queue=3 4.offset=3M";
    let spec = ground.vm(cmdline).args(&disk(&path, ",queues=4"));
    let results = run_blk(&spec)?;
    for result in &results {
        assert_eq!(result.number("queues")?, 4, "{result:?}");
    }
    image::check_pattern(&path, (0, 4 * MIB), 1)
}

#[test]
fn read_only_disk_gives_its_content_and_takes_none() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, 4 * MIB)?;
    image::write_pattern(&path, 4 * MIB, 9)?;
    let before = std::fs::metadata(&path)?.modified()?;
    // The guest verifies first; then it tries to write.
    let cmdline = "run=blk,blk blk.seed=9 1.op=verify 2.op=probe";
    let results = run_blk(&ground.vm(cmdline).args(&disk(&path, ",readonly")))?;
    assert_eq!(results[0].number("bad")?, 0);
    assert_eq!(results[1].get("read_only_write"), Some("refused"));
    assert_eq!(std::fs::metadata(&path)?.modified()?, before);
    image::check_pattern(&path, (0, 4 * MIB), 9)
}

#[test]
fn qcow2_image_is_sound_and_holds_what_the_guest_wrote() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (options, seed) in [
        ("cluster_size=64k", 1),
        ("cluster_size=512", 2),
        ("refcount_bits=1", 3),
        ("compat=0.10", 4),
    ] {
        let path = ground.scratch().join("disk.qcow2");
        let text = path.display().to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &text, "32M"])?;
        let cmdline = format!("run=blk,blk blk.len=4M blk.seed={seed} 2.offset=20M");
        let spec = ground.vm(&cmdline).args(&disk(&path, ",format=qcow2"));
        let results = run_blk(&spec).context(options)?;
        assert_eq!(results[0].number("capacity")?, 32 * MIB, "{options}");
        qemu_img(&["check", "-q", &text]).context(options)?;
        let raw = image::as_raw(&path)?;
        image::check_pattern(&raw, (0, 4 * MIB), seed)?;
        image::check_pattern(&raw, (20 * MIB, 24 * MIB), seed)?;
    }
    Ok(())
}

#[test]
fn qcow2_overlay_shows_its_backing_file_and_leaves_it_alone() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let base = ground.scratch().join("base.raw");
    image::new_raw(&base, 8 * MIB)?;
    image::write_pattern(&base, 8 * MIB, 5)?;
    let copy = ground.scratch().join("copy.raw");
    std::fs::copy(&base, &copy)?;
    let overlay = ground.scratch().join("overlay.qcow2");
    let text = overlay.display().to_string();
    let backing = base.display().to_string();
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &backing, "-F", "raw", &text,
    ])?;
    let cmdline = "run=blk,blk,blk 1.op=verify 1.seed=5 2.op=write 2.seed=6 2.len=2M 3.op=verify \
                   3.seed=5 3.offset=2M";
    let folder = ground.scratch().path().display();
    let keys = format!(",format=qcow2,backing-dir={folder}");
    for result in run_blk(&ground.vm(cmdline).args(&disk(&overlay, &keys)))? {
        assert_ne!(result.number("bad").unwrap_or(0), 1, "{result:?}");
    }
    qemu_img(&["check", "-q", &text])?;
    let raw = image::as_raw(&overlay)?;
    image::check_pattern(&raw, (0, 2 * MIB), 6)?;
    image::check_pattern(&raw, (2 * MIB, 8 * MIB), 5)?;
    assert!(image::same(&base, &copy)?, "the backing file was changed");
    Ok(())
}

/// A VM that writes to its disk until it is stopped.
fn writer(ground: &Ground, path: &Path, keys: &str) -> anyhow::Result<Vm> {
    let cmdline = "run=blkbench blkbench.ms=60000 blkbench.ops=randwrite blkbench.depths=8";
    let spec = ground.vm(cmdline).args(&disk(path, keys));
    let mut vm = spec.start_controlled()?;
    vm.ready()?;
    // Requests are under way.
    let ram = vm.memory()?;
    ram.wait_heartbeat(SOON, |beat| beat.progress > 100)?;
    Ok(vm)
}

#[test]
fn image_in_use_is_refused_and_its_user_named() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, 16 * MIB)?;
    let vm = writer(&ground, &path, "")?;
    let expected = format!(
        "VM second: disk0: {} is in use by process {} (drover); one image has one writer or many \
         readers",
        path.display(),
        vm.pid()
    );
    for keys in ["", ",readonly"] {
        let second = ground
            .vm("run=hello")
            .name("second")
            .args(&disk(&path, keys));
        let mut command = ground.drover();
        let finished = process::run(command.args(second.arguments()), SOON)?;
        assert_eq!(finished.code(), Some(1));
        assert_eq!(finished.stderr, format!("drover: {expected}\n"));
    }
    // QEMU's tools keep away, too.
    let text = path.display().to_string();
    let finished = try_qemu_img(&["resize", "-q", "-f", "raw", &text, "17M"])?;
    assert!(finished.stderr.contains("lock"), "{finished:?}");
    assert_eq!(vm.control().state()?, "running");
    assert_eq!(ground.runtime_files(), ["vm.lock", "vm.sock"]);
    vm.control().post("/v1/stop")?;
    vm.wait_end(SOON)?;
    run_blk(&ground.vm("run=blk blk.len=64K").args(&disk(&path, ""))).map(drop)
}

#[test]
fn readers_share_an_image_and_keep_writers_out() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, MIB)?;
    let cmdline = "run=blk,heartbeat blk.op=probe";
    let mut readers = Vec::new();
    for name in ["one", "two"] {
        let spec = ground
            .vm(cmdline)
            .name(name)
            .args(&disk(&path, ",readonly"));
        let mut vm = spec.start()?;
        vm.result("blk")?;
        readers.push(vm);
    }
    let spec = ground.vm("run=hello").name("writer").args(&disk(&path, ""));
    let mut command = ground.drover();
    let finished = process::run(command.args(spec.arguments()), SOON)?;
    assert_eq!(finished.code(), Some(1));
    assert!(
        finished.stderr.contains("is in use by process"),
        "{finished:?}"
    );
    for mut vm in readers {
        vm.type_text("s")?;
        vm.wait_end(SOON)?.check()?;
    }
    run_blk(&ground.vm("run=blk blk.len=64K").args(&disk(&path, ""))).map(drop)
}

#[test]
fn one_image_cannot_be_two_disks_of_a_vm() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, MIB)?;
    let link = ground.scratch().join("link.raw");
    std::fs::hard_link(&path, &link)?;
    let spec = ground
        .vm("run=hello")
        .args(&disk(&path, ""))
        .args(&disk(&link, ""));
    let expected = format!(
        "VM vm: disk1: {} is in use by this VM already; one image has one writer or many readers",
        link.display()
    );
    assert_eq!(spec.refused()?, expected);
    Ok(())
}

#[test]
fn killed_vm_leaves_no_lock_and_no_broken_image() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let raw = ground.scratch().join("disk.raw");
    image::new_raw(&raw, 16 * MIB)?;
    let qcow2 = ground.scratch().join("disk.qcow2");
    let text = qcow2.display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &text, "64M"])?;
    for (path, keys) in [(&raw, ""), (&qcow2, ",format=qcow2")] {
        for _ in 0..2 {
            let mut vm = writer(&ground, path, keys)?;
            vm.kill()?;
        }
        let spec = ground.vm("run=blk blk.len=1M").args(&disk(path, keys));
        run_blk(&spec).with_context(|| path.display().to_string())?;
    }
    let checked = try_qemu_img(&["check", "-q", &text])?;
    // 3: clusters that nobody uses; 2 would be damage.
    assert!([Some(0), Some(3)].contains(&checked.code()), "{checked:?}");
    Ok(())
}

#[test]
fn disk_keeps_its_content_over_resets_and_pauses_in_the_middle_of_io() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for (file, keys) in [("disk.raw", ""), ("disk.qcow2", ",format=qcow2")] {
        let path = ground.scratch().join(file);
        let text = path.display().to_string();
        let format = if keys.is_empty() { "raw" } else { "qcow2" };
        qemu_img(&["create", "-q", "-f", format, &text, "64M"])?;
        let cmdline = "run=blk,blkbench blk.len=1M blkbench.offset=8M blkbench.len=2M blkbench.ms=60000 \
                       blkbench.ops=randwrite blkbench.depths=8";
        let spec = ground.vm(cmdline).cpus("2").args(&disk(&path, keys));
        let mut vm = spec.start_controlled()?;
        let ram = vm.memory()?;
        for _ in 0..3 {
            vm.ready()?;
            assert_eq!(vm.result("blk")?.number("bad")?, 0);
            ram.wait_heartbeat(SOON, |beat| beat.command == 2 && beat.progress > 50)?;
            for _ in 0..2 {
                vm.control().post("/v1/pause")?;
                ram.check_still(Duration::from_millis(10))?;
                let written = std::fs::metadata(&path)?.modified()?;
                std::thread::sleep(Duration::from_millis(10));
                let later = std::fs::metadata(&path)?.modified()?;
                ensure!(later == written, "{file} is written during a pause");
                vm.control().post("/v1/resume")?;
                ram.wait_beat(SOON)?;
            }
            vm.control().post("/v1/reset")?;
        }
        vm.ready()?;
        assert_eq!(vm.result("blk")?.number("bad")?, 0);
        vm.control().post("/v1/stop")?;
        assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
        qemu_img(&["check", "-q", &text]).or_else(|error| match format {
            "raw" => Ok(String::new()),
            _ => Err(error),
        })?;
    }
    Ok(())
}

/// A script that mounts a small file system of its own, and becomes the program.
fn small_file_system(folder: &Path, size: &str) -> String {
    let folder = folder.display();
    format!(
        "mount -t tmpfs -o size={size} none {folder} && truncate -s 32M {folder}/disk && exec \"$@\""
    )
}

#[test]
fn full_host_disk_is_an_error_for_the_guest_and_an_event_and_can_be_mended() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    for engine in ["", ",aio=threads"] {
        let folder = ground.scratch().join("full");
        std::fs::create_dir_all(&folder)?;
        let script = small_file_system(&folder, "4M");
        let cmdline = "run=blk,heartbeat,blk blk.op=write blk.len=16M 1.seed=7 3.len=16M 3.op=all";
        let spec = ground.vm(cmdline).args(&disk(&folder.join("disk"), engine));
        let mut vm = spec.start_with(&["unshare", "--mount", "sh", "-c", &script, "sh"])?;
        let failed = vm.console.wait_line(SOON, |line| {
            let report = Report::from_line(line)?;
            (report.subject() == "command=blk" && report.is_final()).then_some(report)
        })?;
        assert_eq!(failed.get("result"), Some("fail"), "{failed:?}");
        let mut events = vm.control().follow_events()?;
        let event = events.wait("device-io-error", SOON)?;
        assert_eq!(event["device"], "disk0", "{event}");
        assert_eq!(event["operation"], "write", "{event}");
        assert_eq!(
            event["error"], "No space left on device (os error 28)",
            "{event}"
        );
        let offset = event["offset"].as_u64().context("no offset")?;
        assert!(offset <= 4 * MIB, "{event}");
        assert_eq!(vm.control().state()?, "running");
        vm.memory()?.wait_beat(SOON)?;
        // The operator makes room; the guest tries again.
        let mut mend = std::process::Command::new("nsenter");
        mend.args(["--mount", "--target", &vm.pid().to_string()]);
        mend.args(["mount", "-o", "remount,size=64M"]).arg(&folder);
        process::run(&mut mend, SOON)?.success()?;
        vm.type_text("s")?;
        let ended = vm.wait_end(SOON)?;
        assert_eq!(ended.code(), Some(0), "{ended:?}");
        assert_eq!(ended.results("blk")[1].number("bad")?, 0, "{engine}");
        assert!(!ended.messages.contains("panicked"), "{}", ended.messages);
    }
    Ok(())
}

#[test]
fn image_that_shrinks_under_the_guest_is_an_error_for_the_guest() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, 8 * MIB)?;
    image::write_pattern(&path, 8 * MIB, 1)?;
    let cmdline = "run=blk,heartbeat,blk blk.op=verify blk.len=8M";
    let spec = ground.vm(cmdline).args(&disk(&path, ",readonly"));
    let mut vm = spec.start()?;
    vm.result("blk")?;
    std::fs::File::options()
        .write(true)
        .open(&path)?
        .set_len(MIB)?;
    vm.type_text("s")?;
    let ended = vm.wait_end(SOON)?;
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    let results = ended.results("blk");
    assert_eq!(results[1].get("result"), Some("fail"), "{ended:?}");
    Ok(())
}

/// Images that are none, and messages.
#[test]
fn what_is_no_disk_is_refused_by_name() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let scratch = ground.scratch();
    let odd = scratch.write("odd.raw", vec![0; 1000])?;
    let empty = scratch.write("empty.raw", "")?;
    let text = scratch.write("text.qcow2", "not an image, but long enough".repeat(100))?;
    let qcow2 = scratch.join("declared.raw");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        &qcow2.display().to_string(),
        "1M",
    ])?;
    let length = std::fs::metadata(&qcow2)?.len().next_multiple_of(512);
    std::fs::File::options()
        .write(true)
        .open(&qcow2)?
        .set_len(length)?;
    let missing = scratch.join("missing.raw");
    let cases = [
        (
            &missing,
            "",
            "cannot be opened, create it first: truncate -s 10G FILE: No such file or directory \
             (os error 2)",
        ),
        (
            &odd,
            "",
            "has 1000 bytes, a disk has a multiple of 512 and at least one; round it up with: truncate -s %512 ",
        ),
        (
            &empty,
            "",
            "has 0 bytes, a disk has a multiple of 512 and at least one; ",
        ),
        (
            &qcow2,
            "",
            "begins like a qcow2 image but is declared raw: add format=qcow2",
        ),
        (&text, ",format=qcow2", "is not a qcow2 image"),
    ];
    for (path, keys, expected) in cases {
        let message = ground.vm("run=hello").args(&disk(path, keys)).refused()?;
        let start = format!("VM vm: disk0: {}", path.display());
        assert!(message.starts_with(&start), "{message}");
        assert!(message.contains(expected), "{expected} in {message}");
    }
    let folder = scratch.path().to_owned();
    let message = ground.vm("run=hello").args(&disk(&folder, "")).refused()?;
    let expected = format!(
        "VM vm: disk0: {} is a directory, not a disk image or block device",
        folder.display()
    );
    assert_eq!(message, expected);
    Ok(())
}

#[test]
fn rate_limit_of_a_disk_is_kept() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, 16 * MIB)?;
    // 4 MiB beyond the burst at 4 MiB/s.
    let keys = ",bytes-per-second=4M,bytes-burst=1M";
    let cmdline = "run=blk blk.op=write blk.len=5M";
    let results = run_blk(&ground.vm(cmdline).args(&disk(&path, keys)))?;
    let us = results[0].number("write_us")?;
    println!("5 MiB at 4 MiB/s with 1 MiB at once: {us} us");
    assert!(us > 700_000, "{us} us");
    Ok(())
}

#[test]
fn disks_counters_count_what_the_guest_did() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let path = ground.scratch().join("disk.raw");
    image::new_raw(&path, 16 * MIB)?;
    let cmdline = "run=blk,heartbeat blk.op=write blk.len=4M blk.bs=64K";
    let mut vm = ground.vm(cmdline).args(&disk(&path, ",id=data")).start()?;
    vm.result("blk")?;
    let counters = vm.control().json("metrics")?;
    let value = |name: &str| {
        let samples = counters.as_array().into_iter().flatten();
        let mut found = samples.filter(|s| s["source"] == "data" && s["name"] == name);
        found.next().and_then(|sample| sample["value"].as_u64())
    };
    assert_eq!(
        value("block_written_bytes_total"),
        Some(4 * MIB),
        "{counters}"
    );
    assert_eq!(value("block_writes_total"), Some(64));
    assert_eq!(value("block_flushes_total"), Some(1));
    assert_eq!(value("block_errors_total"), Some(0));
    Ok(())
}
