//! `drover gpu assign`, `show` and `release`: the GPUs of a running VM.

// Brackets in help texts are not links.
#![allow(rustdoc::broken_intra_doc_links)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Error, Result, bail};
use clap::Args;
use vmm::config::VmName;
use vmm::machine::DeviceInfo;

use crate::args::NameJsonArgs;
use crate::control::{block_on, find, print_json};
use crate::device::{add_to, placed, remove_from};
use crate::values::{self, Gpus};

/// What the list of devices calls a GPU, or a part of one.
const KIND: &str = "gpu";

/// How long the guest has to let one go that is given back.
const GIVE_BACK_SECONDS: u64 = 30;

#[derive(Debug, Args)]
pub(super) struct AssignArgs {
    /// Name of the VM.
    name: VmName,
    /// auto[,count=N][,type=NAME|ID|whole][,vram=>=SIZE][,id=], or pci=BDF[,...].
    #[arg(value_name = "LIST", default_value = "auto", value_parser = values::gpus)]
    gpus: Gpus,
    /// Seconds that each may take until it is open.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ReleaseArgs {
    /// Name of the VM.
    name: VmName,
    /// Names of those to release, as `drover gpu show` lists them; all when absent.
    ids: Vec<String>,
    /// Seconds that the guest has to let each go.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
    /// Print JSON: those that are gone, as `drover gpu show --json` had them, also when one is not.
    #[arg(long)]
    json: bool,
}

pub(super) fn assign(args: &AssignArgs) -> Result<ExitCode> {
    let within = Duration::from_secs(args.timeout);
    let Gpus(gpus) = &args.gpus;
    let mut added = Vec::new();
    for gpu in gpus {
        match add_to(&args.name, gpu, within) {
            Ok(device) => added.push(device),
            Err(error) => return Err(give_back(&args.name, &added, error)),
        }
    }
    if !args.json {
        added
            .iter()
            .for_each(|device| println!("{}", placed(&args.name, device)));
    }
    match args.json {
        true => print_json(&added),
        false => Ok(ExitCode::SUCCESS),
    }
}

/// All or none: what was added before one could not be goes again. What has become of it is said with why.
fn give_back(name: &VmName, added: &[DeviceInfo], why: Error) -> Error {
    let mut left = Vec::new();
    for device in added.iter().rev() {
        if let Err(error) = remove_from(name, &device.id, GIVE_BACK_SECONDS) {
            left.push(format!("{}: {error:#}", device.id));
        }
    }
    match (added.len(), left.is_empty()) {
        (0, _) => why,
        (count, true) => why.context(format!(
            "not all can be had: what {name} had been given, {count} so far, was given back"
        )),
        (_, false) => why.context(format!(
            "not all can be had, and of the others {name} keeps some: {}",
            left.join("; ")
        )),
    }
}

/// The GPUs that a VM has.
fn gpus_of(name: &VmName) -> Result<Vec<DeviceInfo>> {
    let client = find(name)?;
    let devices: Vec<DeviceInfo> = block_on(async { Ok(client.get("/v1/devices").await?) })?;
    let gpus = devices.into_iter().filter(|device| device.kind == KIND);
    Ok(gpus.collect())
}

pub(super) fn show(args: &NameJsonArgs) -> Result<ExitCode> {
    let gpus = gpus_of(&args.name)?;
    if args.json {
        return print_json(&gpus);
    }
    if gpus.is_empty() {
        println!("{} has no GPU", args.name);
    }
    for gpu in &gpus {
        println!("{}", placed(&args.name, gpu));
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn release(args: &ReleaseArgs) -> Result<ExitCode> {
    let gpus = gpus_of(&args.name)?;
    let has = |id: &String| gpus.iter().any(|gpu| gpu.id == *id);
    if let Some(unknown) = args.ids.iter().find(|id| !has(id)) {
        bail!("VM {} has no GPU called {unknown:?}", args.name);
    }
    let mut gone = Vec::new();
    let mut failure = None;
    for gpu in gpus {
        if !args.ids.is_empty() && !args.ids.contains(&gpu.id) {
            continue;
        }
        if let Err(error) = remove_from(&args.name, &gpu.id, args.timeout) {
            failure = Some(error);
            break;
        }
        if !args.json {
            println!("{} is gone from {}", gpu.id, args.name);
        }
        gone.push(gpu);
    }
    let printed = match args.json {
        true => print_json(&gone),
        false => Ok(ExitCode::SUCCESS),
    };
    failure.map_or(printed, Err)
}
