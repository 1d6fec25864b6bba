//! A virtual function of L1's network card in a VM of Drover's.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use super::network::random;
use super::vfio::bind;
use crate::harness::process::wait_exit;
use crate::lab::ctx::{Ctx, run};
use crate::lab::image::{MIB, sha256_raw};
use crate::lab::sriov;
use crate::lab::vmm::{BOOT, SOON};

/// MiB sent each way.
const SENT: u64 = 4;
const HOST: &str = "10.0.0.1";
const GUEST: &str = "10.0.0.2";
const MAC: &str = "52:54:00:aa:bb:77";

/// Takes the card's own interface into this scenario's namespace, and gives it an address.
fn take_interface() -> anyhow::Result<String> {
    let interface = sriov::network_interface()?;
    let here = std::process::id().to_string();
    let take = ["-t", "1", "-n", "ip", "link", "set", &interface, "netns"];
    run("nsenter", &[&take[..], &[&here]].concat())?;
    run("ip", &["address", "add", "10.0.0.1/24", "dev", &interface])?;
    run("ip", &["link", "set", &interface, "up"])?;
    Ok(interface)
}

/// The guest and the host send each other TCP streams through the card's own switch.
pub(super) fn traffic(ctx: &mut Ctx) -> anyhow::Result<()> {
    let vf = sriov::network_functions(1)?.remove(0);
    let interface = take_interface()?;
    run("ip", &["link", "set", &interface, "vf", "0", "mac", MAC])?;
    bind(&vf)?;
    let tasks = "lab.do=netserve,netsend,shell";
    let words = format!("lab.ip={GUEST}/24 lab.peer={HOST} lab.mib={SENT} {tasks}");
    let mut vmm = ctx
        .vm("net")?
        .with("--device", format!("vfio={vf}"))
        .words(&words)
        .start()?;
    vmm.report("boot", BOOT)?;
    let card = vmm.report("network", SOON)?;
    ensure!(card.text("mac")? == MAC, "the guest's card: {card:?}");

    ctx.say("host to guest");
    let (sent, received) = (ctx.scratch("sent"), ctx.scratch("received"));
    std::fs::write(&sent, random(usize::try_from(SENT * MIB)?)?)?;
    vmm.report_state("netserve", "listening", SOON)?;
    // The host is ready before the guest calls, which it does once it has received.
    let mut sink = Command::new("socat")
        .args(["-u", "TCP-LISTEN:7002,reuseaddr"])
        .arg(format!("CREATE:{}", received.display()))
        .spawn()
        .context("cannot start socat")?;
    let pushed = Command::new("socat")
        .args(["-u", &sent.display().to_string()])
        .arg(format!("TCP:{GUEST}:7001,retry=30"))
        .stdin(Stdio::null())
        .status()?;
    ensure!(pushed.success(), "socat could not send to the guest");
    let got = vmm.report("netserve", SOON)?;
    ensure!(
        got.text("sha256")? == sha256_raw(&sent, SENT)?,
        "the guest received other bytes"
    );
    ctx.say("guest to host");
    let report = vmm.report("netsend", SOON)?;
    // The guest stays until the last segment has arrived: what the card drops is sent once more.
    let end = wait_exit(&mut sink, SOON)?.context("the stream from the guest has no end")?;
    ensure!(end.success(), "socat did not receive: {end}");
    ensure!(
        report.text("sha256")? == sha256_raw(&received, SENT)?,
        "the host received other bytes"
    );
    vmm.send("exit\n")?;
    vmm.wait_poweroff(SOON)
}
