//! Many processes that start at once and all want a part of a GPU that the kernel divides, and what is left
//! when some of them are killed.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use vfio::gpu::{ClaimError, ClaimedDevice, Claims, GpuRequest, SysfsTree};

use super::gpu_parts::{GPU, owners};
use crate::harness::follower::Follower;
use crate::lab::ctx::{Ctx, run};
use crate::lab::sriov;
use crate::lab::vmm::DROVER;

const PROCESSES: usize = 50;
/// For all to say something: each of them claims alone.
const LIMIT: Duration = Duration::from_secs(120);
/// Where the kernel has the devices that were made.
const DEVICES: &str = "/sys/bus/mdev/devices";
const TYPES: &str = "/sys/devices/virtual/mbochs/mbochs/mdev_supported_types";

fn request_of(kind: &str, count: usize) -> anyhow::Result<GpuRequest> {
    Ok(GpuRequest {
        kind: Some(kind.to_owned()),
        count: u32::try_from(count)?,
        ..GpuRequest::default()
    })
}

/// The process that `lab_agent claim WHAT` is: claims a part of this type, or the first of these functions
/// that it can have, when it is told to, says how that went, and gives it back when its standard input ends.
pub(in crate::lab) fn claim_one(what: &str) -> anyhow::Result<()> {
    println!("ready");
    std::io::stdin().read_exact(&mut [0])?;
    let vm = format!("vm-{}", std::process::id());
    match what.contains(':') {
        true => claim_function(what, &vm),
        false => claim_part(what, &vm),
    }
}

fn claim_function(addresses: &str, vm: &str) -> anyhow::Result<()> {
    let (tree, claims) = (SysfsTree::of_host(), Claims::of_host());
    let (mut claimed, mut refused) = (None, Vec::new());
    for address in addresses.split(',') {
        match claims.acquire_device(&tree, address, vm) {
            Ok(device) => {
                println!("claimed {address}");
                claimed = Some(device);
                break;
            }
            Err(error @ ClaimError::Taken { .. }) => refused.push(error.to_string()),
            Err(error) => return Err(error.into()),
        }
    }
    if claimed.is_none() {
        println!("refused {}", refused.join("; "));
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(claimed);
    Ok(())
}

fn claim_part(kind: &str, vm: &str) -> anyhow::Result<()> {
    let (tree, claims) = (SysfsTree::of_host(), Claims::of_host());
    let request = request_of(kind, 1)?;
    let claimed = match claims.acquire(&tree, &request, vm) {
        Ok(claimed) => {
            let addresses: Vec<_> = claimed.iter().map(|part| part.address()).collect();
            println!("claimed {}", addresses.join(","));
            claimed
        }
        Err(ClaimError::Exhausted { details, .. }) => {
            println!("refused {details}");
            Vec::new()
        }
        Err(error) => return Err(error.into()),
    };
    std::io::stdin().read_to_end(&mut Vec::new())?;
    for part in claimed {
        part.release()?;
    }
    Ok(())
}

/// A process that claims. It is killed at the end.
struct Claimer {
    child: Child,
    says: Follower,
}

impl Claimer {
    fn start(kind: &str) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["claim", kind])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a process that claims")?;
        let says = child.stdout.take().context("no standard output")?;
        let says = Follower::follow(says);
        Ok(Self { child, says })
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let line = self.says.wait_line(LIMIT, |line| Some(line.to_owned()));
        line.context("a process that claims says nothing")
    }

    fn begin(&mut self) -> anyhow::Result<()> {
        let stdin = self.child.stdin.as_mut().context("it has ended")?;
        Ok(stdin.write_all(b"!")?)
    }

    /// By SIGKILL.
    fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// In order, with its part given back.
    fn end(mut self) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "it could not give its part back");
        Ok(())
    }
}

impl Drop for Claimer {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The mediated devices that there are.
fn devices() -> anyhow::Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(DEVICES).with_context(|| format!("cannot read {DEVICES}"))?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        Ok(entry?.file_name().to_string_lossy().into_owned())
    };
    entries.map(name).collect()
}

/// How many more of this type the driver would make.
fn available(kind: &str) -> anyhow::Result<usize> {
    let file = Path::new(TYPES).join(kind).join("available_instances");
    let text = std::fs::read_to_string(&file);
    let text = text.with_context(|| format!("cannot read {}", file.display()))?;
    Ok(text.trim().parse()?)
}

/// What came of a race.
struct Outcome {
    winners: Vec<Claimer>,
    /// What they have, one each.
    claimed: BTreeSet<String>,
    /// What the others were told.
    refused: Vec<String>,
}

/// All begin at once, and as many as there are have one of `what`.
fn contest(what: &str, parts: usize) -> anyhow::Result<Outcome> {
    let mut claimers = (0..PROCESSES)
        .map(|_| Claimer::start(what))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for claimer in &mut claimers {
        let line = claimer.line()?;
        ensure!(line == "ready", "{line}");
    }
    for claimer in &mut claimers {
        claimer.begin()?;
    }
    let (mut winners, mut claimed, mut refused) = (Vec::new(), BTreeSet::new(), Vec::new());
    for mut claimer in claimers {
        let line = claimer.line()?;
        match line.split_once(' ') {
            Some(("claimed", part)) => {
                ensure!(claimed.insert(part.to_owned()), "{part} was given twice");
                winners.push(claimer);
            }
            Some(("refused", details)) => refused.push(details.to_owned()),
            _ => bail!("a process that claims says '{line}'"),
        }
    }
    ensure!(
        winners.len() == parts && refused.len() == PROCESSES - parts,
        "{} claimed, {} refused",
        winners.len(),
        refused.len()
    );
    Ok(Outcome {
        winners,
        claimed,
        refused,
    })
}

/// A part each, and the others are told who has all of them.
fn race(ctx: &Ctx, kind: &str, parts: usize) -> anyhow::Result<Vec<Claimer>> {
    ctx.say(format!("{PROCESSES} processes want one of {parts}: {kind}"));
    let Outcome {
        winners,
        claimed,
        refused,
    } = contest(kind, parts)?;
    ensure!(
        devices()? == claimed,
        "claimed are {claimed:?}, but there are {:?}",
        devices()?
    );
    let pids = winners.iter().map(|winner| winner.child.id());
    let owners: Vec<_> = pids.map(|pid| format!("by vm-{pid} (pid {pid})")).collect();
    for details in &refused {
        ensure!(
            details.contains(&format!("all {parts} partitions are taken"))
                && owners.iter().all(|owner| details.contains(owner)),
            "all {parts} and who has them are to be named: {details}"
        );
    }
    ctx.say(refused.first().context("nobody is refused")?);
    Ok(winners)
}

/// A third is killed: what they had can be had, and not one more. The others end: all can be had.
fn reuse(ctx: &Ctx, kind: &str, mut winners: Vec<Claimer>) -> anyhow::Result<()> {
    let (tree, claims) = (SysfsTree::of_host(), Claims::of_host());
    let more = |vm: &str| match claims.acquire(&tree, &request_of(kind, 1)?, vm) {
        Err(ClaimError::Exhausted { .. }) => Ok(()),
        other => bail!("one more: {other:?}"),
    };
    let parts = winners.len();
    let killed = parts.div_ceil(3);
    for claimer in winners.drain(..killed) {
        claimer.kill()?;
    }
    ctx.say(format!("{killed} of {parts} are killed"));
    let again = claims.acquire(&tree, &request_of(kind, killed)?, "next")?;
    ensure!(again.len() == killed, "{again:?}");
    more("more")?;
    drop(again);
    for claimer in winners {
        claimer.end()?;
    }
    let all = claims.acquire(&tree, &request_of(kind, parts)?, "last")?;
    let addresses: BTreeSet<_> = all.iter().map(|part| part.address()).collect();
    ensure!(
        addresses.len() == parts && devices()? == addresses,
        "{addresses:?}"
    );
    more("more")?;
    for part in all {
        part.release()?;
    }
    ctx.say(format!("all {parts} could be had again"));
    Ok(())
}

/// First the parts are made for whoever claims them, then they are there.
pub(super) fn fifty(ctx: &mut Ctx) -> anyhow::Result<()> {
    let made = "mbochs-medium";
    let parts = available(made)?;
    ensure!(devices()?.is_empty() && (2..PROCESSES).contains(&parts));
    let winners = race(ctx, made, parts)?;
    reuse(ctx, made, winners)?;
    ensure!(
        devices()?.is_empty() && available(made)? == parts,
        "of {parts} there are {:?} left",
        devices()?
    );

    let divided = "mbochs-large";
    let parts = available(divided)?;
    let partition = ["gpu", "partition", GPU];
    let count = parts.to_string();
    run(
        DROVER,
        &[&partition[..], &[&count, "--type", divided]].concat(),
    )?;
    let there = devices()?;
    ensure!(there.len() == parts, "{there:?}");
    let winners = race(ctx, divided, parts)?;
    reuse(ctx, divided, winners)?;
    ensure!(devices()? == there, "{there:?}, then {:?}", devices()?);
    ensure!(owners()? == vec![None; parts], "{:?}", owners()?);
    run(DROVER, &[&partition[..], &["off"]].concat())?;
    ensure!(devices()?.is_empty(), "{:?}", devices()?);
    Ok(())
}

/// Virtual functions of a real card, which are claimed by their names.
pub(super) fn seven_functions(ctx: &mut Ctx) -> anyhow::Result<()> {
    const FUNCTIONS: u16 = 7;
    let functions = sriov::network_functions(FUNCTIONS)?;
    let (what, parts) = (functions.join(","), functions.len());
    ctx.say(format!("{PROCESSES} processes want one of {what}"));
    let Outcome {
        mut winners,
        claimed,
        refused,
    } = contest(&what, parts)?;
    ensure!(
        claimed == functions.iter().cloned().collect(),
        "{claimed:?}"
    );
    let pids = winners.iter().map(|winner| winner.child.id());
    let owners: Vec<_> = pids
        .map(|pid| format!("vm-{pid} (pid {pid}) has it"))
        .collect();
    for told in &refused {
        ensure!(
            owners.iter().all(|owner| told.contains(owner)),
            "all that have one are to be named: {told}"
        );
    }
    ctx.say(refused.first().context("nobody is refused")?);
    let killed = winners.len().div_ceil(3);
    for claimer in winners.drain(..killed) {
        claimer.kill()?;
    }
    let (tree, claims) = (SysfsTree::of_host(), Claims::of_host());
    let free = |vm: &str| -> Vec<ClaimedDevice> {
        let claim = |address: &String| claims.acquire_device(&tree, address, vm).ok();
        functions.iter().filter_map(claim).collect()
    };
    let again = free("next");
    ensure!(
        again.len() == killed,
        "{} of {killed} can be had again",
        again.len()
    );
    drop(again);
    for claimer in winners {
        claimer.end()?;
    }
    let all = free("last");
    ensure!(
        all.len() == parts,
        "{} of {parts} can be had again",
        all.len()
    );
    ctx.say(format!(
        "{killed} were killed; all {parts} could be had again"
    ));
    Ok(())
}
