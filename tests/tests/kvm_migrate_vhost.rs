//! VMs whose disk is served by another process, and that move from one such process to the next.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use migration::wire::FrameKind;
use tests::harness::control::Control;
use tests::harness::ground::Ground;
use tests::harness::image;
use tests::harness::moving::{Place, migrate, reason_not_moved, try_migrate};
use tests::harness::process;
use tests::harness::relay::Relay;
use tests::harness::vhost_user::{Server, without_log};
use tests::harness::vm::{LATER, SOON, Vm};

type Outcome = anyhow::Result<()>;

const MIB: u64 = 1 << 20;

/// An image with two servers: a VM has one of them, and its next process the other.
struct Disk {
    image: PathBuf,
    sockets: [PathBuf; 2],
    _servers: [Server; 2],
}

impl Disk {
    fn new(ground: &Ground, bytes: u64) -> anyhow::Result<Self> {
        let image = ground.scratch().join("disk.raw");
        image::new_raw(&image, bytes)?;
        let sockets = ["even", "odd"].map(|name| ground.scratch().join(name));
        let [even, odd] = &sockets;
        let servers = [
            Server::start_unlocked(&image, even)?,
            Server::start_unlocked(&image, odd)?,
        ];
        Ok(Self {
            image,
            sockets,
            _servers: servers,
        })
    }

    /// The server of a VM's process number `number`.
    fn socket(&self, number: usize) -> &Path {
        &self.sockets[number % 2]
    }
}

fn from_server(socket: &Path) -> [String; 2] {
    let disk = format!("vhost-user={}", socket.display());
    ["--disk".to_owned(), disk]
}

fn at_server(socket: &Path) -> [String; 2] {
    let server = format!("disk0={}", socket.display());
    ["--vhost-user".to_owned(), server]
}

/// Moves `vm` to its process number `number`.
fn hop(ground: &Ground, mut vm: Vm, disk: &Disk, number: usize) -> anyhow::Result<Vm> {
    let place = Place::new(ground, &format!("vm{number}")).args(&at_server(disk.socket(number)));
    let place = place.start()?;
    migrate(vm.control(), &place.url, &[]).with_context(|| format!("hop {number}"))?;
    let status = vm.wait_exit(SOON)?;
    ensure!(status.code() == Some(0), "the source ended with {status}");
    // Its controller gets it a moment later.
    let runs = || (place.vm.control().state().ok()? == "running").then_some(());
    process::wait_until(Instant::now() + SOON, runs).context("it does not run")?;
    Ok(place.vm)
}

/// Requests are answered: one that is lost is missing for ever, and soon all of them wait for it.
fn goes_on(vm: &Vm) -> Outcome {
    let ram = vm.memory()?;
    let now = ram.heartbeat()?.progress;
    let more = ram.wait_heartbeat(SOON, |beat| beat.progress > now + 100);
    more.map(drop).context("requests are not answered")
}

#[test]
fn disk_moves_back_and_forth_while_its_guest_checks_every_byte() -> Outcome {
    const LEN: u64 = 128 * MIB;
    const HOPS: usize = 6;
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let disk = Disk::new(&ground, LEN)?;
    // Written, then read back; small requests, so that it takes long enough.
    let cmdline = format!("run=blk,blk,heartbeat blk.len={LEN} blk.bs=8K 1.op=write 2.op=verify");
    let spec = ground.vm(&cmdline).args(&from_server(disk.socket(0)));
    let mut vm = spec.start_controlled()?;
    vm.ready()?;
    let mut hops = 0;
    while hops < HOPS || vm.memory()?.heartbeat()?.command < 3 {
        hops += 1;
        vm = hop(&ground, vm, &disk, hops)?;
        let beat = vm.memory()?.heartbeat()?;
        ensure!(hops > 3 || beat.command < 3, "the guest was too fast");
    }
    let infos = vm.control().json("devices")?;
    let blocked = infos.as_array().into_iter().flatten();
    let blocked = blocked.filter(|info| !info["migration_blocked"].is_null());
    assert_eq!(blocked.count(), 0, "{infos}");
    vm.type_text("s")?;
    vm.wait_end(LATER)?.check()?;
    image::check_pattern(&disk.image, (0, LEN), 1)
}

#[test]
fn requests_to_a_server_that_are_under_way_are_answered_by_the_next() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let disk = Disk::new(&ground, 16 * MIB)?;
    // Polled and by interrupts.
    for irq in ["0", "1"] {
        let cmdline = format!(
            "run=blkbench blkbench.ms=600000 blkbench.ops=randread blkbench.depths=16 \
             blkbench.irq={irq}"
        );
        let spec = ground.vm(&cmdline).args(&from_server(disk.socket(0)));
        let mut vm = spec.start_controlled()?;
        vm.ready()?;
        for number in 1..=4 {
            goes_on(&vm).with_context(|| format!("irq={irq}, before hop {number}"))?;
            vm = hop(&ground, vm, &disk, number)?;
        }
        goes_on(&vm)?;
        vm.control().post("/v1/stop")?;
        assert_eq!(vm.wait_end(SOON)?.code(), Some(0));
    }
    Ok(())
}

/// A VM that uses its disk all the time.
fn busy(ground: &Ground, socket: &Path) -> anyhow::Result<Vm> {
    let cmdline = "run=blkbench blkbench.ms=600000 blkbench.ops=randread blkbench.depths=16";
    let spec = ground.vm(cmdline).args(&from_server(socket));
    let mut vm = spec.start_controlled()?;
    vm.ready()?;
    goes_on(&vm)?;
    Ok(vm)
}

/// Tries to move `vm` and finds its disk at work; the reason.
fn refused(vm: &Vm, url: &str) -> anyhow::Result<String> {
    let finished = try_migrate(vm.control(), url, &[])?;
    let reason = reason_not_moved(&finished, "vm")?;
    goes_on(vm).with_context(|| reason.clone())?;
    Ok(reason)
}

#[test]
fn server_without_a_log_keeps_its_vm_where_it_is() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let disk = Disk::new(&ground, 16 * MIB)?;
    let poor = ground.scratch().join("poor");
    without_log(disk.socket(0), &poor)?;
    let vm = busy(&ground, &poor)?;
    let place = Place::new(&ground, "there").start()?;
    let said = "its vhost-user server does not offer VHOST_USER_PROTOCOL_F_LOG_SHMFD: what it writes \
                to guest memory cannot be followed";
    assert_eq!(
        refused(&vm, &place.url)?,
        format!("the VM cannot be moved: disk0: {said}")
    );
    // Nothing was sent: the place still waits.
    assert_eq!(place.vm.control().state()?, "receiving");
    let list = vm.control().drover("devices", &[])?;
    ensure!(list.contains(said), "{list}");
    Ok(())
}

#[test]
fn destination_whose_server_does_not_fit_refuses_before_memory_moves() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let disk = Disk::new(&ground, 16 * MIB)?;
    let vm = busy(&ground, disk.socket(0))?;
    let larger = ground.scratch().join("larger");
    image::new_raw(&larger, 32 * MIB)?;
    let other = ground.scratch().join("other");
    let _other = Server::start(&larger, &other)?;
    let nowhere = ground.scratch().join("nowhere");
    for (arguments, said) in [
        (
            at_server(&other),
            "capacity is 32768: the vhost-user server here has a disk of 65536 sectors".to_owned(),
        ),
        (
            at_server(&nowhere),
            format!("disk0: {}: there is no such socket", nowhere.display()),
        ),
        (
            [
                "--vhost-user".to_owned(),
                format!("disk7={}", other.display()),
            ],
            "the VM has no vhost-user device disk7".to_owned(),
        ),
    ] {
        let place = Place::new(&ground, "there").args(&arguments).start()?;
        let reason = refused(&vm, &place.url)?;
        ensure!(reason.contains(&said), "{reason}");
    }
    hop(&ground, vm, &disk, 1).and_then(|vm| goes_on(&vm))
}

#[test]
fn failed_migration_leaves_the_disk_at_work_where_it_was() -> Outcome {
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let disk = Disk::new(&ground, 16 * MIB)?;
    let vm = busy(&ground, disk.socket(0))?;
    // In the middle of memory, and when the destination has everything but the VM.
    for kind in [FrameKind::Round, FrameKind::Section, FrameKind::Prepared] {
        let place = Place::new(&ground, "there").args(&at_server(disk.socket(1)));
        let mut place = place.start()?;
        let relay = Relay::start(&place.url, kind)?;
        refused(&vm, &relay.url).with_context(|| format!("{kind:?}"))?;
        relay.wait_cut()?;
        place.vm.wait_exit(SOON)?;
    }
    hop(&ground, vm, &disk, 1).and_then(|vm| goes_on(&vm))
}

#[test]
fn snapshot_goes_on_with_a_server_that_has_the_same_disk() -> Outcome {
    const LEN: u64 = 8 * MIB;
    let Some(ground) = Ground::kvm()? else {
        return Ok(());
    };
    let disk = Disk::new(&ground, LEN)?;
    let cmdline = format!("run=blk,heartbeat,blk blk.len={LEN} 1.op=write 3.op=verify");
    let spec = ground.vm(&cmdline).args(&from_server(disk.socket(0)));
    let vm = spec.start_controlled()?;
    vm.memory()?
        .wait_heartbeat(LATER, |beat| beat.command == 2)?;
    let dir = ground.scratch().join("snapshot");
    let dir = dir.display().to_string();
    vm.control().drover("snapshot", &[&dir])?;
    drop(vm);
    let command = |arguments: &[&str]| {
        let mut command = ground.drover();
        command.args(["restore", &dir, "--name", "again"]);
        command.args(at_server(disk.socket(1))).args(arguments);
        command
    };
    let finished = process::run(&mut command(&[]), SOON)?;
    let said = format!(
        "disk0: nothing tells whether the disk of the vhost-user server at {} has changed",
        disk.socket(1).display()
    );
    ensure!(
        finished.code() == Some(1) && finished.stderr.contains(&said),
        "{finished:?}"
    );
    let mut vm = Vm::spawn(
        command(&["--allow-changed-disks"]),
        Control::new(&ground, "again"),
    )?;
    vm.wait_control(SOON)?;
    assert_eq!(vm.control().state()?, "running");
    vm.type_text("s")?;
    vm.wait_end(LATER)?.check()
}
