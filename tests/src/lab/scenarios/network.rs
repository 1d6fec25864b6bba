//! virtio-net over a tap.

use std::process::Stdio;

use anyhow::{Context, ensure};

use crate::lab::ctx::Ctx;
use crate::lab::image::{MIB, sha256_raw};
use crate::lab::network::TapNetwork;
use crate::lab::vmm::{BOOT, SOON};

/// MiB sent each way.
const SENT: u64 = 32;

pub(super) fn tap(ctx: &mut Ctx) -> anyhow::Result<()> {
    let network = TapNetwork::create(1)?;
    let words = format!(
        "lab.ip={} lab.peer={} lab.mib={SENT} lab.do=offloads,netserve,netsend",
        TapNetwork::GUEST,
        TapNetwork::PEER_ADDRESS
    );
    let mut vmm = ctx
        .vm("net")?
        .with(
            "--net",
            format!("tap={},mac=52:54:00:12:34:56", TapNetwork::TAP),
        )
        .words(&words)
        .start()?;
    vmm.report("boot", BOOT)?;
    let card = vmm.report("network", SOON)?;
    ensure!(
        card.text("mac")? == "52:54:00:12:34:56",
        "the card's address is {}",
        card.text("mac")?
    );
    let offloads = vmm.report("offloads", SOON)?;
    for feature in ["tx_csum", "tso"] {
        ensure!(
            offloads.text(feature)? == "on",
            "{feature} is {}",
            offloads.text(feature)?
        );
    }

    ctx.say("host to guest");
    let (sent, received) = (ctx.scratch("sent"), ctx.scratch("received"));
    std::fs::write(&sent, random(usize::try_from(SENT * MIB)?)?)?;
    vmm.report_state("netserve", "listening", SOON)?;
    // The peer is ready before the guest calls, which it does once it has received.
    let mut sink = network
        .peer("socat")
        .args([
            "-u",
            "TCP-LISTEN:7002,reuseaddr",
            &format!("CREATE:{}", received.display()),
        ])
        .spawn()
        .context("cannot start socat")?;
    let pushed = network
        .peer("socat")
        .args([
            "-u",
            &sent.display().to_string(),
            &format!("TCP:{}:7001", TapNetwork::GUEST_ADDRESS),
        ])
        .stdin(Stdio::null())
        .status()?;
    ensure!(pushed.success(), "socat could not send to the guest");
    let got = vmm.report("netserve", SOON)?;
    ensure!(
        got.text("sha256")? == sha256_raw(&sent, SENT)?,
        "the guest received other bytes"
    );

    ctx.say("guest to host");
    let before = network.peer_counters()?;
    let report = vmm.report("netsend", SOON)?;
    ensure!(sink.wait()?.success(), "socat did not receive");
    ensure!(
        report.text("sha256")? == sha256_raw(&received, SENT)?,
        "the host received other bytes"
    );
    let after = network.peer_counters()?;
    ctx.say(format!(
        "peer counters (rx packets, rx bytes, tx packets, tx bytes): {after:?}"
    ));
    // Without segmentation offload no packet is larger than the MTU.
    let mean = (after[1] - before[1]) / (after[0] - before[0]).max(1);
    ensure!(
        after[1] > SENT * MIB,
        "only {} bytes crossed the veth",
        after[1]
    );
    ensure!(
        mean > 1514,
        "packets of {mean} bytes on average: offloads do not cross the tap"
    );
    vmm.wait_poweroff(SOON)
}

pub(super) fn multi_queue(ctx: &mut Ctx) -> anyhow::Result<()> {
    let network = TapNetwork::create(2)?;
    let mut vmm = ctx
        .vm("net")?
        .cpus("2")
        .with("--net", format!("tap={},queues=2", TapNetwork::TAP))
        .words(&format!(
            "lab.ip={} lab.do=offloads,netserve",
            TapNetwork::GUEST
        ))
        .start()?;
    vmm.report("boot", BOOT)?;
    let offloads = vmm.report("offloads", SOON)?;
    ensure!(
        offloads.text("queues")? == "2",
        "the card has {} receive queues",
        offloads.text("queues")?
    );
    vmm.report_state("netserve", "listening", SOON)?;
    let ping = network
        .peer("ping")
        .args(["-c", "3", "-W", "5", TapNetwork::GUEST_ADDRESS])
        .status()?;
    ensure!(ping.success(), "the guest does not answer");
    Ok(())
}

pub(super) fn random(count: usize) -> anyhow::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = vec![0; count];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
