//! A serial card that the kernel's sample driver makes, in VMs of Drover's: it knows the legacy line
//! and no MSI that its guest would use.

use anyhow::{Context, ensure};

use super::vfio_mediated::Mediated;
use crate::lab::ctx::Ctx;
use crate::lab::vmm::{BOOT, SOON, Vmm};

const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa3001";
/// Two ports, which share the line.
const TYPE: &str = "mtty/mtty/mdev_supported_types/mtty-2";
const PORTS: usize = 2;
/// Lines of 15 bytes through each port.
const LINES: usize = 400;

/// The guest's 8250 driver sends through both ports at once and has all of it back, by interrupts
/// of a level-triggered pin of the I/O APIC, which is unmasked after each.
fn echo(ctx: &Ctx, vmm: &mut Vmm) -> anyhow::Result<()> {
    let report = vmm.do_task("serial", SOON)?;
    ctx.say(format!("{report:?}"));
    let ports = report.text("ports")?.split(',').count();
    ensure!(
        ports == PORTS
            && report.number::<usize>("arrived")? == PORTS * LINES
            && report.number::<usize>("bad")? == 0,
        "{PORTS} ports and {LINES} lines for each: {report:?}"
    );
    ensure!(
        report.text("driver")? == "serial",
        "another driver has the card: {report:?}"
    );
    ensure!(
        report.text("chip")? == "IO-APIC" && report.text("trigger")? == "level",
        "another line: {report:?}"
    );
    let interrupts: usize = report.number("interrupts")?;
    // A line is written when nothing else is on its way, so that one at least is sent by it: the ports
    // share interrupts.
    ensure!(
        interrupts >= LINES,
        "{interrupts} interrupts: the driver does without them"
    );
    ensure!(
        report.number::<usize>("complaints")? == 0,
        "the guest's kernel complains of the line: {report:?}"
    );
    Ok(())
}

/// One VM after the other has the card, through each of the kernel's ways.
pub(super) fn legacy_line(ctx: &mut Ctx) -> anyhow::Result<()> {
    let card = Mediated::create(TYPE, UUID)?;
    for iommufd in ["off", "on"] {
        ctx.say(format!("iommufd={iommufd}"));
        let mut vmm = ctx
            .vm("serial")?
            .with("--device", format!("vfio={UUID},iommufd={iommufd}"))
            .words(&format!("lab.do=shell lab.end=reboot lab.lines={LINES}"))
            .start()?;
        vmm.report("shell", BOOT)?;
        echo(ctx, &mut vmm)?;
        ctx.say("reboot");
        vmm.send("exit\n")?;
        vmm.report("shell", BOOT).context("after the reboot")?;
        echo(ctx, &mut vmm).context("after the reboot")?;
        vmm.kill9()?;
    }
    drop(card);
    Ok(())
}
