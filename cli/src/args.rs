//! The command line as it is typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Runs virtual machines that can move.
#[derive(Debug, Parser)]
#[command(version, about)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a VM in this process until it ends.
    Run(RunArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Configuration file (TOML); flags override it.
    pub(crate) config: Option<PathBuf>,
    /// Name of the VM on this host.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Kernel: PVH ELF, vmlinux or bzImage.
    #[arg(long)]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long)]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long)]
    pub(crate) cmdline: Option<String>,
    /// Number of vCPUs and their arrangement: N[,sockets=,cores=,threads=,pin=[0-3],vmm-pin=[4]].
    #[arg(long)]
    pub(crate) cpus: Option<String>,
    /// CPU model and features taken away: host[,-FEATURE...].
    #[arg(long)]
    pub(crate) cpu: Option<String>,
    /// Memory: SIZE[,hugepages=2M|1G][,prefault][,numa=[0]].
    #[arg(long)]
    pub(crate) memory: Option<String>,
    /// Serial port: stdio, null, pty, file=PATH or socket=PATH.
    #[arg(long)]
    pub(crate) serial: Option<String>,
    /// Print the resolved configuration as TOML and exit.
    #[arg(long)]
    pub(crate) dry_run: bool,
}
