//! `drover run`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use vmm::config::{ConfigError, Overrides, VmConfig, from_key_values};
use vmm::machine::{LaunchOptions, VmHandle};

use crate::args::RunArgs;

pub(crate) fn run(args: RunArgs) -> Result<ExitCode> {
    let mut config = match &args.config {
        Some(path) => VmConfig::from_file(path)?,
        None => VmConfig::default(),
    };
    let dry_run = args.dry_run;
    overrides(args)?.apply(&mut config);
    config.validate()?;
    if dry_run {
        print!("{}", config.to_toml());
        return Ok(ExitCode::SUCCESS);
    }
    let name = config.name.clone();
    let vm =
        VmHandle::launch(config, LaunchOptions::default()).with_context(|| format!("VM {name}"))?;
    let reason = vm.wait();
    Ok(ExitCode::from(reason.exit_code()))
}

fn overrides(args: RunArgs) -> Result<Overrides> {
    Ok(Overrides {
        name: args.name.map(|name| name.parse()).transpose()?,
        cpus: key_values("--cpus", args.cpus, Some("count"))?,
        cpu_model: args.cpu.map(|model| model.parse()).transpose()?,
        memory: key_values("--memory", args.memory, Some("size"))?,
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
        serial: args.serial.map(|serial| serial.parse()).transpose()?,
        ..Overrides::default()
    })
}

fn key_values<T: for<'de> serde::Deserialize<'de>>(
    flag: &'static str,
    text: Option<String>,
    main_key: Option<&'static str>,
) -> Result<Option<T>> {
    let Some(text) = text else { return Ok(None) };
    match from_key_values(&text, main_key) {
        Ok(value) => Ok(Some(value)),
        Err(source) => Err(ConfigError::Flag { flag, text, source }.into()),
    }
}
