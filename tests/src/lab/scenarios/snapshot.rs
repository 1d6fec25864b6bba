//! A guest goes on where a snapshot was taken of it.
//!
//! Its disk is no part of a snapshot, so the scenario copies it: while the witness leaves it alone, as
//! a backup program would have a file system frozen, or while the VM is paused, in the middle of its
//! writes. Its TCP connection is left out: the peer has heard what the guest said after the snapshot,
//! and no connection can be taken back to before that.

use std::fs::{self, File, FileTimes};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::migrate::{DISK_MIB, with_witness};
use super::watched::{MARGIN, ask, verdict, wait_progress};
use crate::harness::process::wait_until;
use crate::lab::ctx::{Ctx, text};
use crate::lab::image;
use crate::lab::vm_spec::VmSpec;
use crate::lab::vmm::{BOOT, SOON, Vmm};
use crate::lab::witness::blocks;

/// What goes on without a peer.
const COUNTS: [&str; 4] = ["written0", "written1", "ticks0", "ticks1"];
/// How far each is to go on in a restored guest.
const ON: u64 = 100;

/// A snapshot with the disk of its moment.
struct Taken {
    folder: PathBuf,
    disk: PathBuf,
    /// Not later than the moment.
    since: Instant,
    /// Whether the VM was paused; else the witness leaves the disk alone.
    paused: bool,
}

impl Taken {
    fn take(ctx: &Ctx, vmm: &Vmm, disk: &Path, paused: bool) -> anyhow::Result<Self> {
        let name = if paused { "paused" } else { "live" };
        let (folder, copied) = (ctx.scratch(name), ctx.scratch(&format!("{name}.raw")));
        let since = Instant::now();
        let report = vmm.ctl("snapshot", &[text(&folder)?])?;
        ensure!(report["error"].is_null(), "{report}");
        ctx.say(format!("{name}: {report}"));
        copy(disk, &copied)?;
        Ok(Self {
            folder,
            disk: copied,
            since,
            paused,
        })
    }

    /// What `drover restore` is told, but for the disk.
    fn words(&self) -> anyhow::Result<Vec<String>> {
        let folder = text(&self.folder)?;
        Ok(["restore", folder, "--serial", "stdio"]
            .map(str::to_owned)
            .into())
    }
}

/// With its time of modification, by which `drover restore` knows a disk that has not changed.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::copy(from, to)?;
    let times = FileTimes::new().set_modified(fs::metadata(from)?.modified()?);
    Ok(File::options().write(true).open(to)?.set_times(times)?)
}

/// Snapshots of a guest that runs and of a paused one; restored at once and lazily.
pub(super) fn of_a_guest_at_work(ctx: &mut Ctx) -> anyhow::Result<()> {
    let disk = ctx.scratch("disk.raw");
    image::create_raw(&disk, DISK_MIB)?;
    let spec = ctx
        .vm("guest")?
        .initrd(with_witness(ctx)?)
        .cpus("2")
        .disk(&disk, "format=raw")
        .words("lab.do=shell");
    let mut vmm = spec.start()?;
    vmm.report("shell", BOOT)?;
    let churn = vmm.do_task("churn", SOON)?;
    ask(&mut vmm, "watch /dev/vda none")?;
    let before = wait_progress(&mut vmm, COUNTS, [0; 4], 1)?;

    ask(&mut vmm, "hold")?;
    let live = Taken::take(ctx, &vmm, &disk, false)?;
    ask(&mut vmm, "go")?;
    let between = wait_progress(&mut vmm, COUNTS, before, 1)?;
    vmm.ctl("pause", &[])?;
    let paused = Taken::take(ctx, &vmm, &disk, true)?;
    vmm.ctl("resume", &[])?;
    wait_progress(&mut vmm, COUNTS, between, 1)?;
    vmm.ctl("stop", &[])?;
    vmm.wait_exit(SOON)?;

    changed_disk_is_refused(ctx, &spec, &live)?;
    for (taken, lazy) in [(&live, false), (&live, true), (&paused, true)] {
        goes_on(ctx, &spec, taken, lazy, churn.text("sum")?).with_context(|| {
            let name = taken.folder.display();
            format!("restored from {name}, lazily: {lazy}")
        })?;
    }
    Ok(())
}

/// The guest's own disk was written since.
fn changed_disk_is_refused(ctx: &Ctx, spec: &VmSpec, taken: &Taken) -> anyhow::Result<()> {
    let mut vmm = spec.start_with(&taken.words()?)?;
    let status = vmm.wait_exit(SOON)?;
    let said = vmm.messages()?;
    ctx.say(said.trim());
    ensure!(
        !status.success() && said.contains("has changed since the snapshot was taken"),
        "drover restore ended with {status} and said '{said}'"
    );
    Ok(())
}

fn goes_on(ctx: &Ctx, spec: &VmSpec, taken: &Taken, lazy: bool, sum: &str) -> anyhow::Result<()> {
    let disk = ctx.scratch("again.raw");
    copy(&taken.disk, &disk)?;
    let mut words = taken.words()?;
    words.extend(["--disk".to_owned(), format!("disk0={}", text(&disk)?)]);
    if lazy {
        words.push("--lazy".to_owned());
    }
    let mut vmm = spec.start_with(&words)?;
    let expected = if taken.paused { "paused" } else { "running" };
    wait_state(&mut vmm, expected)?;
    if taken.paused {
        vmm.ctl("resume", &[])?;
    } else {
        ask(&mut vmm, "go")?;
    }
    let at = wait_progress(&mut vmm, COUNTS, [0; 4], 1)?;
    let still = taken.since.elapsed();
    let later = wait_progress(&mut vmm, COUNTS, at, ON)?;
    ctx.say(format!("{expected}, lazily {lazy}: {at:?} to {later:?}"));

    let report = verdict(&mut vmm, &[still])?;
    ctx.say(format!("{report:?}"));
    // However long that was, the guest has not seen one clock go on without the other.
    let apart = Duration::from_millis(report.number("apart_ms")?);
    ensure!(apart <= MARGIN, "clock and TSC differ by {apart:?}");
    let churned = vmm.do_task("churned", SOON)?;
    ensure!(
        churned.text("sum")? == sum,
        "memory has changed: {churned:?}"
    );
    vmm.do_task("cpus", SOON)?;
    ask(&mut vmm, "dmesg")?;
    vmm.send("exit\n")?;
    vmm.wait_poweroff(SOON)?;
    let written = [report.number("written0")?, report.number("written1")?];
    blocks::verify(&disk, &written, false).context("on the host")
}

/// Waits until the restored VM can be asked, and is as it was.
fn wait_state(vmm: &mut Vmm, expected: &str) -> anyhow::Result<()> {
    let info = wait_until(Instant::now() + SOON, || vmm.ctl("info", &[]).ok());
    let info = info.context("the VM cannot be asked")?;
    ensure!(info["state"] == expected, "it is not {expected}: {info}");
    Ok(())
}
