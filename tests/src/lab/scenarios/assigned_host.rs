//! What the host does to a function that a guest has.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::vfio::{assigned_vfs, folder};
use crate::harness::process::wait_until;
use crate::lab::ctx::Ctx;
use crate::lab::sriov::{device_node, group_node};
use crate::lab::vmm::{BOOT, SOON, Vmm};

/// Names of the events so far that concern the device.
fn events(vmm: &Vmm, device: &str) -> anyhow::Result<Vec<String>> {
    let text = vmm.api("GET", "/v1/events?follow=false", None)?;
    let lines = text.lines().filter(|line| !line.is_empty());
    let events = lines.map(serde_json::from_str::<Value>);
    let events = events.collect::<Result<Vec<_>, _>>()?;
    let names = events.iter().filter(|event| event["device"] == device);
    Ok(names
        .filter_map(|event| event["event"].as_str().map(str::to_owned))
        .collect())
}

/// Somebody takes a function from vfio-pci while a guest has it: the guest is asked for it, lets it
/// go, and runs on.
pub(super) fn wanted_back(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vfs = assigned_vfs()?;
    for (vf, iommufd) in vfs.iter().zip(["off", "on"]) {
        ctx.say(format!("{vf}, iommufd={iommufd}"));
        let device = format!("vfio={vf},iommufd={iommufd},id=disk");
        let words = "lab.do=shell lab.disk=/dev/nvme0n1 lab.mib=4";
        let spec = ctx.vm("wanted")?.with("--device", &device).words(words);
        let mut vmm = spec.start()?;
        vmm.report("shell", BOOT)?;
        vmm.do_task("arrived", SOON)?;
        vmm.do_task("disk", SOON).context("before")?;
        let name = vf.clone();
        // The kernel waits until nobody has it.
        let unbind = thread::spawn(move || {
            std::fs::write("/sys/bus/pci/drivers/vfio-pci/unbind", name).context("unbind")
        });
        let deadline = Instant::now() + SOON;
        wait_until(deadline, || unbind.is_finished().then_some(()))
            .context("the host does not get it back")?;
        unbind
            .join()
            .map_err(|_| anyhow::anyhow!("it panicked"))??;
        vmm.do_task("gone", SOON)
            .context("the guest has it still")?;
        let told = events(&vmm, "disk")?;
        ctx.say(format!("{told:?}"));
        ensure!(
            told.first().is_some_and(|name| name == "device-requested"),
            "{told:?}"
        );
        ensure!(
            told.last().is_some_and(|name| name == "device-removed"),
            "{told:?}"
        );
        let driver = folder(vf).join("driver");
        ensure!(!Path::exists(&driver), "{} is there", driver.display());
        vmm.send("exit\n")?;
        vmm.wait_poweroff(SOON)?;
    }
    Ok(())
}

/// An open node that a process started from here has, too.
fn opened(path: &Path) -> anyhow::Result<File> {
    let file = File::options().read(true).write(true).open(path);
    let file = file.with_context(|| path.display().to_string())?;
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
    Ok(file)
}

/// The VMM opens nothing itself: it finds what it is told in the descriptors it was started with.
pub(super) fn handed_over(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vf = assigned_vfs()?.remove(0);
    for (node, space) in [
        (device_node(&vf)?, "/dev/iommu"),
        (group_node(&vf)?, "/dev/vfio/vfio"),
    ] {
        ctx.say(format!("{} and {space}", node.display()));
        let (node, space) = (opened(&node)?, opened(Path::new(space))?);
        let (fd, iommu_fd) = (node.as_raw_fd(), space.as_raw_fd());
        let device = format!("vfio={vf},fd={fd},iommu-fd={iommu_fd}");
        let words = "lab.do=shell lab.disk=/dev/nvme0n1 lab.mib=4";
        let mut vmm = ctx
            .vm("handed")?
            .with("--device", &device)
            .words(words)
            .start()?;
        drop((node, space));
        vmm.report("shell", BOOT)?;
        vmm.do_task("disk", SOON)?;
        vmm.send("exit\n")?;
        vmm.wait_poweroff(SOON)?;
    }
    ctx.say("a descriptor that is something else");
    let null = opened(Path::new("/dev/null"))?;
    let device = format!("vfio={vf},fd={}", null.as_raw_fd());
    let refused = ctx
        .vm("null")?
        .with("--device", &device)
        .start_refused(SOON)?;
    ctx.say(&refused);
    ensure!(
        refused.contains("is /dev/null, expected /dev/vfio/"),
        "{refused}"
    );
    Ok(())
}
