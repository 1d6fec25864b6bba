//! `drover gpu partition`: dividing GPUs, now and at every boot.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};
use vmm::gpu::{
    Divided, Division, GpuAddress, PartitionError, Partitioner, SETTINGS_FILE, Settings,
    SettingsLock,
};

use super::HostArgs;
use super::steady::Steady;

/// A VM or another program has a part of it, or all.
const BUSY: u8 = 4;

pub(super) const EXIT_CODES: &str = "Exit codes:
  0  the GPU is divided as asked, or was so already
  1  it could not be; nothing has changed, unless the message says so
  2  the command line is wrong
  4  it is in use; nothing has changed";

/// How many partitions: a number, or `off` for none.
#[derive(Clone, Copy, Debug)]
struct Parts(u32);

impl FromStr for Parts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("off", _) => Ok(Self(0)),
            (_, Ok(count @ 1..)) => Ok(Self(count)),
            _ => Err("expected a number from 1, or off".to_owned()),
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct PartitionArgs {
    /// The GPU's address or name, as `drover gpu list` shows it.
    #[arg(
        value_name = "GPU",
        required_unless_present = "restore",
        requires = "into"
    )]
    gpu: Option<GpuAddress>,
    /// Into how many equal partitions, or off.
    #[arg(value_name = "COUNT|off", required_unless_present = "restore")]
    into: Option<Parts>,
    /// The partitions' type, by name or number, for drivers that have types; of a type that is named
    /// there may be fewer than fit.
    #[arg(long = "type", value_name = "NAME|ID")]
    kind: Option<String>,
    /// Keep it for the next boot, too.
    #[arg(long)]
    save: bool,
    /// Divide all GPUs as it was kept: what drover-gpu.service does at boot.
    #[arg(long, conflicts_with_all = ["gpu", "into", "kind", "save"])]
    restore: bool,
    /// Where it is kept [default: /etc/drover/gpu-partitions.toml; none with --sysfs-root]
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// NVIDIA's sriov-manage, where it is not in /usr/lib/nvidia.
    #[arg(long, value_name = "FILE")]
    sriov_manage: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

pub(super) fn partition(args: &PartitionArgs) -> Result<ExitCode> {
    let (tree, claims) = (args.host.tree(), args.host.claims());
    let partitioner = Partitioner::new(&tree, &claims);
    let partitioner = match &args.sriov_manage {
        Some(program) => partitioner.with_sriov_manage(program),
        None => partitioner,
    };
    let (Some(gpu), Some(into)) = (args.gpu, args.into) else {
        return restore(args, &partitioner);
    };
    let division = Division {
        count: into.0,
        kind: args.kind.clone(),
    };
    // What cannot be kept is not begun.
    let edited = match args.save {
        true => Some(Edited::begin(args, gpu)?),
        false => None,
    };
    // Half-way it would be neither as asked nor as before.
    let _steady = Steady::begin(format!("waits until GPU {gpu} is divided"))?;
    let divided = match partitioner.divide(gpu, &division) {
        Ok(divided) => divided,
        Err(error) => {
            let code = exit_code(&error);
            eprintln!("drover: {:#}", anyhow::Error::from(error));
            return Ok(ExitCode::from(code));
        }
    };
    if let Some(mut edited) = edited {
        edited.settings.keep(&tree, gpu, &division);
        let stored = edited.settings.store(&edited.path);
        stored.with_context(|| format!("GPU {gpu} is divided, but not at the next boot"))?;
    }
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&divided)?),
        false => show(&divided),
    }
    Ok(ExitCode::SUCCESS)
}

/// What is kept, which nobody else changes meanwhile.
struct Edited {
    path: PathBuf,
    settings: Settings,
    _lock: SettingsLock,
}

impl Edited {
    fn begin(args: &PartitionArgs, gpu: GpuAddress) -> Result<Self> {
        let path = args.settings()?;
        let edited = Settings::edit(&path);
        let (settings, _lock) = edited.with_context(|| format!("GPU {gpu} is left as it is"))?;
        Ok(Self {
            path,
            settings,
            _lock,
        })
    }
}

impl PartitionArgs {
    /// Where divisions are kept: those of another tree not among this host's.
    fn settings(&self) -> Result<PathBuf> {
        match (&self.settings, &self.host.sysfs_root) {
            (Some(path), _) => Ok(path.clone()),
            (None, None) => Ok(SETTINGS_FILE.into()),
            (None, Some(root)) => bail!(
                "{SETTINGS_FILE} is this host's: name another file for {} by --settings",
                root.display()
            ),
        }
    }
}

fn exit_code(error: &PartitionError) -> u8 {
    match error {
        PartitionError::Busy { .. } => BUSY,
        _ => 1,
    }
}

fn show(divided: &Divided) {
    let already = if divided.changed { "" } else { " already" };
    match divided.partitions.len() {
        0 => println!("{} is not divided{already}", divided.gpu),
        1 => println!("{} is divided into 1 partition{already}:", divided.gpu),
        count => println!(
            "{} is divided into {count} partitions{already}:",
            divided.gpu
        ),
    }
    for address in &divided.partitions {
        println!("  {address}");
    }
}

/// All are tried; the worst of what came of it is the exit code.
fn restore(args: &PartitionArgs, partitioner: &Partitioner<'_>) -> Result<ExitCode> {
    let path = args.settings()?;
    // Nothing is kept before the first is; but who names a file means one.
    if let (Some(named), false) = (&args.settings, path.exists()) {
        bail!("there is no file {}", named.display());
    }
    let settings = Settings::load(&path)?;
    let mut codes = Vec::new();
    let mut results = Vec::new();
    let steady = Steady::begin("waits until the GPU in hand is divided".to_owned())?;
    let mut replayed = partitioner.replay(&settings);
    while !steady.is_asked_to_end()
        && let Some((gpu, result)) = replayed.next()
    {
        match result {
            Ok(divided) => {
                results.push(serde_json::to_value(&divided)?);
                if !args.json {
                    show(&divided);
                }
            }
            Err(error) => {
                codes.push(exit_code(&error));
                let error = format!("{:#}", anyhow::Error::from(error));
                eprintln!("drover: {error}");
                results.push(json!({ "gpu": gpu, "error": error }));
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&Value::from(results))?);
    }
    if steady.is_asked_to_end() {
        bail!("a signal came: GPUs that have not been told of are left as they are");
    }
    Ok(match codes.iter().min() {
        Some(code) => ExitCode::from(*code),
        None => ExitCode::SUCCESS,
    })
}
