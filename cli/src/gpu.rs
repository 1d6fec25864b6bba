//! `drover gpu`: the GPUs of this host and of others.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use vmm::gpu::{Gpu, Partition, PartitionState, SysfsTree, compare, inventory};

use crate::units;

/// Of what `gpu list --json` prints, many times what any host has.
const LIST_MAX_BYTES: u64 = 16 << 20;

/// The hosts' GPUs are not the same.
const DIFFERENT: u8 = 3;

const COMPARE_EXIT_CODES: &str = "Exit codes:
  0  the hosts have the same GPUs, divided in the same way
  1  a file could not be read
  2  the command line is wrong
  3  they are not the same, or there is none that can be partitioned";

#[derive(Debug, Args)]
pub(crate) struct GpuArgs {
    #[command(subcommand)]
    command: GpuCommand,
}

#[derive(Debug, Subcommand)]
enum GpuCommand {
    /// List this host's GPUs, and what each is divided into.
    List(ListArgs),
    /// Tell whether hosts have the same GPUs to partition, so that VMs can move between them.
    #[command(after_help = COMPARE_EXIT_CODES)]
    Compare(CompareArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// A copy of a host's /sys, to look at instead.
    #[arg(long, value_name = "DIR")]
    sysfs_root: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct CompareArgs {
    /// What `drover gpu list --json` printed, of one host each.
    #[arg(required = true, num_args = 2.., value_name = "HOST.JSON")]
    hosts: Vec<PathBuf>,
    /// Print JSON: a list of what is not the same.
    #[arg(long)]
    json: bool,
}

pub(crate) fn gpu(args: GpuArgs) -> Result<ExitCode> {
    match args.command {
        GpuCommand::List(args) => list(&args),
        GpuCommand::Compare(args) => compare_hosts(&args),
    }
}

fn list(args: &ListArgs) -> Result<ExitCode> {
    let tree = match &args.sysfs_root {
        Some(root) => SysfsTree::at(root),
        None => SysfsTree::of_host(),
    };
    let gpus = inventory(&tree).context("the GPUs of this host cannot be listed")?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&gpus)?);
    } else if gpus.is_empty() {
        println!("there is no GPU");
    } else {
        gpus.iter().for_each(show);
    }
    Ok(ExitCode::SUCCESS)
}

/// Some lines for a person.
fn show(gpu: &Gpu) {
    let unnamed = || format!("{:04x}:{:04x}", gpu.vendor_id.0, gpu.device_id.0);
    let name = gpu.name.clone().unwrap_or_else(unnamed);
    let memory = gpu.vram_bytes.map(units::size);
    let memory = memory.unwrap_or_else(|| "memory not known".to_owned());
    println!("{}  {name}, {memory}", gpu.address);
    println!("  {}: {}", gpu.status, gpu.reason);
    if let Some(counts) = &gpu.valid_partition_counts {
        println!("  can be divided into {}", ranges(counts));
    }
    println!("  {}", place(gpu));
    for partition in &gpu.partitions {
        println!("    {}", part(partition));
    }
}

/// Its driver, and where it is.
fn place(gpu: &Gpu) -> String {
    let driver = match (&gpu.driver, &gpu.driver_version) {
        (Some(driver), Some(version)) => format!("driver {driver} {version}"),
        (Some(driver), None) => format!("driver {driver}"),
        (None, _) => "no driver".to_owned(),
    };
    let group = gpu.iommu_group.map(|group| format!("IOMMU group {group}"));
    let node = gpu.numa_node.map(|node| format!("NUMA node {node}"));
    let parts = [Some(driver), group, node];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn part(partition: &Partition) -> String {
    let state = partition.state.map(|state| match state {
        PartitionState::Free => "free".to_owned(),
        PartitionState::Claimed => match &partition.owner {
            Some(owner) => format!("in use by {owner}"),
            None => "in use".to_owned(),
        },
    });
    let moves = match (partition.migratable, &partition.reason) {
        (Some(true), _) => Some("can move".to_owned()),
        (Some(false), Some(why)) => Some(format!("cannot move: {why}")),
        (Some(false), None) => Some("cannot move".to_owned()),
        (None, _) => None,
    };
    let known = [
        Some(partition.address.clone()),
        partition.kind.clone(),
        partition.vram_bytes.map(units::size),
        state,
        moves,
    ];
    known.into_iter().flatten().collect::<Vec<_>>().join("  ")
}

/// `1 to 4, 8`: numbers that follow each other are not all written.
fn ranges(numbers: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let written = runs.into_iter().map(|(first, last)| match last - first {
        0 => first.to_string(),
        1 => format!("{first}, {last}"),
        _ => format!("{first} to {last}"),
    });
    written.collect::<Vec<_>>().join(", ")
}

fn compare_hosts(args: &CompareArgs) -> Result<ExitCode> {
    let hosts = args.hosts.iter().map(|path| {
        let gpus = read(path)?;
        Ok((path.display().to_string(), gpus))
    });
    let hosts: Vec<(String, Vec<Gpu>)> = hosts.collect::<Result<_>>()?;
    let mismatches = compare(&hosts);
    let mut gpus = hosts.iter().flat_map(|(_, gpus)| gpus);
    let is_none = !gpus.any(Gpu::is_partitionable);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&mismatches)?);
    } else if is_none {
        println!("none of these hosts has a GPU that can be partitioned");
    } else if mismatches.is_empty() {
        println!("the GPUs of these {} hosts are the same", hosts.len());
    } else {
        println!("the GPUs of these hosts are not the same:");
        for mismatch in &mismatches {
            println!("{}", mismatch.property);
            for found in &mismatch.values {
                println!("  {}", printable(&found.to_string()));
            }
        }
    }
    Ok(match mismatches.is_empty() && !is_none {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(DIFFERENT),
    })
}

/// Without what could steer a terminal: another host has written it.
fn printable(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).collect()
}

fn read(path: &Path) -> Result<Vec<Gpu>> {
    let mut text = String::new();
    let file = File::open(path).with_context(|| format!("{} cannot be opened", path.display()))?;
    file.take(LIST_MAX_BYTES + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    if text.len() as u64 > LIST_MAX_BYTES {
        bail!("{} is too long for a list of GPUs", path.display());
    }
    let what = || {
        let path = path.display();
        format!("{path} is not what `drover gpu list --json` prints")
    };
    serde_json::from_str(&text).with_context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_written_as_a_range() {
        for (numbers, written) in [
            (&[][..], ""),
            (&[1], "1"),
            (&[1, 2], "1, 2"),
            (&[1, 2, 3, 4, 6, 8, 12, 24], "1 to 4, 6, 8, 12, 24"),
            (&[u32::MAX], "4294967295"),
        ] {
            assert_eq!(ranges(numbers), written);
        }
    }
}
