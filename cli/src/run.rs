//! `drover run`.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use vmm::config::{ConsoleConfig, LifecycleConfig, Overrides, VmConfig};
use vmm::control::RuntimeDir;
use vmm::machine::{LaunchError, LaunchOptions, ResourceError, VmHandle};

use crate::args::RunArgs;
use crate::ending::ended;
use crate::values::{Gpus, Usage};

pub(crate) fn run(args: RunArgs) -> Result<ExitCode> {
    let mut config = match &args.config {
        Some(path) => VmConfig::from_file(path)?,
        None => VmConfig::default(),
    };
    let dry_run = args.dry_run;
    overrides(args, &config.lifecycle).apply(&mut config);
    config.validate()?;
    if dry_run {
        print!("{}", config.to_toml());
        return Ok(ExitCode::SUCCESS);
    }
    let name = config.name.clone();
    let options = LaunchOptions {
        runtime_dir: Some(RuntimeDir::from_environment()),
        handle_signals: true,
        ..LaunchOptions::default()
    };
    let vm = match VmHandle::launch(config, options) {
        Err(error @ LaunchError::Resource(ResourceError::NoKernel)) => {
            bail!(Usage(format!("VM {name}: {error}")))
        }
        launched => launched.with_context(|| format!("VM {name}"))?,
    };
    Ok(ended(name.as_str(), vm.wait()))
}

fn overrides(args: RunArgs, file: &LifecycleConfig) -> Overrides {
    let gpus = args.gpu.iter().flat_map(|Gpus(gpus)| gpus.clone());
    let device = args.device.iter().cloned().chain(gpus).collect();
    Overrides {
        lifecycle: lifecycle(&args, file),
        name: args.name,
        cpus: args.cpus,
        cpu_model: args.cpu,
        memory: args.memory,
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
        serial: args.serial,
        console: args.console.map(|target| ConsoleConfig { target }),
        disk: args.disk,
        net: args.net,
        rng: args.rng,
        balloon: args.balloon,
        vsock: args.vsock,
        fs: args.fs,
        device,
    }
}

/// Each reaction has a flag of its own; those not given stay as the file says.
fn lifecycle(args: &RunArgs, file: &LifecycleConfig) -> Option<LifecycleConfig> {
    let mut lifecycle = file.clone();
    let flags = [
        (args.on_poweroff, &mut lifecycle.on_poweroff),
        (args.on_reboot, &mut lifecycle.on_reboot),
        (args.on_panic, &mut lifecycle.on_panic),
        (args.on_triple_fault, &mut lifecycle.on_triple_fault),
    ];
    let mut given = false;
    for (flag, target) in flags {
        if let Some(action) = flag {
            given = true;
            *target = action;
        }
    }
    given.then_some(lifecycle)
}
