//! `drover gpu`: the GPUs of this host and of others.

mod assign;
mod partition;
mod steady;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use vmm::gpu::{
    Claims, Counts, Gpu, GpuAddress, Partition, PartitionState, SysfsTree, compare, inventory_with,
};

use self::assign::{AssignArgs, ReleaseArgs};
use crate::args::NameJsonArgs;
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
    /// Divide a GPU into partitions that VMs can be given, or make it whole again.
    #[command(after_help = partition::EXIT_CODES)]
    Partition(partition::PartitionArgs),
    /// Tell whether hosts have the same GPUs to partition, so that VMs can move between them.
    #[command(after_help = COMPARE_EXIT_CODES)]
    Compare(CompareArgs),
    /// Give a running VM a GPU, or parts of one, whichever are free; its guest is told.
    Assign(AssignArgs),
    /// List the GPUs that a running VM has.
    Show(NameJsonArgs),
    /// Have the guest let GPUs go, and give them back.
    Release(ReleaseArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Whose GPUs.
#[derive(Debug, Args)]
struct HostArgs {
    /// Of another /sys than this host's: a copy of one, or a model's.
    #[arg(long, value_name = "DIR")]
    sysfs_root: Option<PathBuf>,
    /// Where it is kept who has which partition [default: $DROVER_GPU_CLAIMS, or /run/drover/gpu]
    #[arg(long, value_name = "DIR")]
    claims: Option<PathBuf>,
}

impl HostArgs {
    fn tree(&self) -> SysfsTree {
        match &self.sysfs_root {
            Some(root) => SysfsTree::at(root),
            None => SysfsTree::of_host(),
        }
    }

    fn claims(&self) -> Claims {
        match &self.claims {
            Some(dir) => Claims::at(dir),
            None => Claims::of_host(),
        }
    }
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
        GpuCommand::Partition(args) => partition::partition(&args),
        GpuCommand::Assign(args) => assign::assign(&args),
        GpuCommand::Show(args) => assign::show(&args),
        GpuCommand::Release(args) => assign::release(&args),
        GpuCommand::Compare(args) => compare_hosts(&args),
    }
}

fn list(args: &ListArgs) -> Result<ExitCode> {
    let gpus = inventory_with(&args.host.tree(), Some(&args.host.claims()));
    let gpus = gpus.context("the GPUs of this host cannot be listed")?;
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
    let unnamed = || match (gpu.vendor_id, gpu.device_id, gpu.address) {
        (Some(vendor), Some(device), _) => format!("{:04x}:{:04x}", vendor.0, device.0),
        (.., GpuAddress::Pci(_)) => "not known".to_owned(),
        (.., GpuAddress::Parent(_)) => "no PCI device".to_owned(),
    };
    let name = gpu.name.clone().unwrap_or_else(unnamed);
    let memory = gpu.vram_bytes.map(units::size);
    let memory = memory.unwrap_or_else(|| "memory not known".to_owned());
    println!("{}  {name}, {memory}", gpu.address);
    println!("  {}: {}", gpu.status, gpu.reason);
    if let Some(counts) = &gpu.valid_partition_counts {
        println!("  can be divided into {}", Counts(counts.clone()));
    }
    if let Some(owner) = &gpu.owner {
        println!("  in use by {}", printable(owner));
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
        partition.temporary.then(|| "goes with it".to_owned()),
        moves,
    ];
    known.into_iter().flatten().collect::<Vec<_>>().join("  ")
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
