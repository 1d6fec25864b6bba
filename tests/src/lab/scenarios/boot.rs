//! Kernels, CPUs and memory.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::lab::ctx::Ctx;
use crate::lab::image;
use crate::lab::vm_spec::VmSpec;
use crate::lab::vmm::{BOOT, SOON, Vmm};

/// Debian's initramfs unpacks and loads modules under two emulations.
const DEBIAN_BOOT: Duration = Duration::from_secs(240);

pub(super) fn lab_vmlinux(ctx: &mut Ctx) -> anyhow::Result<()> {
    shell_and_poweroff(&ctx.vm("lab")?)
}

pub(super) fn lab_bzimage(ctx: &mut Ctx) -> anyhow::Result<()> {
    shell_and_poweroff(&ctx.vm("lab")?.kernel(ctx.artefact("bzImage")?))
}

pub(super) fn debian_kernel(ctx: &mut Ctx) -> anyhow::Result<()> {
    shell_and_poweroff(
        &ctx.vm("debian")?
            .kernel(ctx.artefact("debian-vmlinuz")?)
            .memory("512M"),
    )
}

/// A shell answers on the console, and the guest's poweroff ends the VMM.
fn shell_and_poweroff(spec: &VmSpec) -> anyhow::Result<()> {
    let mut vmm = spec.clone().words("lab.do=shell").start()?;
    let boot = vmm.report("boot", BOOT)?;
    ensure!(
        boot.text("clocksource")? == "kvm-clock",
        "the guest runs on {}",
        boot.text("clocksource")?
    );
    vmm.report("shell", SOON)?;
    // The sum, not its text: an echo of the typed line must not pass for an answer.
    vmm.send("echo answer=$((6 * 7))\n")?;
    vmm.wait_for("answer=42", SOON)?;
    vmm.send("exit\n")?;
    vmm.wait_poweroff(SOON)
}

pub(super) fn debian_raw(ctx: &mut Ctx) -> anyhow::Result<()> {
    let disk = ctx.scratch("debian.raw");
    image::qcow2_to_raw(&ctx.artefact("debian-qcow2")?, &disk)?;
    let written = debian_session(ctx, &disk, "format=raw")?;
    image::check_ext4(&disk)?;
    guest_file_is(&disk, &written)
}

pub(super) fn debian_qcow2(ctx: &mut Ctx) -> anyhow::Result<()> {
    let disk = ctx.scratch("debian.qcow2");
    std::fs::copy(ctx.artefact("debian-qcow2")?, &disk)?;
    let written = debian_session(ctx, &disk, "format=qcow2")?;
    image::check_qcow2(&disk)?;
    let raw = ctx.scratch("debian.raw");
    image::qcow2_to_raw(&disk, &raw)?;
    image::check_ext4(&raw)?;
    guest_file_is(&raw, &written)
}

/// Boots Debian, logs in, writes a file and presses the power button; what was
/// written to `/root/written`.
fn debian_session(ctx: &Ctx, disk: &Path, options: &str) -> anyhow::Result<String> {
    let spec = ctx
        .vm("debian")?
        .kernel(ctx.artefact("debian-vmlinuz")?)
        .initrd(ctx.artefact("debian-initrd")?)
        .words("root=LABEL=lab-root rw")
        .cpus("2")
        .memory("512M")
        .disk(disk, options);
    let mut vmm = spec.start()?;
    vmm.wait_for("lab-debian login:", DEBIAN_BOOT)?;
    ctx.say("login prompt");
    vmm.send("root\n")?;
    vmm.wait_for("root@lab-debian", SOON)?;
    vmm.send(
        "systemctl is-system-running --wait; echo units-failed=$(systemctl --failed -q | wc -l)\n",
    )?;
    vmm.wait_for("units-failed=0", SOON)?;
    vmm.send("head -c 1M /dev/urandom > /root/written; echo sum-$(sha256sum < /root/written)\n")?;
    vmm.wait_for("\nsum-", SOON)?;
    let sum = vmm.wait_for(" ", SOON)?;
    ctx.say("power button");
    vmm.ctl("shutdown", &[])?;
    vmm.wait_poweroff(BOOT)?;
    Ok(sum)
}

/// Whether `/root/written` in the file system has this checksum.
fn guest_file_is(disk: &Path, sum: &str) -> anyhow::Result<()> {
    let copy = disk.with_extension("written");
    let copy_text = copy.to_str().context("a path that is not UTF-8")?;
    let disk_text = disk.to_str().context("a path that is not UTF-8")?;
    crate::lab::ctx::run(
        "debugfs",
        &["-R", &format!("dump /root/written {copy_text}"), disk_text],
    )?;
    let on_host = image::sha256_raw(&copy, 1)?;
    ensure!(
        on_host == sum,
        "the guest wrote {sum}, the host reads {on_host}"
    );
    Ok(())
}

pub(super) fn cpus_1(ctx: &mut Ctx) -> anyhow::Result<()> {
    cpus(ctx, "1", 1).map(drop)
}

pub(super) fn cpus_2(ctx: &mut Ctx) -> anyhow::Result<()> {
    cpus(ctx, "2", 2).map(drop)
}

pub(super) fn cpus_4(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut vmm = cpus(ctx, "4,sockets=1,cores=2,threads=2", 4)?;
    let topology = vmm.report("topology", SOON)?;
    let got = (topology.number("sockets")?, topology.number("cores")?);
    ensure!(got == (1, 2), "the guest sees (sockets, cores) = {got:?}");
    ensure!(
        topology.text("threads")? == "0-1",
        "vCPU 0's siblings are {}",
        topology.text("threads")?
    );
    vmm.wait_poweroff(SOON)
}

/// Boots with `--cpus option` and has each of `count` vCPUs work.
fn cpus(ctx: &Ctx, option: &str, count: u32) -> anyhow::Result<Vmm> {
    let mut vmm = ctx
        .vm("cpus")?
        .cpus(option)
        .words("lab.do=cpus,topology")
        .start()?;
    let boot = vmm.report("boot", BOOT)?;
    ensure!(
        boot.number::<u32>("cpus")? == count,
        "the guest has {} CPUs",
        boot.text("cpus")?
    );
    let worked = vmm.report("cpus", SOON)?;
    ensure!(
        worked.number::<u32>("count")? == count,
        "{} vCPUs worked",
        worked.text("count")?
    );
    Ok(vmm)
}

pub(super) fn memory_6g(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut vmm = ctx
        .vm("memory")?
        .memory("6G")
        .cpus("2")
        .words("lab.do=memory lab.mib=768")
        .start()?;
    let boot = vmm.report("boot", BOOT)?;
    let seen_kib: u64 = boot.number("mem_kib")?;
    // The kernel keeps some for itself: page structures alone take 1.6 %.
    ensure!(
        seen_kib > (6 << 20) * 95 / 100,
        "the guest has {seen_kib} KiB of 6 GiB"
    );
    let above_kib: u64 = vmm.report("memory", BOOT)?.number("above_4g_kib")?;
    ensure!(
        above_kib > 512 << 10,
        "only {above_kib} KiB of 768 MiB lay above 4 GiB"
    );
    vmm.wait_poweroff(SOON)
}
