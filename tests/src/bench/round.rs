//! One run of a guest, and rounds of them.

use std::time::Duration;

use anyhow::{Context, ensure};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::peer::{GUEST_MIB, MachineSpec, Peer, Peers};
use crate::harness::process;
use crate::harness::report::{Report, reports};

/// No run takes longer.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs `machine` to its end; all that the guest has reported.
pub(super) fn run(
    peers: &Peers<'_>,
    peer: Peer,
    machine: &MachineSpec,
) -> anyhow::Result<Vec<Report>> {
    let finished = process::run(&mut peers.command(peer, machine), LIMIT)?;
    let lines = reports(&finished.stdout);
    let done = lines.iter().find(|line| line.subject() == "done");
    let well = done.is_some_and(|done| done.get("result") == Some("ok"));
    ensure!(
        well,
        "{peer:?}: the guest did not end well: {}{}",
        finished.stdout,
        finished.stderr
    );
    Ok(lines)
}

/// Measures both in turn, `rounds` times, each beginning every other time.
pub(super) fn alternate<T>(
    rounds: usize,
    mut measure: impl FnMut(Peer) -> anyhow::Result<T>,
) -> anyhow::Result<Vec<(T, T)>> {
    let mut pairs = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let pair = if round % 2 == 0 {
            let drover = measure(Peer::Drover)?;
            (drover, measure(Peer::Qemu)?)
        } else {
            let qemu = measure(Peer::Qemu)?;
            (measure(Peer::Drover)?, qemu)
        };
        pairs.push(pair);
    }
    Ok(pairs)
}

/// Touches and frees as much memory as a guest needs and `extra_mib` more: where the host has
/// given memory away, the first touch costs a hundred times the second, and would be what is
/// measured.
pub(super) fn warm_memory(extra_mib: u64) -> anyhow::Result<()> {
    touch_memory(GUEST_MIB * 2 + extra_mib)
}

/// Touches and frees so much memory, see [`warm_memory`], in huge pages where there are some: a
/// host takes memory away in pieces of that size.
#[allow(unsafe_code)]
pub(super) fn touch_memory(mib: u64) -> anyhow::Result<()> {
    let bytes = usize::try_from(mib << 20).context("too much memory")?;
    let mapping = MmapRegion::<()>::new(bytes)?;
    // SAFETY: advice on a mapping that is ours alone.
    unsafe { libc::madvise(mapping.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
    for offset in (0..bytes).step_by(4096) {
        mapping.as_volatile_slice().write_obj(1_u8, offset)?;
    }
    Ok(())
}

/// A number with a fraction that the guest has reported.
pub(super) fn fraction(report: &Report, key: &str) -> anyhow::Result<f64> {
    let text = report.get(key);
    let text = text.with_context(|| format!("{report:?} has no {key}"))?;
    text.parse().with_context(|| format!("{key} is {text}"))
}
