//! `drover demo`: the built-in guest.

use std::process::ExitCode;

use anyhow::{Context, Result};
use vmm::config::{ByteSize, CharTarget, VmConfig};
use vmm::machine::{LaunchOptions, VmHandle};

use crate::args::DemoArgs;

/// A bare-metal guest: a PVH ELF that runs commands from its command line.
pub(crate) static GUEST: &[u8] = include_bytes!(env!("DROVER_GUEST_ELF"));

pub(crate) fn demo(args: DemoArgs) -> Result<ExitCode> {
    let mut config = VmConfig::default();
    config.memory.size = ByteSize::mib(256);
    config.serial = CharTarget::Stdio;
    config.boot.cmdline = args.cmdline;
    let options = LaunchOptions {
        builtin_kernel: Some(GUEST),
        handle_signals: true,
        ..LaunchOptions::default()
    };
    let vm = VmHandle::launch(config, options).context("demo")?;
    Ok(ExitCode::from(vm.wait().exit_code()))
}
