//! Devices that leave a guest which uses them, or by the guest's own hand.

use anyhow::{Context, ensure};
use vfio::IrqKind;
use vfio::VfioBackend;
use vfio::kernel::{KernelVfio, PathChoice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::assigned::{holds_vfio, in_list, removed, write_and_compare};
use super::vfio::{ask, assigned_vfs, folder};
use crate::lab::ctx::Ctx;
use crate::lab::nvme::AdminQueue;
use crate::lab::vmm::{BOOT, SOON, Vmm};
use crate::model_gpu::{ADDRESS as GPU, Tree, TreeOptions};

/// A VM with a shell whose disk is yet to come.
fn without_disk(ctx: &Ctx) -> anyhow::Result<Vmm> {
    let words = "lab.do=shell lab.disk=/dev/nvme0n1 lab.mib=4";
    let mut vmm = ctx.vm("plug")?.words(words).start()?;
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

/// The guest reads the disk that is taken from it, and then turns off its slot itself.
pub(super) fn at_work(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    for (vf, iommufd) in vfs.iter().zip(["off", "on"]) {
        let mut vmm = without_disk(ctx)?;
        let mut events = vmm.events()?;
        let device = format!("vfio={vf},iommufd={iommufd},id=disk");
        ctx.say(format!("{device}: removed while the guest reads it"));
        vmm.device("add", &[&device])?;
        vmm.do_task("arrived", SOON)?;
        let busy = vmm.do_task("busy", SOON)?;
        ctx.say(format!("{busy:?}"));
        ensure!(holds_vfio(&vmm, vf)?, "the VMM does not have it open");
        vmm.device("remove", &["disk"])?;
        removed(&mut events)?;
        // Who reads has an error, and does not wait for ever.
        vmm.report("idle", SOON)?;
        is_gone(&mut vmm, vf).context("removed at work")?;
        vmm.do_task("free", SOON)?;

        ctx.say("turned off by the guest");
        vmm.device("add", &[&device])?;
        vmm.do_task("arrived", SOON)?;
        write_and_compare(ctx, &mut vmm)?;
        vmm.do_task("eject", SOON)?;
        removed(&mut events)?;
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
