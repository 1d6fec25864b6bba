//! Disks: what the guest writes is what the host has.

use anyhow::{Context, ensure};

use crate::lab::ctx::{Ctx, run};
use crate::lab::image;
use crate::lab::vmm::{BOOT, SOON};

/// MiB that the guest writes.
const WRITTEN: u64 = 32;
/// MiB of a test disk.
const DISK: u64 = 64;

pub(super) fn raw(ctx: &mut Ctx) -> anyhow::Result<()> {
    let disk = ctx.scratch("disk.raw");
    image::create_raw(&disk, DISK)?;
    let sum = guest_writes(ctx, &disk, "format=raw")?;
    ensure!(
        image::sha256_raw(&disk, WRITTEN)? == sum,
        "the host reads other bytes than the guest wrote"
    );
    Ok(())
}

pub(super) fn qcow2(ctx: &mut Ctx) -> anyhow::Result<()> {
    let disk = ctx.scratch("disk.qcow2");
    image::create_qcow2(&disk, DISK)?;
    let sum = guest_writes(ctx, &disk, "format=qcow2")?;
    image::check_qcow2(&disk)?;
    let on_host = image::sha256_qcow2(&disk, &ctx.scratch("copy"), WRITTEN)?;
    ensure!(
        on_host == sum,
        "the host reads other bytes than the guest wrote"
    );
    Ok(())
}

/// Has a guest write and read back; the checksum it reports.
fn guest_writes(ctx: &Ctx, disk: &std::path::Path, options: &str) -> anyhow::Result<String> {
    let mut vmm = ctx
        .vm("disk")?
        .disk(disk, options)
        .words(&format!("lab.do=disk lab.disk=/dev/vda lab.mib={WRITTEN}"))
        .start()?;
    vmm.report("boot", BOOT)?;
    let report = vmm.report("disk", SOON)?;
    let sectors: u64 = report.number("sectors")?;
    ensure!(
        sectors * 512 == DISK * image::MIB,
        "the guest sees {sectors} sectors"
    );
    let sum = report.text("sha256")?.to_owned();
    vmm.wait_poweroff(SOON)?;
    Ok(sum)
}

pub(super) fn file_system(ctx: &mut Ctx) -> anyhow::Result<()> {
    let disk = ctx.scratch("fs.raw");
    image::create_ext4(&disk, DISK)?;
    let mut vmm = ctx
        .vm("fs")?
        .disk(&disk, "format=raw")
        .words("lab.do=fs")
        .start()?;
    vmm.report("boot", BOOT)?;
    let sum = vmm.report("fs", SOON)?.text("sha256")?.to_owned();
    vmm.wait_poweroff(SOON)?;
    image::check_ext4(&disk)?;
    let copy = ctx.scratch("written");
    let command = format!("dump /written {}", copy.display());
    run("debugfs", &["-R", &command, crate::lab::ctx::text(&disk)?])?;
    ensure!(
        image::sha256_raw(&copy, 8)? == sum,
        "the file on the host has another checksum"
    );
    Ok(())
}

pub(super) fn discard(ctx: &mut Ctx) -> anyhow::Result<()> {
    let disk = ctx.scratch("disk.raw");
    image::create_raw(&disk, DISK)?;
    let mut vmm = ctx
        .vm("discard")?
        .disk(&disk, "format=raw")
        .words(&format!("lab.do=disk,discard,shell lab.mib={WRITTEN}"))
        .start()?;
    vmm.report("disk", BOOT)?;
    vmm.report("discard", SOON)?;
    vmm.report("shell", SOON)?;
    vmm.send("exit\n")?;
    vmm.wait_poweroff(SOON)?;
    let left = image::allocated_bytes(&disk)?;
    ensure!(
        left < image::MIB,
        "{left} bytes of the discarded {WRITTEN} MiB still take space"
    );
    Ok(())
}

pub(super) fn read_only(ctx: &mut Ctx) -> anyhow::Result<()> {
    let disk = ctx.scratch("disk.raw");
    std::fs::write(&disk, vec![0xa5; usize::try_from(DISK * image::MIB)?])?;
    let before = image::sha256_raw(&disk, DISK)?;
    let mut vmm = ctx
        .vm("readonly")?
        .disk(&disk, "format=raw,readonly=on,serial=LAB-0042")
        .words(&format!("lab.do=diskread,diskfail lab.mib={DISK}"))
        .start()?;
    let seen = vmm.report("diskread", BOOT)?;
    ensure!(
        seen.text("sha256")? == before,
        "the guest reads other bytes"
    );
    ensure!(
        seen.text("readonly")? == "1",
        "the guest takes the disk for writable"
    );
    ensure!(
        seen.text("serial")? == "LAB-0042",
        "the disk's serial is {}",
        seen.text("serial")?
    );
    vmm.report("diskfail", SOON)?;
    vmm.wait_poweroff(SOON)?;
    ensure!(
        image::sha256_raw(&disk, DISK)? == before,
        "the image has changed"
    );
    Ok(())
}

pub(super) fn full_host(ctx: &mut Ctx) -> anyhow::Result<()> {
    // A host file system smaller than the disk that the guest sees.
    let (small, place) = (ctx.scratch("small.ext4"), ctx.scratch("small"));
    image::create_ext4(&small, 24)?;
    std::fs::create_dir(&place)?;
    run(
        "mount",
        &[
            "-o",
            "loop",
            crate::lab::ctx::text(&small)?,
            crate::lab::ctx::text(&place)?,
        ],
    )?;
    let disk = place.join("disk.raw");
    image::create_raw(&disk, DISK)?;
    let mut vmm = ctx
        .vm("full")?
        .disk(&disk, "format=raw")
        .words(&format!("lab.do=shell lab.mib={WRITTEN}"))
        .start()?;
    vmm.report("shell", BOOT)?;
    let mut events = vmm.events()?;
    let failed = vmm.do_task("disk", SOON).err();
    let failed = failed.context("32 MiB fitted on a full disk")?;
    ctx.say(format!("as it should be: {failed:#}"));
    ctx.say("the guest lives on, and the VMM tells");
    vmm.do_task("cpus", SOON)?;
    vmm.send("exit\n")?;
    events.wait_for("error", SOON)?;
    vmm.wait_poweroff(SOON)?;
    let messages = vmm.messages()?;
    ensure!(
        !messages.trim().is_empty(),
        "drover logged nothing about the full disk"
    );
    Ok(())
}

pub(super) fn lock(ctx: &mut Ctx) -> anyhow::Result<()> {
    let disk = ctx.scratch("disk.raw");
    image::create_raw(&disk, DISK)?;
    let spec = |name| {
        Ok::<_, anyhow::Error>(
            ctx.vm(name)?
                .disk(&disk, "format=raw")
                .words("lab.end=hold"),
        )
    };
    let mut first = spec("first")?.start()?;
    first.report("boot", BOOT)?;
    ctx.say("a second writer");
    let message = spec("second")?.start_refused(SOON)?;
    ensure!(
        message.contains("disk.raw"),
        "the refusal does not name the image: {message}"
    );
    ctx.say("kill -9, then another");
    first.kill9()?;
    let mut third = spec("third")?.start()?;
    third.report("boot", BOOT)?;
    // The name is free again as well.
    let mut again = ctx.vm("first")?.words("lab.end=hold").start()?;
    again.report("boot", BOOT).map(drop)
}
