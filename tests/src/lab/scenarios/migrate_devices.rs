//! A whole distribution with every device that can move.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::devices::connect_vsock;
use super::migrate::{DISK_MIB, Moving, Way, net};
use crate::harness::process::wait_until;
use crate::lab::ctx::Ctx;
use crate::lab::hosts::{Host, TwoHosts};
use crate::lab::image;
use crate::lab::vmm::{BOOT, SOON, Vmm};
use crate::lab::witness::blocks;

/// Debian's initramfs unpacks and loads modules under two emulations.
const DEBIAN_BOOT: Duration = Duration::from_secs(240);
/// What the balloon takes; 65536 KiB.
const BALLOON_MIB: u64 = 64;

/// Console file and vsock socket of a host.
fn places(ctx: &Ctx, host: Host) -> (PathBuf, PathBuf) {
    let place = |what| ctx.scratch(&format!("{}.{what}", host.namespace()));
    (place("console"), place("vsock"))
}

pub(super) fn debian(ctx: &mut Ctx) -> anyhow::Result<()> {
    let network = TwoHosts::create()?;
    let (root, disk, tool) = (
        ctx.scratch("root.qcow2"),
        ctx.scratch("disk.qcow2"),
        ctx.scratch("tool.raw"),
    );
    std::fs::copy(ctx.artefact("debian-qcow2")?, &root)?;
    image::create_qcow2(&disk, DISK_MIB)?;
    std::fs::copy(std::env::current_exe()?, &tool)?;
    let tool_bytes = pad(&tool)?;
    let (console, vsock) = places(ctx, Host::A);
    let spec = ctx
        .vm("guest")?
        .kernel(ctx.artefact("debian-vmlinuz")?)
        .initrd(ctx.artefact("debian-initrd")?)
        .words("root=LABEL=lab-root rw")
        .memory("512M")
        .disk(&root, "format=qcow2")
        .disk(&disk, "format=qcow2,serial=witness")
        .disk(&tool, "format=raw,readonly=on")
        .with("--net", net())
        .with("--console", format!("file={}", console.display()))
        .with("--vsock", format!("cid=3,socket={}", vsock.display()))
        .flag("--rng")
        .flag("--balloon");
    let mut vmm = Host::A.place(ctx, spec.clone()).start()?;
    log_in(&mut vmm, tool_bytes)?;
    ctx.say("logged in");
    let mut moving = Moving::watch(ctx, network, spec, vmm, "/dev/vdb")?;
    devices_work(ctx, &mut moving, "before")?;
    for time in ["away", "back"] {
        let to = moving.host.other();
        let (console, vsock) = places(ctx, to);
        let mut way = Way::tcp(to);
        for (option, value) in [
            ("--console", format!("file={}", console.display())),
            ("--vsock", vsock.display().to_string()),
        ] {
            way.receive.extend([option.to_owned(), value]);
        }
        moving.hop(ctx, &way)?;
        devices_work(ctx, &mut moving, time)?;
    }
    let written = moving.verdict(ctx)?;
    moving.vmm.ctl("shutdown", &[])?;
    moving.vmm.wait_poweroff(BOOT)?;
    for image in [&root, &disk] {
        image::check_qcow2(image)?;
    }
    let raw = ctx.scratch("disk.raw");
    image::qcow2_to_raw(&disk, &raw)?;
    blocks::verify(&raw, &written, false).context("on the host")?;
    image::qcow2_to_raw(&root, &raw)?;
    image::check_ext4(&raw)
}

/// Makes the file a whole number of sectors; its length before.
fn pad(path: &std::path::Path) -> anyhow::Result<u64> {
    let file = std::fs::File::options().write(true).open(path)?;
    let bytes = file.metadata()?.len();
    file.set_len(bytes.next_multiple_of(4096))?;
    Ok(bytes)
}

/// To a shell that has `lab_agent` and the network.
fn log_in(vmm: &mut Vmm, tool_bytes: u64) -> anyhow::Result<()> {
    vmm.wait_for("lab-debian login:", DEBIAN_BOOT)?;
    vmm.send("root\n")?;
    vmm.wait_for("root@lab-debian", SOON)?;
    let lines = [
        format!("head -c {tool_bytes} /dev/vdc > /usr/bin/lab_agent; chmod 755 /usr/bin/lab_agent"),
        "card=$(ls /sys/class/net | grep -v lo)".to_owned(),
        format!(
            "ip address add {} dev $card; ip link set $card up",
            TwoHosts::GUEST
        ),
        "all=$(awk '/MemTotal/ { print $2 }' /proc/meminfo)".to_owned(),
        // What it echoes is no answer.
        "socat VSOCK-LISTEN:5001,fork SYSTEM:cat & echo up-$((6 * 7))".to_owned(),
    ];
    for line in lines {
        vmm.send(&format!("{line}\n"))?;
    }
    vmm.wait_for("up-42", SOON).map(drop)
}

/// Console, vsock, entropy and balloon, each once.
fn devices_work(ctx: &Ctx, moving: &mut Moving, time: &str) -> anyhow::Result<()> {
    let (console, vsock) = places(ctx, moving.host);
    let vmm = &mut moving.vmm;
    vmm.send(&format!("echo {time}-$((6 * 7)) > /dev/hvc0\n"))?;
    let expected = format!("{time}-42");
    wait_until(Instant::now() + SOON, || {
        let text = std::fs::read_to_string(&console).ok()?;
        text.contains(&expected).then_some(())
    })
    .with_context(|| format!("{time}: nothing comes out of the console"))?;

    let stream = wait_until(Instant::now() + SOON, || connect_vsock(&vsock, 5001).ok());
    let mut stream = stream.with_context(|| format!("{time}: no vsock connection"))?;
    writeln!(stream, "echo {time}")?;
    let mut echo = String::new();
    BufReader::new(stream).read_line(&mut echo)?;
    ensure!(
        echo == format!("echo {time}\n"),
        "{time}: the echo is '{echo}'"
    );

    vmm.send("echo random-$(head -c 64 /dev/hwrng | wc -c)\n")?;
    vmm.wait_for("random-64", SOON)
        .with_context(|| format!("{time}: no entropy"))?;

    // The driver's pages are no longer part of what there is in all.
    for (mib, test) in [(BALLOON_MIB, "-le $((all - 65536))"), (0, "-ge $all")] {
        vmm.set_balloon(mib)?;
        vmm.send(&format!(
            "until [ $(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo) {test} ]; do sleep 0.1; done; \
             echo balloon-$((6 * 7))-{mib}\n"
        ))?;
        vmm.wait_for(&format!("balloon-42-{mib}"), SOON)
            .with_context(|| format!("{time}: the balloon does not come to {mib} MiB"))?;
    }
    Ok(())
}
