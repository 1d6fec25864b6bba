//! Virtual functions of L1's devices in VMs of Drover's.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::vfio::assigned_vfs;
use crate::harness::follower::Follower;
use crate::lab::ctx::Ctx;
use crate::lab::image;
use crate::lab::sriov::{self, NvmeController};
use crate::lab::vm_spec::VmSpec;
use crate::lab::vmm::{BOOT, SOON, Vmm};

/// MiB that a guest writes.
const WRITTEN: u64 = 16;
/// MiB that a guest writes and reads once, and in how many commands at least: 512 KiB a command.
const MANY: u64 = 256;
const COMMANDS: u64 = MANY * 2 * 2;
/// The memory that it needs for them, and how long they may take.
const MEMORY: &str = "768M";
const MANY_LIMIT: Duration = Duration::from_secs(300);
/// Exits of another cause meanwhile.
const A_HANDFUL: u64 = 8;
/// MiB that each of several disks is given.
pub(super) const PART: u64 = 4;
const EXITS: &str = "vcpu_mmio_exits_total";
/// Of those, and all others that Drover is woken for, at most so many are made meanwhile: what the shell says
/// goes by a port, byte by byte. One doorbell that is trapped would make two a command.
const ALL_EXITS: [&str; 3] = [EXITS, "vcpu_io_exits_total", "vcpu_other_exits_total"];
const ALL_MAX: u64 = COMMANDS * 2;

/// The checksum of some MiB of the disk behind the controller, as L1 reads it.
pub(super) fn sum_on_host(at: u64, mib: u64) -> anyhow::Result<String> {
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop caches")?;
    image::sha256_part(&NvmeController::find()?.disk(), at, mib)
}

/// A VM with a shell and an NVMe disk; `device` as `--device` takes it.
fn with_disk(ctx: &Ctx, name: &str, device: &str) -> anyhow::Result<VmSpec> {
    let words = format!("lab.do=shell lab.disk=/dev/nvme0n1 lab.mib={WRITTEN}");
    Ok(ctx.vm(name)?.with("--device", device).words(&words))
}

/// The guest writes and reads back through its NVMe driver; the host sees the same bytes.
pub(super) fn write_and_compare(ctx: &Ctx, vmm: &mut Vmm) -> anyhow::Result<()> {
    let report = vmm.do_task("disk", SOON)?;
    let mib: u64 = report.number("mib")?;
    ensure!(
        report.text("sha256")? == sum_on_host(0, mib)?,
        "the host reads other bytes than the guest wrote"
    );
    ctx.say(format!("{mib} MiB are on the host as the guest wrote them"));
    Ok(())
}

/// The same with much more, by requests of 1 MiB.
fn write_many(ctx: &Ctx, vmm: &mut Vmm) -> anyhow::Result<()> {
    let began = Instant::now();
    let report = vmm.do_task("diskfull", MANY_LIMIT)?;
    ensure!(report.number::<u64>("mib")? == MANY, "{report:?}");
    let in_guest = began.elapsed().as_secs();
    ctx.say(format!("{report:?}"));
    ensure!(
        report.text("sha256")? == sum_on_host(0, MANY)?,
        "the host reads other bytes than the guest wrote"
    );
    let all = began.elapsed().as_secs();
    ctx.say(format!(
        "{MANY} MiB are on the host as the guest wrote them ({in_guest} s in the guest, {all} s)"
    ));
    Ok(())
}

fn nvme_through(ctx: &mut Ctx, vf: &str, iommufd: &str) -> anyhow::Result<()> {
    ctx.say(format!("{vf}, iommufd={iommufd}"));
    let device = format!("vfio={vf},iommufd={iommufd}");
    let mut vmm = with_disk(ctx, "nvme", &device)?
        .memory(MEMORY)
        .words(&format!("lab.full={MANY} lab.end=reboot"))
        .start()?;
    vmm.report("shell", BOOT)?;
    write_and_compare(ctx, &mut vmm)?;
    let all =
        |vmm: &Vmm| -> anyhow::Result<u64> { ALL_EXITS.iter().map(|name| vmm.counter(name)).sum() };
    let (before, all_before) = (vmm.counter(EXITS)?, all(&vmm)?);
    write_many(ctx, &mut vmm)?;
    let all_exits = all(&vmm)? - all_before;
    ctx.say(format!("{all_exits} exits of all kinds"));
    ensure!(
        all_exits < ALL_MAX,
        "{all_exits} exits of all kinds for {COMMANDS} commands"
    );
    let exits = vmm.counter(EXITS)? - before;
    ctx.say(format!(
        "{before} exits before, {exits} for at least {COMMANDS} commands"
    ));
    ensure!(before > 0, "no exit was counted at all");
    ensure!(
        exits <= A_HANDFUL,
        "{exits} exits for at least {COMMANDS} commands"
    );

    ctx.say("reboot");
    vmm.send("exit\n")?;
    vmm.report("shell", BOOT).context("after the reboot")?;
    write_and_compare(ctx, &mut vmm).context("after the reboot")?;

    ctx.say("kill -9, and another VM at once");
    vmm.send(". /lib/lab/tasks.sh; while :; do task_disk; done > /dev/null 2>&1 &\n")?;
    vmm.do_task("free", SOON)?;
    vmm.kill9()?;
    let mut second = with_disk(ctx, "second", &device)?.start()?;
    second.report("shell", BOOT).context("after kill -9")?;
    write_and_compare(ctx, &mut second).context("after kill -9")?;
    second.send("exit\n")?;
    second.wait_poweroff(SOON)
}

/// One VM after the other has an NVMe function, through each of the kernel's ways.
pub(super) fn nvme(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    for iommufd in ["off", "on"] {
        nvme_through(ctx, &vfs[0], iommufd).with_context(|| format!("with iommufd={iommufd}"))?;
    }
    Ok(())
}

/// A function comes while the guest runs, goes, and comes again. Drover binds it.
pub(super) fn hotplug(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = NvmeController::find()?.virtual_functions(2)?;
    for (vf, iommufd) in vfs.iter().zip(["off", "on"]) {
        let words = "lab.do=shell lab.disk=/dev/nvme0n1 lab.mib=4 lab.end=reboot";
        let mut vmm = ctx.vm("plug")?.words(words).start()?;
        vmm.report("shell", BOOT)?;
        vmm.do_task("gone", SOON)?;
        let mut events = vmm.events()?;
        let device = format!("vfio={vf},iommufd={iommufd},bind,id=disk");
        for round in ["first", "again"] {
            ctx.say(format!("{device}: {round}"));
            vmm.device("add", &[&device])?;
            let arrived = vmm.do_task("arrived", SOON)?;
            ensure!(arrived.text("functions")? == "1", "{arrived:?}");
            write_and_compare(ctx, &mut vmm)?;
            ensure!(in_list(&vmm)?, "it is not listed");
            ensure!(holds_vfio(&vmm, vf)?, "the VMM does not have it open");
            vmm.device("remove", &["disk"])?;
            removed(&mut events, "disk")?;
            vmm.do_task("gone", SOON)?;
            ensure!(!in_list(&vmm)?, "it is listed still");
            ensure!(!holds_vfio(&vmm, vf)?, "the VMM has it open still");
        }
        ctx.say("it stays over a reboot");
        vmm.device("add", &[&device])?;
        vmm.do_task("arrived", SOON)?;
        vmm.send("exit\n")?;
        vmm.report("shell", BOOT).context("after the reboot")?;
        write_and_compare(ctx, &mut vmm).context("after the reboot")?;
        vmm.device("remove", &["disk"])?;
        vmm.do_task("gone", SOON)?;
    }
    Ok(())
}

/// Waits for the event that this device is gone.
pub(super) fn removed(events: &mut Follower, device: &str) -> anyhow::Result<()> {
    let event = events.wait_line(SOON, |line| {
        let event: Value = serde_json::from_str(line).ok()?;
        (event["event"] == "device-removed").then_some(event)
    });
    let event = event.context("no event that it is removed")?;
    ensure!(event["device"] == device, "{event}");
    Ok(())
}

pub(super) fn in_list(vmm: &Vmm) -> anyhow::Result<bool> {
    let list = vmm.device("list", &[])?;
    let devices = list.as_array().context("no list of devices")?;
    Ok(devices.iter().any(|device| device["id"] == "disk"))
}

/// Whether the VMM has the function's node open: its group's, or its own.
pub(super) fn holds_vfio(vmm: &Vmm, vf: &str) -> anyhow::Result<bool> {
    let nodes = [sriov::group_node(vf)?, sriov::device_node(vf)?];
    for entry in std::fs::read_dir(format!("/proc/{}/fd", vmm.pid()))? {
        // A descriptor may be closed meanwhile.
        let Ok(open) = std::fs::read_link(entry?.path()) else {
            continue;
        };
        if nodes.contains(&open) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The checksums that a guest with several disks reports, in the order of the disks.
pub(super) fn sums_of(vmm: &mut Vmm, disks: usize) -> anyhow::Result<Vec<String>> {
    let report = vmm.do_task("disks", SOON)?;
    let sums = report.text("sha256")?.split(',').map(str::to_owned);
    let sums: Vec<String> = sums.collect();
    ensure!(
        sums.len() == disks && report.number::<usize>("count")? == disks,
        "the guest has other disks: {report:?}"
    );
    Ok(sums)
}

/// Two functions in one guest; then two guests with one each; then what cannot be started.
pub(super) fn several(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    let words = format!("lab.do=shell lab.mib={PART}");
    for iommufd in ["off", "on"] {
        ctx.say(format!("{vfs:?} in one guest, iommufd={iommufd}"));
        let mut spec = ctx.vm("both")?.words(&words);
        for vf in &vfs {
            spec = spec.with("--device", format!("vfio={vf},iommufd={iommufd}"));
        }
        let mut vmm = spec.start()?;
        vmm.report("shell", BOOT)?;
        let sums = sums_of(&mut vmm, 2)?;
        for (sum, part) in sums.iter().zip(0..) {
            ensure!(
                *sum == sum_on_host(part * PART, PART)?,
                "the host reads other bytes than disk {part} was given"
            );
        }
    }
    ctx.say("one each");
    let start = |name: &str, vf: &str| -> anyhow::Result<Vmm> {
        let spec = ctx.vm(name)?.words(&words);
        spec.with("--device", format!("vfio={vf}")).start()
    };
    let mut vms = [start("first", &vfs[0])?, start("second", &vfs[1])?];
    for vmm in &mut vms {
        vmm.report("shell", BOOT)?;
    }
    for vmm in &mut vms {
        let sums = sums_of(vmm, 1)?;
        ensure!(
            sums[0] == sum_on_host(0, PART)?,
            "the host reads other bytes than the guest wrote"
        );
    }
    refusals(ctx, &vfs, vms[0].pid())
}

/// `vfs[0]` is in use by the VM `first`, of the process `holder`.
fn refusals(ctx: &Ctx, vfs: &[String], holder: u32) -> anyhow::Result<()> {
    let refused = |devices: &[&str]| -> anyhow::Result<String> {
        let spec = devices.iter().fold(ctx.vm("refused")?, |spec, device| {
            spec.with("--device", format!("vfio={device}"))
        });
        let message = spec.start_refused(SOON)?;
        ctx.say(message.trim());
        Ok(message)
    };
    let (vf, by) = (vfs[0].as_str(), format!("first (pid {holder}) has it"));
    for way in ["iommufd=on", "iommufd=off"] {
        let message = refused(&[&format!("{vf},{way}")])?;
        ensure!(
            message.contains(vf) && message.contains(&by),
            "{vf} and '{by}' are to be named: {message}"
        );
    }
    // All of the controller, of which VMs have parts.
    let controller = NvmeController::find()?.address()?;
    let message = refused(&[&controller])?;
    let part = format!("first (pid {holder}) has {vf}");
    ensure!(
        message.contains(&controller) && message.contains(&part),
        "{controller} and '{part}' are to be named: {message}"
    );
    let message = refused(&["0000:7f:00.0"])?;
    ensure!(
        message.contains("0000:7f:00.0"),
        "it is to be named: {message}"
    );
    Ok(())
}

/// A function that is added another way than the first, one in use, and one after that which fits.
pub(super) fn hotplug_refused(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    let words = "lab.do=shell lab.disk=/dev/nvme0n1 lab.mib=4";
    let mut vmm = ctx.vm("plug")?.words(words).start()?;
    vmm.report("shell", BOOT)?;
    let refused = |vmm: &Vmm, device: &str, why: &str| {
        let added = vmm.device("add", &[device]);
        let error = format!("{:#}", added.err().context("it was added")?);
        ctx.say(&error);
        ensure!(error.contains(why), "'{why}' is to be told: {error}");
        Ok(())
    };
    refused(&vmm, "vfio=0000:7f:00.0,iommufd=on", "0000:7f:00.0")?;
    // What was refused is no choice for the next one.
    vmm.device("add", &[&format!("vfio={},iommufd=off,id=disk", vfs[0])])?;
    ensure!(holds_vfio(&vmm, &vfs[0])?, "it is not open");
    refused(
        &vmm,
        &format!("vfio={},iommufd=on", vfs[1]),
        "share one address space",
    )?;
    refused(&vmm, &format!("vfio={}", vfs[0]), &vfs[0])?;
    vmm.do_task("arrived", SOON)?;
    write_and_compare(ctx, &mut vmm)
}
