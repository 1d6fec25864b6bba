//! Snapshots: taken of guests that work, restored at once or bit by bit, damaged, interrupted.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use migration::snapshot::Manifest;
use serde_json::Value;
use tests::harness::control::Control;
use tests::harness::ground::Ground;
use tests::harness::process;
use tests::harness::vm::{LATER, SOON, Vm};

type Outcome = anyhow::Result<()>;

/// Writes half a gigabyte a second, and remembers everything.
const BUSY: &str = "run=dirty dirty.dirty_len=32M dirty.rate_mib_s=500 dirty.prefill=full \
                    dirty.order=random dirty.progress_ms=0";

/// A guest that works, with its memory in order.
fn busy(ground: &Ground, cpus: u32) -> anyhow::Result<Vm> {
    let cmdline = format!("{BUSY} dirty.cpus={cpus}");
    let spec = ground.vm(&cmdline).cpus(&cpus.to_string());
    let mut vm = spec.start_controlled()?;
    vm.report("command=dirty", "event", SOON)?;
    Ok(vm)
}

fn path(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

/// Takes a snapshot; its report.
fn take(vm: &Vm, dir: &Path) -> anyhow::Result<Value> {
    let text = vm.control().drover("snapshot", &[path(dir), "--json"])?;
    Ok(serde_json::from_str(&text)?)
}

/// `drover restore DIR --name NAME ARGUMENTS...`
fn restore_command(ground: &Ground, dir: &Path, name: &str, arguments: &[&str]) -> Command {
    let mut command = ground.drover();
    command.args(["restore", path(dir), "--name", name]);
    command.args(arguments);
    command
}

fn restore(ground: &Ground, dir: &Path, name: &str, arguments: &[&str]) -> anyhow::Result<Vm> {
    let command = restore_command(ground, dir, name, arguments);
    let mut vm = Vm::spawn(command, Control::new(ground, name))?;
    vm.wait_control(SOON)?;
    // The socket is there first; an answer comes when the machine is, with all of its memory.
    vm.control().state()?;
    Ok(vm)
}

/// What a restore says that must not work.
fn refused(
    ground: &Ground,
    dir: &Path,
    arguments: &[&str],
) -> anyhow::Result<(Option<i32>, String)> {
    let mut command = restore_command(ground, dir, "refused", arguments);
    let finished = process::run(&mut command, SOON)?;
    ensure!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    Ok((finished.code(), finished.stderr.trim_end().to_owned()))
}

/// Lets the guest write on, then check everything that it has ever written.
fn check(mut vm: Vm) -> Outcome {
    vm.memory()?.wait_beat(SOON)?;
    std::thread::sleep(Duration::from_millis(100));
    vm.type_text("s")?;
    let result = vm.result("dirty")?;
    assert_eq!(result.number("bad")?, 0, "{result:?}");
    assert_eq!(result.number("checked")?, 8192, "{result:?}");
    vm.wait_end(LATER)?.check()
}

fn round_trip(cpus: u32, arguments: &[&str]) -> Outcome {
    let ground = match arguments {
        [] => Ground::kvm()?,
        _ => Ground::kvm_and_userfaultfd()?,
    };
    let Some(ground) = ground else {
        return Ok(());
    };
    let dir = ground.scratch().join("snapshot");
    let vm = busy(&ground, cpus)?;
    let report = take(&vm, &dir)?;
    println!("{report}");
    assert!(report["error"].is_null(), "{report}");
    let still = report["stood_still"]["total_us"].as_u64().context("time")?;
    ensure!(still < 1_000_000, "{still} us");
    let events = vm.control().event_names()?;
    ensure!(!events.contains(&"paused".to_owned()), "{events:?}");
    check(vm)?;

    let began = Instant::now();
    let restored = restore(&ground, &dir, "again", arguments)?;
    restored.memory()?.wait_beat(SOON)?;
    println!("runs again after {:?}", began.elapsed());
    let events = restored.control().event_names()?;
    assert_eq!(events, ["restored"]);
    check(restored)
}

#[test]
fn guest_under_load_is_restored() -> Outcome {
    round_trip(1, &[])
}

#[test]
fn guest_of_two_cpus_is_restored() -> Outcome {
    round_trip(2, &[])
}

#[test]
fn guest_goes_on_while_its_memory_is_loaded() -> Outcome {
    round_trip(1, &["--lazy"])
}

#[test]
fn guest_of_two_cpus_goes_on_while_its_memory_is_loaded() -> Outcome {
    round_trip(2, &["--lazy"])
}

#[test]
fn paused_vm_is_restored_twice_side_by_side_and_paused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let dir = ground.scratch().join("snapshot");
    let vm = busy(&ground, 1)?;
    vm.control().post("/v1/pause")?;
    take(&vm, &dir)?;
    assert_eq!(vm.control().state()?, "paused");
    drop(vm);
    // Memory that nobody has touched takes up no room.
    let memory = fs::metadata(dir.join("memory"))?;
    assert_eq!(memory.len(), 64 << 20);
    ensure!(memory.blocks() * 512 < 48 << 20, "{}", memory.blocks());
    assert_eq!(fs::metadata(&dir)?.mode() & 0o777, 0o700);
    let vms = [
        restore(&ground, &dir, "one", &[])?,
        restore(&ground, &dir, "two", &[])?,
    ];
    for vm in vms {
        assert_eq!(vm.control().state()?, "paused");
        vm.control().post("/v1/resume")?;
        check(vm)?;
    }
    Ok(())
}

fn flip(file: &Path, at: u64) -> Outcome {
    let file = File::options().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    byte[0] ^= 1;
    Ok(file.write_all_at(&byte, at)?)
}

/// Bytes of memory: of the heartbeat's page, and one at the end that was never written.
const DAMAGED: [u64; 2] = [0x10_0000, (64 << 20) - 1];

#[test]
fn damage_found_while_memory_is_loaded_ends_the_vm() -> Outcome {
    let Some(ground) = Ground::kvm_and_userfaultfd()? else {
        return Ok(());
    };
    let dir = ground.scratch().join("snapshot");
    let vm = busy(&ground, 1)?;
    take(&vm, &dir)?;
    drop(vm);
    let memory = dir.join("memory");
    for at in DAMAGED {
        flip(&memory, at)?;
        let (code, said) = refused(&ground, &dir, &["--lazy"])?;
        let expected = "VM refused ends at once, its memory cannot be loaded:";
        ensure!(
            code == Some(6) && said.contains(expected),
            "{code:?} {said}"
        );
        flip(&memory, at)?;
    }
    Ok(())
}

#[test]
fn damage_is_told_and_never_runs() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let dir = ground.scratch().join("snapshot");
    let vm = busy(&ground, 1)?;
    take(&vm, &dir)?;
    drop(vm);
    let (memory, manifest) = (dir.join("memory"), dir.join("manifest"));
    for (at, chunk) in DAMAGED.into_iter().zip([0x10_0000, (64 << 20) - 0x1_0000]) {
        flip(&memory, at)?;
        let (code, said) = refused(&ground, &dir, &[])?;
        let expected = format!(
            "guest memory cannot be restored: {}: memory is damaged: bytes {chunk} to {} have check sum",
            path(&memory),
            chunk + 0x1_0000
        );
        ensure!(
            code == Some(1) && said.contains(&expected),
            "{code:?} {said}"
        );
        flip(&memory, at)?;
    }
    let length = fs::metadata(&manifest)?.len();
    for (at, expected) in [
        (0, "this is not the manifest of a snapshot"),
        (20, "the manifest is damaged: its header has check sum"),
        (
            length - 1,
            "the manifest is damaged: its body has check sum",
        ),
    ] {
        flip(&manifest, at)?;
        let (code, said) = refused(&ground, &dir, &[])?;
        let expected = format!("cannot be opened: {}: {expected}", path(&manifest));
        ensure!(
            code == Some(1) && said.contains(&expected),
            "{code:?} {said}"
        );
        flip(&manifest, at)?;
    }
    File::options()
        .write(true)
        .open(&memory)?
        .set_len(1 << 20)?;
    let (_, said) = refused(&ground, &dir, &[])?;
    ensure!(
        said.contains("has 1048576 bytes instead of 67108864"),
        "{said}"
    );
    fs::remove_file(&memory)?;
    std::os::unix::fs::symlink("/dev/zero", &memory)?;
    let (_, said) = refused(&ground, &dir, &[])?;
    ensure!(said.contains("memory is not a regular file"), "{said}");
    Ok(())
}

/// A file system of its own; gone with the value.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: PathBuf, size: &str) -> anyhow::Result<Self> {
        fs::create_dir(&at)?;
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", size, "drover-test", path(&at)]);
        process::run(&mut command, SOON)?.success()?;
        Ok(Self(at))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = process::run(Command::new("umount").arg(&self.0), SOON);
    }
}

#[test]
fn full_file_system_leaves_the_vm_and_the_old_snapshot_as_they_were() -> Outcome {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let mount = Mount::tmpfs(ground.scratch().join("small"), "size=48M")?;
    let vm = busy(&ground, 1)?;
    let dir = mount.0.join("snapshot");
    take(&vm, &dir)?;
    let finished = vm.control().try_drover("snapshot", &[path(&dir)])?;
    assert_eq!(finished.code(), Some(1));
    let expected = "guest memory cannot be written to the snapshot: No space left on device";
    ensure!(finished.stderr.contains(expected), "{}", finished.stderr);
    let left: Vec<_> = fs::read_dir(&mount.0)?.flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    vm.memory()?.wait_beat(SOON)?;
    // Nothing is in the way of the next one.
    take(&vm, &ground.scratch().join("elsewhere"))?;
    check(vm)?;
    check(restore(&ground, &dir, "again", &[])?)
}

#[test]
fn vmm_that_is_killed_at_any_time_leaves_a_snapshot_that_can_be_restored() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let dir = ground.scratch().join("snapshot");
    let (mut finished, mut took_ms) = (0, 0);
    // From its beginning to a little past its end.
    for step in 0..8_u64 {
        let mut vm = match dir.exists() {
            // Also from what the last step has left.
            true => restore(&ground, &dir, "vm", &[])?,
            false => busy(&ground, 1)?,
        };
        if step == 0 {
            took_ms = take(&vm, &dir)?["total_ms"].as_u64().context("time")?;
        }
        let mut second = vm.control().command("snapshot", &[path(&dir)]).spawn()?;
        std::thread::sleep(Duration::from_millis(took_ms * step / 6));
        vm.kill()?;
        if process::wait_exit(&mut second, SOON)?.is_some_and(|status| status.success()) {
            finished += 1;
        }
    }
    println!("{finished} of 8 snapshots were finished");
    let vm = restore(&ground, &dir, "vm", &[])?;
    // The next one removes what was left.
    take(&vm, &dir)?;
    let left = fs::read_dir(ground.scratch().path())?.flatten();
    let left = left.filter(|entry| entry.file_name().to_string_lossy().contains("partial"));
    assert_eq!(left.count(), 0);
    check(vm)
}

#[test]
fn disks_that_are_missing_or_changed_are_told() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let dir = ground.scratch().join("snapshot");
    let disk = ground.scratch().write("disk.img", vec![0; 1 << 20])?;
    let spec = ground.vm(BUSY).args(&["--disk", path(&disk)]);
    let mut vm = spec.start_controlled()?;
    vm.report("command=dirty", "event", SOON)?;
    take(&vm, &dir)?;
    let (_, said) = refused(&ground, &dir, &[])?;
    ensure!(said.contains("is in use"), "{said}");
    drop(vm);
    // Being opened does not change a disk.
    for _ in 0..2 {
        drop(restore(&ground, &dir, "again", &[])?);
    }
    fs::write(&disk, vec![0; 1 << 20])?;
    let (code, said) = refused(&ground, &dir, &[])?;
    let expected = format!(
        "disk0: {} has changed since the snapshot was taken; the guest may find its file systems damaged: \
         --allow-changed-disks restores it all the same",
        path(&disk)
    );
    ensure!(code == Some(1) && said.contains(&expected), "{said}");
    fs::rename(&disk, ground.scratch().join("moved.img"))?;
    let (_, said) = refused(&ground, &dir, &["--allow-changed-disks"])?;
    ensure!(
        said.contains(path(&disk)) && said.contains("No such file"),
        "{said}"
    );
    let moved = format!("disk0={}", path(&ground.scratch().join("moved.img")));
    let arguments = ["--allow-changed-disks", "--disk", &moved];
    check(restore(&ground, &dir, "again", &arguments)?)
}

#[test]
fn a_name_that_is_in_use_comes_with_the_way_out() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let dir = ground.scratch().join("snapshot");
    let vm = ground.vm("run=heartbeat").start_controlled()?;
    take(&vm, &dir)?;
    let mut command = ground.drover();
    let finished = process::run(command.args(["restore", path(&dir)]), SOON)?;
    let said = format!(
        "drover: snapshot {}: a VM named vm is running already, as process {}; --name OTHER restores \
         this one beside it\n",
        path(&dir),
        vm.pid()
    );
    assert_eq!((finished.code(), finished.stderr), (Some(1), said));
    drop(restore(&ground, &dir, "other", &[])?);
    Ok(())
}

#[test]
fn places_that_no_snapshot_can_have_are_refused() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let vm = ground.vm("run=heartbeat").start_controlled()?;
    let foreign = ground.scratch().join("foreign");
    fs::create_dir(&foreign)?;
    fs::write(foreign.join("memory"), "mine")?;
    let file = ground.scratch().write("file", "mine")?;
    let nowhere = ground.scratch().join("no/where");
    for (dir, expected) in [
        (&foreign, "is there already, and is no snapshot"),
        (&file, "is there already, and is no snapshot"),
        (&nowhere, "No such file or directory"),
    ] {
        let finished = vm.control().try_drover("snapshot", &[path(dir)])?;
        let said = &finished.stderr;
        ensure!(
            finished.code() == Some(1) && said.contains(expected),
            "{said}"
        );
    }
    assert_eq!(fs::read_to_string(foreign.join("memory"))?, "mine");
    let answer = vm.control().curl_with(
        "POST",
        "/v1/snapshot",
        &["--json", r#"{"directory":"relative"}"#],
    )?;
    assert_eq!(answer.status, 400, "{answer:?}");
    let (code, said) = refused(&ground, &ground.scratch().join("none"), &[])?;
    ensure!(
        code == Some(1) && said.contains("none cannot be opened"),
        "{said}"
    );
    let (_, said) = refused(&ground, &foreign, &[])?;
    ensure!(said.contains("manifest cannot be opened"), "{said}");
    // An empty directory is a good place.
    let empty = ground.scratch().join("empty");
    fs::create_dir(&empty)?;
    take(&vm, &empty)?;
    let (_, said) = refused(&ground, &empty, &["--disk", "disk9=x"])?;
    ensure!(said.contains("the VM has no disk disk9"), "{said}");
    Ok(())
}

#[test]
fn states_that_this_build_cannot_read_are_told_before_memory_is() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let dir = ground.scratch().join("snapshot");
    let vm = busy(&ground, 1)?;
    take(&vm, &dir)?;
    drop(vm);
    let path = dir.join("manifest");
    let whole = Manifest::decode(&fs::read(&path)?)?;
    // With damage in memory, which nobody comes to see.
    flip(&dir.join("memory"), 0x10_0000)?;

    // As later builds make them.
    let mut later = whole.clone();
    for section in &mut later.sections {
        section.version += u32::from(["vcpu0", "rtc"].contains(&section.id.as_str()));
    }
    fs::write(&path, later.encode()?)?;
    let said = "this host cannot restore the VM: vCPUs: vcpu state version 2, this build reads 1 \
                to 1; device rtc: cmos state version 2, this build reads 1 to 1";
    let (code, found) = refused(&ground, &dir, &[])?;
    ensure!(code == Some(1) && found.ends_with(said), "{code:?} {found}");

    // As builds made them that did not describe their states.
    let mut earlier = whole;
    let mut description: Value = serde_json::from_slice(&earlier.skeleton)?;
    description["version"] = 1.into();
    let fields = description.as_object_mut().context("a map")?;
    fields.remove("states").context("no states")?;
    earlier.skeleton = description.to_string().into_bytes();
    fs::write(&path, earlier.encode()?)?;
    flip(&dir.join("memory"), 0x10_0000)?;
    check(restore(&ground, &dir, "again", &[])?)
}
