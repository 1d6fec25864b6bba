//! From exec to the guest's first byte.

use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::Options;
use super::figure::{Better, Figure, Goal};
use super::peer::{MachineSpec, Peer, Peers};
use super::round::{alternate, warm_memory};
use crate::harness::process;

/// Starts for each round of other measurements: one takes a few milliseconds.
const STARTS_PER_ROUND: usize = 4;
const LIMIT: Duration = Duration::from_secs(30);

pub(super) fn measure(peers: &Peers<'_>, options: &Options) -> anyhow::Result<Vec<Figure>> {
    warm_memory(0)?;
    let machine = MachineSpec {
        cmdline: "end=poweroff".to_owned(),
        ..MachineSpec::default()
    };
    // Programs and libraries come into the page cache.
    for peer in [Peer::Drover, Peer::Qemu] {
        first_byte_ms(peers, peer, &machine)?;
    }
    let rounds = options.rounds * STARTS_PER_ROUND;
    let pairs = alternate(rounds, |peer| first_byte_ms(peers, peer, &machine))?;
    let least = |pick: fn(&(f64, f64)) -> f64| pairs.iter().map(pick).fold(f64::MAX, f64::min);
    let least = [(least(|pair| pair.0), least(|pair| pair.1))];
    Ok(vec![
        Figure::paired("exec to first guest byte", "ms", Better::Less, &pairs)
            .goal(Goal::Ratio(0.25)),
        Figure::paired("  the fastest of all", "ms", Better::Less, &least),
    ])
}

fn first_byte_ms(peers: &Peers<'_>, peer: Peer, machine: &MachineSpec) -> anyhow::Result<f64> {
    let mut command = peers.command(peer, machine);
    process::die_with_parent(&mut command, libc::SIGKILL);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let start = Instant::now();
    let mut child = command.spawn()?;
    let mut console = child.stdout.take().context("piped")?;
    let mut first = [0];
    let read = console.read(&mut first)?;
    let elapsed = start.elapsed();
    ensure!(read == 1, "{peer:?} ended before its guest said a word");
    let mut rest = Vec::new();
    console.read_to_end(&mut rest)?;
    let ended = process::wait_exit(&mut child, LIMIT)?;
    ensure!(ended.is_some(), "{peer:?} does not end");
    Ok(elapsed.as_secs_f64() * 1e3)
}
