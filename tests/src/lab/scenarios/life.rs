//! How VMs pause, end and start again, and the control commands.

use std::time::Duration;

use anyhow::{Context, ensure};

use crate::harness::process::describe;
use crate::lab::ctx::Ctx;
use crate::lab::vmm::{BOOT, SOON, Vmm};

pub(super) fn power_button(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut vmm = ctx.vm("button")?.words("lab.do=button").start()?;
    vmm.report("boot", BOOT)?;
    vmm.report_state("button", "waiting", SOON)?;
    vmm.ctl("shutdown", &[])?;
    vmm.report("button", SOON)?;
    vmm.wait_poweroff(SOON)
}

/// One line of the guest's ticks.
#[derive(Debug, Clone, Copy)]
struct Tick {
    number: u64,
    uptime_s: f64,
    time_s: u64,
}

fn tick(vmm: &mut Vmm) -> anyhow::Result<Tick> {
    let line = vmm.report_with("ticks", "tick", SOON)?;
    Ok(Tick {
        number: line.number("tick")?,
        uptime_s: line.number("uptime_s")?,
        time_s: line.number("time_s")?,
    })
}

pub(super) fn pause(ctx: &mut Ctx) -> anyhow::Result<()> {
    const PAUSE: Duration = Duration::from_secs(5);
    let mut vmm = ctx.vm("pause")?.cpus("2").words("lab.do=ticks").start()?;
    vmm.report("boot", BOOT)?;
    for _ in 0..5 {
        tick(&mut vmm)?;
    }
    vmm.ctl("pause", &[])?;
    let paused = vmm.ctl("info", &[])?;
    ensure!(paused["state"] == "paused", "info says {}", paused["state"]);
    // What was under way when it paused has reached the console; nothing follows.
    std::thread::sleep(PAUSE / 5);
    let before = vmm.console.text();
    std::thread::sleep(PAUSE * 4 / 5);
    ensure!(vmm.console.text() == before, "a paused guest still writes");
    let last_line = before
        .lines()
        .rfind(|line| line.starts_with("L2 task=ticks"))
        .context("no tick before the pause")?;
    ctx.say(format!("before: {last_line}"));
    let host_before = std::time::Instant::now();
    vmm.console.forget();
    vmm.ctl("resume", &[])?;

    let first = tick(&mut vmm)?;
    ctx.say(format!("first after: {first:?}"));
    let mut last = first;
    for _ in 0..20 {
        let next = tick(&mut vmm)?;
        ensure!(
            next.number == last.number + 1,
            "tick {} follows {}",
            next.number,
            last.number
        );
        ensure!(
            next.uptime_s >= last.uptime_s && next.time_s >= last.time_s,
            "the clock went back: {next:?}"
        );
        last = next;
    }
    // The guest's clock runs at the host's rate again; the emulation is slow, not exact.
    let guest_s = last.uptime_s - first.uptime_s;
    let host_s = host_before.elapsed().as_secs_f64();
    ensure!(
        guest_s > 1.0 && guest_s < host_s * 1.5 + 1.0,
        "{guest_s} s in the guest, {host_s} s on the host"
    );
    let text = vmm.console.text();
    for complaint in [
        "soft lockup",
        "rcu: INFO",
        "clocksource: timekeeping",
        "hung_task",
    ] {
        ensure!(
            !text.contains(complaint),
            "the guest complains: {complaint}"
        );
    }
    Ok(())
}

pub(super) fn reboot(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut vmm = ctx
        .vm("reboot")?
        .words("lab.do=cpus lab.end=reboot")
        .start()?;
    vmm.report("boot", BOOT)?;
    let mut events = vmm.events()?;
    vmm.report("cpus", SOON)?;
    for boot in 2..=3 {
        vmm.report("boot", BOOT)
            .with_context(|| format!("boot {boot}"))?;
        vmm.report("cpus", SOON)
            .with_context(|| format!("boot {boot}"))?;
    }
    events.wait_for("reset", SOON)?;
    vmm.ctl("stop", &[])?;
    vmm.wait_exit(SOON).map(drop)
}

pub(super) fn panic(ctx: &mut Ctx) -> anyhow::Result<()> {
    // panic=0: the guest stays in its panic, so that only pvpanic tells.
    let mut vmm = ctx
        .vm("panic")?
        .words("panic=0 lab.do=shell lab.end=panic")
        .start()?;
    vmm.report("shell", BOOT)?;
    let mut events = vmm.events()?;
    vmm.send("exit\n")?;
    let status = vmm.wait_exit(BOOT)?;
    vmm.console.wait_end(SOON)?;
    ensure!(
        vmm.console.text().contains("Kernel panic"),
        "the guest did not panic"
    );
    ensure!(
        !status.success() && status.code().is_some(),
        "a panic ended with {}",
        describe(status)
    );
    events.wait_for("panic", SOON).map(drop)
}

pub(super) fn control(ctx: &mut Ctx) -> anyhow::Result<()> {
    let mut vmm = ctx.vm("control")?.words("lab.end=hold").start()?;
    vmm.report("boot", BOOT)?;
    let info = vmm.ctl("info", &[])?;
    ensure!(
        info["name"] == "control" && info["state"] == "running",
        "info says {info}"
    );
    let listed = vmm.list()?.to_string();
    ensure!(listed.contains("\"control\""), "list says {listed}");
    ctx.say("a second VM of this name");
    let message = ctx.vm("control")?.start_refused(SOON)?;
    ensure!(
        message.contains("control"),
        "the refusal does not name the VM: {message}"
    );
    ctx.say("stop");
    vmm.ctl("stop", &[])?;
    vmm.wait_exit(SOON)?;
    ensure!(vmm.ctl("info", &[]).is_err(), "info still answers");
    ctx.say("the name is free again");
    let mut again = ctx.vm("control")?.start()?;
    again.report("boot", BOOT)?;
    again.wait_poweroff(SOON)
}
