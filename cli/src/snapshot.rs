//! `drover snapshot` and `drover restore`.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use vmm::control::RuntimeDir;
use vmm::machine::{EventKind, LaunchOptions, RestoreOptions, VmHandle};
use vmm::migrate::{SnapshotReport, SnapshotRequest};

use crate::args::{RestoreArgs, SnapshotArgs};
use crate::control::{block_on, find, print_json};
use crate::demo::GUEST;
use crate::ending::{Ending, ended, follow};
use crate::receive::arrival;
use crate::units::{size, time};

pub(crate) fn snapshot(args: &SnapshotArgs) -> Result<ExitCode> {
    let client = find(&args.name)?;
    let micros = u64::try_from(args.max_downtime.as_micros()).unwrap_or(u64::MAX);
    let request = SnapshotRequest {
        // The VM's process may be in another directory.
        directory: std::path::absolute(&args.directory)?,
        max_downtime_us: micros,
    };
    let last_word = |event| match event {
        EventKind::SnapshotEnded { report } => Some(*report),
        _ => None,
    };
    let ending = block_on(async { follow(&client, "/v1/snapshot", &request, last_word).await })
        .with_context(|| format!("VM {}", args.name))?;
    let Ending::Told(report) = ending else {
        bail!("VM {} has ended before its snapshot was taken", args.name);
    };
    if args.json {
        print_json(&report)?;
    } else {
        print_report(&report);
    }
    Ok(match report.error {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
    })
}

fn print_report(report: &SnapshotReport) {
    let directory = report.directory.display();
    let name = &report.name;
    match &report.error {
        None => println!(
            "{name} is in {directory}: {} of memory, {} written in {}",
            size(report.memory_bytes),
            size(report.written_bytes),
            time(report.total_ms.saturating_mul(1000))
        ),
        Some(error) => {
            let goes_on = if report.paused {
                "is paused"
            } else {
                "goes on"
            };
            eprintln!("drover: there is no new snapshot of {name}, which {goes_on}: {error}");
        }
    }
    if let Some(still) = report.stood_still {
        println!("it stood still for {}", time(still.total_us));
    }
}

pub(crate) fn restore(args: RestoreArgs) -> Result<ExitCode> {
    let directory = args.directory.display().to_string();
    let allowed = Some(args.allow_path).filter(|dirs| !dirs.is_empty());
    let options = RestoreOptions {
        directory: std::path::absolute(&args.directory)?,
        name: args.name,
        lazy: args.lazy,
        allow_changed_disks: args.allow_changed_disks,
        arrival: arrival(args.arrival, allowed),
        launch: LaunchOptions {
            builtin_kernel: Some(GUEST),
            runtime_dir: Some(RuntimeDir::from_environment()),
            handle_signals: true,
        },
    };
    let vm = VmHandle::restore(options).with_context(|| format!("snapshot {directory}"))?;
    let name = vm.client().config().name.clone();
    Ok(ended(name.as_str(), vm.wait()))
}
