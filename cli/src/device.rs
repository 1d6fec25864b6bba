//! `drover device`: assigned devices of a running VM.

// Brackets in help texts are not links.
#![allow(rustdoc::broken_intra_doc_links)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Args, Subcommand};
use vmm::config::{DeviceConfig, VmName};
use vmm::control::{Client, ClientError};
use vmm::machine::{DeviceInfo, EventKind, VmEvent};

use crate::args::NameJsonArgs;
use crate::control::{block_on, devices, find, print_json};
use crate::values;

#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    #[command(subcommand)]
    command: DeviceCommand,
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    /// List a VM's devices.
    List(NameJsonArgs),
    /// Add an assigned device to a VM; the guest is told.
    Add(AddArgs),
    /// Have the guest let an assigned device go, and take it away.
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
struct AddArgs {
    /// Name of the VM.
    name: VmName,
    /// vfio=BDF|UUID[,iommufd=on|off][,bind][,p2p][,fd=N[,iommu-fd=N]] of the host, or vfio-user=SOCKET of another process[,id=].
    #[arg(value_name = "DEVICE", value_parser = values::device)]
    device: DeviceConfig,
    /// Seconds that it may take until the device is open: all of the guest's memory is brought in
    /// for it.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// Name of the VM.
    name: VmName,
    /// Name of the device, as `drover device list` shows it.
    id: String,
    /// Seconds that the guest has to let it go.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn device(args: DeviceArgs) -> Result<ExitCode> {
    match args.command {
        DeviceCommand::List(args) => devices(&args.name, args.json),
        DeviceCommand::Add(args) => add(&args),
        DeviceCommand::Remove(args) => remove(&args),
    }
}

fn add(args: &AddArgs) -> Result<ExitCode> {
    let within = Duration::from_secs(args.timeout);
    let added = add_to(&args.name, &args.device, within)?;
    if args.json {
        return print_json(&added);
    }
    println!("{}", placed(&args.name, &added));
    Ok(ExitCode::SUCCESS)
}

/// Adds a device to a VM, which may take so long.
pub(crate) fn add_to(name: &VmName, device: &DeviceConfig, within: Duration) -> Result<DeviceInfo> {
    let client = find(name)?;
    let added = block_on(async {
        let answer = client.post_for("/v1/devices", device, within).await;
        answer.map_err(|error| match error {
            ClientError::Timeout { .. } => {
                anyhow!("{error}; the device is closed again once it is open")
            }
            error => error.into(),
        })
    });
    added.with_context(|| format!("VM {name}"))
}

/// Where a device is, for a person.
pub(crate) fn placed(name: &VmName, device: &DeviceInfo) -> String {
    let address = device.address.as_deref().unwrap_or("no PCI address");
    let host = device.host.as_deref().unwrap_or("a device");
    format!("{}: {host} is at {address} of {name}", device.id)
}

fn remove(args: &RemoveArgs) -> Result<ExitCode> {
    remove_from(&args.name, &args.id, args.timeout)?;
    if args.json {
        return print_json(&serde_json::json!({ "removed": args.id }));
    }
    println!("{} is gone from {}", args.id, args.name);
    Ok(ExitCode::SUCCESS)
}

/// Has a VM's guest let a device go, within so many seconds.
pub(crate) fn remove_from(name: &VmName, id: &str, seconds: u64) -> Result<()> {
    let client = find(name)?;
    let exchange = async {
        let next = next_event(&client).await?;
        client.delete(&format!("/v1/devices/{id}")).await?;
        let gone = wait_removed(&client, id, next);
        let gone = tokio::time::timeout(Duration::from_secs(seconds), gone).await;
        let late = || {
            anyhow!(
                "the guest has not let {id} go within {seconds} s; it may still do so, or not know \
                 how"
            )
        };
        gone.unwrap_or_else(|_| Err(late()))
    };
    block_on(exchange).with_context(|| format!("VM {name}"))
}

/// The number that the next event will have.
async fn next_event(client: &Client) -> Result<u64> {
    let past = client.get_text("/v1/events?follow=false").await?;
    let last = past.lines().next_back();
    let event: Option<VmEvent> = last.map(serde_json::from_str).transpose()?;
    Ok(event.map_or(0, |event| event.sequence + 1))
}

async fn wait_removed(client: &Client, id: &str, since: u64) -> Result<()> {
    let mut removed = false;
    let note = |line: &str| {
        if let Ok(event) = serde_json::from_str::<VmEvent>(line)
            && let EventKind::DeviceRemoved { device } = event.kind
        {
            removed = device == id;
        }
        !removed
    };
    // The event stream ends with the VM, sometimes in the middle of a line.
    match client
        .lines(&format!("/v1/events?since={since}"), note)
        .await
    {
        Ok(()) | Err(ClientError::Http(_)) if removed => Ok(()),
        Ok(()) | Err(ClientError::Http(_)) => Err(anyhow!("the VM has ended")),
        Err(error) => Err(error.into()),
    }
}
