//! Devices that come to a guest which uses another, leave one which uses them, or by the guest's own hand.

use anyhow::{Context, ensure};
use vfio::IrqKind;
use vfio::VfioBackend;
use vfio::kernel::{KernelVfio, PathChoice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::assigned::{
    PART, holds_vfio, in_list, removed, sum_on_host, sums_of, write_and_compare,
};
use super::vfio::{ask, assigned_vfs, folder};
use crate::harness::follower::Follower;
use crate::lab::ctx::Ctx;
use crate::lab::nvme::AdminQueue;
use crate::lab::vmm::{BOOT, SOON, Vmm};
use crate::model_gpu::{ADDRESS as GPU, Tree, TreeOptions};

/// Where the guest writes while another disk comes, in MiB: past what it writes to each disk then.
const WRITES_AT: u64 = 64;

/// A VM with a shell whose disk is yet to come.
fn without_disk(ctx: &Ctx) -> anyhow::Result<Vmm> {
    let words = format!("lab.do=shell lab.disk=/dev/nvme0n1 lab.mib={PART} lab.at={WRITES_AT}");
    let mut vmm = ctx.vm("plug")?.words(&words).start()?;
    vmm.report("shell", BOOT)?;
    Ok(vmm)
}

/// It is gone for the guest, the list, and the host, which can use it at once.
fn is_gone(vmm: &mut Vmm, vf: &str) -> anyhow::Result<()> {
    vmm.do_task("gone", SOON)?;
    ensure!(!in_list(vmm)?, "it is listed still");
    ensure!(!holds_vfio(vmm, vf)?, "the VMM has it open still");
    let function = KernelVfio::new(PathChoice::Auto).open(&folder(vf))?;
    let event = EventFd::new(EFD_NONBLOCK)?;
    function.set_irqs(IrqKind::MsiX, &[&event])?;
    let mut queue = AdminQueue::new(&function, 0)?;
    queue.start()?;
    ask(&mut queue, &event, "lab-sriov")
}

/// A second disk comes while the guest writes the one it has, works, and goes, and the writing is none the worse.
fn joined_at_work(
    ctx: &Ctx,
    vmm: &mut Vmm,
    events: &mut Follower,
    (vf, device): (&str, &str),
) -> anyhow::Result<()> {
    ctx.say(format!("{device}: added while the guest writes the other"));
    let before = vmm.do_task("writes", SOON)?;
    vmm.device("add", &[device])?;
    let joined = vmm.do_task("joined", SOON)?;
    ensure!(joined.text("functions")? == "2", "{joined:?}");
    vmm.do_task("rounds", SOON).context("as it came")?;
    ensure!(holds_vfio(vmm, vf)?, "the VMM does not have it open");
    for (sum, part) in sums_of(vmm, 2)?.iter().zip(0..) {
        ensure!(
            *sum == sum_on_host(part * PART, PART)?,
            "the host reads other bytes than disk {part} was given"
        );
    }
    let after = vmm.do_task("rounds", SOON).context("as it was used, too")?;
    ctx.say(format!("{before:?} before, {after:?} with both"));
    vmm.device("remove", &["second"])?;
    removed(events, "second")?;
    let alone = vmm.do_task("alone", SOON)?;
    ensure!(alone.text("functions")? == "1", "{alone:?}");
    ensure!(!holds_vfio(vmm, vf)?, "the VMM has it open still");
    vmm.do_task("rounds", SOON).context("when it was gone")?;
    let written = vmm.do_task("written", SOON)?;
    ctx.say(format!("{written:?}"));
    ensure!(written.text("complaints")? == "0", "{written:?}");
    ensure!(
        written.text("sha256")? == sum_on_host(WRITES_AT, PART)?,
        "the host reads other bytes than the guest wrote last"
    );
    Ok(())
}

/// The guest writes its disk while another comes, reads the disk that is taken from it, and then turns off its slot
/// itself.
pub(super) fn at_work(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    for ((vf, other), iommufd) in vfs.iter().zip(vfs.iter().rev()).zip(["off", "on"]) {
        let mut vmm = without_disk(ctx)?;
        let mut events = vmm.events()?;
        let device = format!("vfio={vf},iommufd={iommufd},id=disk");
        vmm.device("add", &[&device])?;
        vmm.do_task("arrived", SOON)?;
        let second = format!("vfio={other},iommufd={iommufd},id=second");
        joined_at_work(ctx, &mut vmm, &mut events, (other, &second))?;

        ctx.say(format!("{device}: removed while the guest reads it"));
        let busy = vmm.do_task("busy", SOON)?;
        ctx.say(format!("{busy:?}"));
        ensure!(holds_vfio(&vmm, vf)?, "the VMM does not have it open");
        vmm.device("remove", &["disk"])?;
        removed(&mut events, "disk")?;
        // Who reads has an error, and does not wait for ever.
        vmm.report("idle", SOON)?;
        is_gone(&mut vmm, vf).context("removed at work")?;
        vmm.do_task("free", SOON)?;

        ctx.say("turned off by the guest");
        vmm.device("add", &[&device])?;
        vmm.do_task("arrived", SOON)?;
        write_and_compare(ctx, &mut vmm)?;
        vmm.do_task("eject", SOON)?;
        removed(&mut events, "disk")?;
        is_gone(&mut vmm, vf).context("turned off by the guest")?;
        vmm.send("exit\n")?;
        vmm.wait_poweroff(SOON)?;
    }
    Ok(())
}

/// A part of a model GPU comes to a running guest, and is released by it.
pub(super) fn gpu(ctx: &mut Ctx) -> anyhow::Result<()> {
    let root = ctx.scratch("sys");
    let options = TreeOptions {
        root: root.clone(),
        address: GPU.to_owned(),
        partitions_max: 2,
        vram_bytes: 16 << 20,
    };
    let mut tree = Tree::create(&options)?;
    std::thread::spawn(move || {
        // Until the end of the scenario; what fails is seen by who waits for the functions.
        while tree.follow().is_ok() {}
    });
    let sysfs = root.display().to_string();
    let drover = |words: &[&str]| {
        let words = [&["gpu"], words, &["--sysfs-root", &sysfs]].concat();
        crate::lab::ctx::run("drover", &words)
    };
    ctx.say(drover(&["partition", GPU, "2"])?.trim());
    let parts = || -> anyhow::Result<String> { drover(&["list"]) };
    let taken = || -> anyhow::Result<usize> { Ok(parts()?.matches("in use by gpu ").count()) };

    let words = "lab.do=shell lab.class=0x030200";
    let mut vmm = ctx.vm("gpu")?.words(words).start()?;
    vmm.report("shell", BOOT)?;
    ensure!(taken()? == 0, "nobody has one: {}", parts()?);
    for round in ["first", "again"] {
        ctx.say(round);
        let assigned = vmm.assign_gpu(&format!("auto,count=2,sysfs-root={sysfs}"))?;
        ctx.say(format!("{assigned}"));
        vmm.do_task("plugged", SOON)?;
        ensure!(taken()? == 2, "both are taken: {}", parts()?);
        let said = vmm.release_gpus()?;
        ctx.say(said.trim());
        ensure!(said.lines().count() == 2, "both are released: {said}");
        vmm.do_task("gone", SOON)?;
        ensure!(taken()? == 0, "both are given back: {}", parts()?);
    }
    drover(&["partition", GPU, "off"])?;
    vmm.send("exit\n")?;
    vmm.wait_poweroff(SOON)
}
