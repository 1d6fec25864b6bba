//! The command line as it is typed.

// Doc comments here are help texts: brackets mean optional parts, not links.
#![allow(rustdoc::broken_intra_doc_links)]

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Exit codes of `drover run`, also shown by `drover run --help`.
const EXIT_CODES: &str = "Exit codes:
  0  the guest powered off, or the VM was stopped
  1  an error, told on standard error
  2  the command line is wrong
  3  the guest rebooted (with --on-reboot exit)
  4  the guest's kernel panicked
  5  the guest shut down by a triple fault
  6  a vCPU could not go on";

const KEY_VALUE_HELP: &str =
    "Lists are KEY=VALUE,KEY=VALUE; a key alone means on. A value in \"quotes\" or [brackets] may
contain commas. The same keys are used in the configuration file; --dry-run shows the result.";

/// Runs virtual machines that can move.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub(crate) struct Cli {
    /// How much to log on standard error: error, warn, info, debug or trace [default: $DROVER_LOG or warn].
    #[arg(long, global = true, value_name = "LEVEL")]
    pub(crate) log: Option<log::LevelFilter>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a VM in this process until it ends.
    #[command(after_help = EXIT_CODES, after_long_help = format!("{KEY_VALUE_HELP}\n\n{EXIT_CODES}"))]
    Run(Box<RunArgs>),
    /// Run the built-in guest.
    Demo(DemoArgs),
    /// List the VMs that run on this host.
    List(JsonArgs),
    /// Show a VM at a glance.
    Info(NameJsonArgs),
    /// Stop a VM's vCPUs and devices; guest time stands still.
    Pause(NameJsonArgs),
    /// Let a paused VM go on.
    Resume(NameJsonArgs),
    /// Press a VM's power button.
    Shutdown(ShutdownArgs),
    /// End a VM at once; the guest is not asked.
    Stop(NameJsonArgs),
    /// Reset a VM and start its guest anew.
    Reset(NameJsonArgs),
    /// List a VM's devices.
    Devices(NameJsonArgs),
    /// Show a VM's events.
    Events(EventsArgs),
    /// Show a VM's counters.
    Metrics(NameJsonArgs),
    /// Show or change how much memory a VM's guest is asked to give up.
    Balloon(BalloonArgs),
    /// Connect this terminal to a VM's serial port or console (started with pty or socket=PATH).
    Console(ConsoleArgs),
    /// Tell what this host can do for VMs, and how to mend what it cannot.
    Doctor(JsonArgs),
    /// Print shell completions.
    Completions(CompletionsArgs),
    /// Write man pages into a directory.
    Man(ManArgs),
    /// Print the control API's OpenAPI document.
    #[command(hide = true)]
    Openapi,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Configuration file (TOML); flags override it.
    #[arg(value_name = "VM.TOML")]
    pub(crate) config: Option<PathBuf>,
    /// Name of the VM on this host [default: vm-PID].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Kernel: PVH ELF, vmlinux or bzImage.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line [default: console=ttyS0].
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// vCPUs: N[,sockets=,cores=,threads=][,pin=[0-3]][,vmm-pin=[4]] [default: 1].
    #[arg(long, value_name = "N,...")]
    pub(crate) cpus: Option<String>,
    /// CPU model and features taken away: host[,-FEATURE...] [default: host].
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu: Option<String>,
    /// Memory: SIZE[,hugepages=2M|1G][,prefault][,numa=[0]] [default: 512M].
    #[arg(long, value_name = "SIZE,...")]
    pub(crate) memory: Option<String>,
    /// Serial port: stdio, null, pty, file=PATH or socket=PATH [default: stdio].
    #[arg(long, value_name = "TARGET")]
    pub(crate) serial: Option<String>,
    /// Virtio console: the same targets.
    #[arg(long, value_name = "TARGET")]
    pub(crate) console: Option<String>,
    /// Disk: path=FILE[,format=raw|qcow2][,readonly][,direct][,serial=][,queues=][,queue-size=]
    /// [,aio=io-uring|threads][,bytes-per-second=][,ops-per-second=][,id=], or vhost-user=SOCKET.
    #[arg(long, value_name = "LIST")]
    pub(crate) disk: Vec<String>,
    /// Network interface (a new TAP when nothing is given): [tap=NAME|fd=[N]|vhost-user=SOCKET][,mac=][,mtu=][,queues=][,queue-size=]
    /// [,offload=off][,bytes-per-second=][,packets-per-second=][,id=].
    #[arg(long, value_name = "LIST", num_args = 0..=1, default_missing_value = "queues=1")]
    pub(crate) net: Vec<String>,
    /// Entropy source: [source=FILE][,bytes-per-second=].
    #[arg(long, value_name = "LIST", num_args = 0..=1, default_missing_value = "source=/dev/urandom")]
    pub(crate) rng: Option<String>,
    /// Memory balloon: [size=][,deflate-on-oom][,free-page-reporting][,stats-interval=SECONDS].
    #[arg(long, value_name = "LIST", num_args = 0..=1, default_missing_value = "size=0")]
    pub(crate) balloon: Option<String>,
    /// Sockets to the host: cid=N,socket=PATH.
    #[arg(long, value_name = "LIST")]
    pub(crate) vsock: Option<String>,
    /// Shared directory behind virtiofsd: tag=NAME,socket=PATH[,queues=][,queue-size=][,id=].
    #[arg(long, value_name = "LIST")]
    pub(crate) fs: Vec<String>,
    /// When the guest powers off: exit, restart or pause [default: exit].
    #[arg(long, value_name = "ACTION")]
    pub(crate) on_poweroff: Option<String>,
    /// When the guest reboots [default: restart].
    #[arg(long, value_name = "ACTION")]
    pub(crate) on_reboot: Option<String>,
    /// When the guest's kernel panics [default: exit].
    #[arg(long, value_name = "ACTION")]
    pub(crate) on_panic: Option<String>,
    /// When the guest shuts down by a triple fault [default: exit].
    #[arg(long, value_name = "ACTION")]
    pub(crate) on_triple_fault: Option<String>,
    /// Print the resolved configuration as TOML and exit.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Commands for the guest, see tests/guest/README.md.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "run=hello,cpuid,clock,mem mem.len=64M"
    )]
    pub(crate) cmdline: String,
}

#[derive(Debug, Args)]
pub(crate) struct BalloonArgs {
    /// Name of the VM.
    pub(crate) name: String,
    /// How much the guest shall give up in all: 512M, 0; shown when absent.
    #[arg(value_name = "SIZE")]
    pub(crate) target: Option<vmm::config::ByteSize>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// Name of the VM.
    pub(crate) name: String,
    /// Which of the two; the serial port first when both can be reached.
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<Terminal>,
}

/// What a terminal can be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Terminal {
    /// The serial port.
    Serial,
    /// The virtio console.
    Console,
}

#[derive(Debug, Args)]
pub(crate) struct NameJsonArgs {
    /// Name of the VM.
    pub(crate) name: String,
    /// Print JSON; for a change of state, the name and the new state.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct JsonArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ShutdownArgs {
    /// Name of the VM.
    pub(crate) name: String,
    /// Wait until the VM has ended, for at most so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub(crate) wait: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Name of the VM.
    pub(crate) name: String,
    /// Wait for further events until the VM ends.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Leave out events with a smaller sequence number.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) since: u64,
    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Where the pages go; it must exist.
    pub(crate) directory: PathBuf,
}
