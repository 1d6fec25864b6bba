//! What a VMM needs besides the guest's memory.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::Options;
use super::figure::{Better, Figure, Goal};
use super::net::{HOST_TAP, Network};
use super::peer::{MachineSpec, Peer, Peers};
use super::round::alternate;
use crate::harness::follower::Follower;
use crate::harness::proc::ProcessView;
use crate::harness::process;

const LIMIT: Duration = Duration::from_secs(30);
const MIB: f64 = 1024.0 * 1024.0;

pub(super) fn measure(peers: &Peers<'_>, _: &Options) -> anyhow::Result<Vec<Figure>> {
    let _network = Network::create()?;
    let image = peers.ground.scratch().join("memory.img");
    std::fs::File::create(&image)?.set_len(64 << 20)?;
    // The disk has worked, the network does.
    let machine = MachineSpec {
        cmdline: "run=blk,net blk.len=4M net.ms=0".to_owned(),
        disk: Some(image),
        tap: Some(HOST_TAP),
        ..MachineSpec::default()
    };
    let pairs = alternate(1, |peer| own_pss_mib(peers, peer, &machine))?;
    Ok(vec![
        Figure::paired(
            "memory besides the guest's (PSS)",
            "MiB",
            Better::Less,
            &pairs,
        )
        .goal(Goal::AtMost(5.0)),
    ])
}

fn own_pss_mib(peers: &Peers<'_>, peer: Peer, machine: &MachineSpec) -> anyhow::Result<f64> {
    let mut command = peers.command(peer, machine);
    process::die_with_parent(&mut command, libc::SIGKILL);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn()?;
    let mut console = Follower::follow(child.stdout.take().context("piped")?);
    let ready = |line: &str| line.contains("command=net event=started").then_some(());
    let measured = console
        .wait_line(LIMIT, ready)
        .and_then(|()| ProcessView::of(child.id()).own_pss_bytes());
    child.kill()?;
    child.wait()?;
    let bytes = measured.with_context(|| format!("{peer:?}: {}", console.text()))?;
    ensure!(bytes > 0, "{peer:?} uses no memory");
    // Sizes of processes are far below 2^53.
    #[allow(clippy::cast_precision_loss)]
    Ok(bytes as f64 / MIB)
}
