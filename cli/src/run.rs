//! `drover run`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use vmm::config::{
    ConfigError, ConsoleConfig, LifecycleConfig, OnGuestEnd, Overrides, VmConfig, from_key_values,
};
use vmm::control::RuntimeDir;
use vmm::machine::{LaunchOptions, VmHandle};

use crate::args::RunArgs;
use crate::ending::ended;

pub(crate) fn run(args: RunArgs) -> Result<ExitCode> {
    let mut config = match &args.config {
        Some(path) => VmConfig::from_file(path)?,
        None => VmConfig::default(),
    };
    let dry_run = args.dry_run;
    overrides(args, &config.lifecycle)?.apply(&mut config);
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
    let vm = VmHandle::launch(config, options).with_context(|| format!("VM {name}"))?;
    Ok(ended(name.as_str(), vm.wait()))
}

fn overrides(args: RunArgs, file: &LifecycleConfig) -> Result<Overrides> {
    let lists = |flag, texts: Vec<String>| -> Result<Vec<_>> {
        texts
            .into_iter()
            .map(|text| key_values(flag, text, Some("path")))
            .collect()
    };
    Ok(Overrides {
        lifecycle: lifecycle(&args, file)?,
        name: args.name.map(|name| name.parse()).transpose()?,
        cpus: optional("--cpus", args.cpus, Some("count"))?,
        cpu_model: args.cpu.map(|model| model.parse()).transpose()?,
        memory: optional("--memory", args.memory, Some("size"))?,
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
        serial: args.serial.map(|target| target.parse()).transpose()?,
        console: match args.console {
            Some(target) => Some(ConsoleConfig {
                target: target.parse()?,
            }),
            None => None,
        },
        disk: lists("--disk", args.disk)?,
        net: list("--net", args.net)?,
        rng: optional("--rng", args.rng, None)?,
        balloon: optional("--balloon", args.balloon, Some("size"))?,
        vsock: optional("--vsock", args.vsock, None)?,
        fs: list("--fs", args.fs)?,
    })
}

/// Each reaction has a flag of its own; those not given stay as the file says.
fn lifecycle(args: &RunArgs, file: &LifecycleConfig) -> Result<Option<LifecycleConfig>> {
    let mut lifecycle = file.clone();
    let flags = [
        (
            "--on-poweroff",
            &args.on_poweroff,
            &mut lifecycle.on_poweroff,
        ),
        ("--on-reboot", &args.on_reboot, &mut lifecycle.on_reboot),
        ("--on-panic", &args.on_panic, &mut lifecycle.on_panic),
        (
            "--on-triple-fault",
            &args.on_triple_fault,
            &mut lifecycle.on_triple_fault,
        ),
    ];
    let mut given = false;
    for (flag, text, target) in flags {
        if let Some(text) = text {
            given = true;
            *target = action(text).with_context(|| format!("{flag} {text}"))?;
        }
    }
    Ok(given.then_some(lifecycle))
}

fn action(text: &str) -> Result<OnGuestEnd> {
    #[derive(serde::Deserialize)]
    struct Action {
        action: OnGuestEnd,
    }
    let parsed: Action = from_key_values(text, Some("action"))?;
    Ok(parsed.action)
}

fn list<T: DeserializeOwned>(flag: &'static str, texts: Vec<String>) -> Result<Vec<T>> {
    texts
        .into_iter()
        .map(|text| key_values(flag, text, None))
        .collect()
}

fn optional<T: DeserializeOwned>(
    flag: &'static str,
    text: Option<String>,
    main_key: Option<&'static str>,
) -> Result<Option<T>> {
    text.map(|text| key_values(flag, text, main_key))
        .transpose()
}

fn key_values<T: DeserializeOwned>(
    flag: &'static str,
    text: String,
    main_key: Option<&'static str>,
) -> Result<T> {
    match from_key_values(&text, main_key) {
        Ok(value) => Ok(value),
        Err(source) => Err(ConfigError::Flag { flag, text, source }.into()),
    }
}
