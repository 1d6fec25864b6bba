//! The command line as it is typed.

// Doc comments here are help texts: brackets mean optional parts, not links.
#![allow(rustdoc::broken_intra_doc_links)]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use vmm::config::{
    BalloonConfig, ByteSize, CharTarget, CpuModel, CpusConfig, DeviceConfig, DiskConfig, FsConfig,
    MemoryConfig, NetConfig, OnGuestEnd, RngConfig, VmName, VsockConfig,
};
use vmm::host::link::LinkUrl;
use vmm::migrate::{EncodingChoice, OnTimeout};

use crate::device::DeviceArgs;
use crate::gpu::GpuArgs;
use crate::values::{self, Bandwidth, Gpus, Streams};

/// Exit codes of `drover run`, also shown by `drover run --help`.
const EXIT_CODES: &str = "Exit codes:
  0  the guest powered off, or the VM was stopped, or has moved to another process
  1  an error, told on standard error
  2  the command line or the configuration file is wrong
  3  the guest rebooted (with --on-reboot exit)
  4  the guest's kernel panicked
  5  the guest shut down by a triple fault
  6  a vCPU could not go on";

/// Exit codes of `drover receive`: the VM's, once it has come.
const RECEIVE_EXIT_CODES: &str = "Exit codes:
  0  the guest powered off, the VM was stopped, or it has moved on
  1  an error, told on standard error; no VM has come
  2  the command line is wrong
  3  the guest rebooted, and the VM's configuration ends it then
  4  the guest's kernel panicked
  5  the guest shut down by a triple fault
  6  a vCPU could not go on";

/// Exit codes of `drover restore`.
const RESTORE_EXIT_CODES: &str = "Exit codes:
  0  the guest powered off, the VM was stopped, or it has moved on
  1  an error, told on standard error; the VM was not started
  2  the command line is wrong
  3  the guest rebooted, and the VM's configuration ends it then
  4  the guest's kernel panicked
  5  the guest shut down by a triple fault
  6  a vCPU could not go on, or with --lazy, memory could not be loaded";

/// Exit codes of `drover migrate`.
const MIGRATE_EXIT_CODES: &str = "Exit codes:
  0  the VM has moved; with --check, it would move and stand still no longer than --max-downtime
  1  it has not, and goes on where it was, unless it was stopped or has ended there meanwhile;
     with --check, it would not move so
  2  the command line is wrong; nothing was begun
  7  in doubt: it is paused here, or its process is gone, and it may run at the destination;
     somebody has to look
  8  the VM has moved, but the report (--report) could not be written";

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
    /// Run the built-in guest under load and move it, live, to a second process.
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
    /// List, add and remove a VM's assigned devices while it runs.
    Device(DeviceArgs),
    /// Show a VM's events.
    Events(EventsArgs),
    /// Show a VM's counters.
    Metrics(NameJsonArgs),
    /// Show or change how much memory a VM's guest is asked to give up.
    Balloon(BalloonArgs),
    /// Move a running VM to a `drover receive` process.
    #[command(after_help = MIGRATE_EXIT_CODES)]
    Migrate(Box<MigrateArgs>),
    /// Wait for one VM that another process sends with `drover migrate`, and run it.
    #[command(after_help = RECEIVE_EXIT_CODES)]
    Receive(Box<ReceiveArgs>),
    /// Show, cancel or change a VM's migration.
    Migration(MigrationArgs),
    /// Take a snapshot of a VM, which runs on.
    Snapshot(SnapshotArgs),
    /// Start a VM from a snapshot.
    #[command(after_help = RESTORE_EXIT_CODES)]
    Restore(Box<RestoreArgs>),
    /// Connect this terminal to a VM's serial port or console (started with pty or socket=PATH).
    Console(ConsoleArgs),
    /// Tell what this host can do for VMs, and how to mend what it cannot.
    Doctor(JsonArgs),
    /// List and divide GPUs, give parts of them to running VMs, and compare hosts.
    Gpu(GpuArgs),
    /// Print shell completions.
    Completions(CompletionsArgs),
    /// Write man pages into a directory.
    Man(ManArgs),
    /// Print the control API's OpenAPI document.
    Openapi,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Configuration file (TOML); flags override it.
    #[arg(value_name = "VM.TOML")]
    pub(crate) config: Option<PathBuf>,
    /// Name of the VM on this host [default: vm-PID].
    #[arg(long)]
    pub(crate) name: Option<VmName>,
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
    #[arg(long, value_name = "N,...", value_parser = values::cpus)]
    pub(crate) cpus: Option<CpusConfig>,
    /// CPU model and features taken away: host[,-FEATURE...] [default: host].
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu: Option<CpuModel>,
    /// Memory: SIZE[,hugepages=2M|1G][,thp=off][,prefault][,numa=[0]] [default: 512M].
    #[arg(long, value_name = "SIZE,...", value_parser = values::memory)]
    pub(crate) memory: Option<MemoryConfig>,
    /// Serial port: stdio, null, pty, file=PATH or socket=PATH [default: stdio].
    #[arg(long, value_name = "TARGET")]
    pub(crate) serial: Option<CharTarget>,
    /// Virtio console: the same targets.
    #[arg(long, value_name = "TARGET")]
    pub(crate) console: Option<CharTarget>,
    /// Disk: path=FILE[,format=raw|qcow2][,readonly][,direct][,serial=][,queues=][,queue-size=]
    /// [,aio=io-uring|threads][,bytes-per-second=][,ops-per-second=][,id=], or vhost-user=SOCKET.
    #[arg(long, value_name = "LIST", value_parser = values::disk)]
    pub(crate) disk: Vec<DiskConfig>,
    /// Network interface (a new TAP when nothing is given): [tap=NAME|fd=[N]|vhost-user=SOCKET][,mac=][,mtu=][,queues=][,queue-size=]
    /// [,offload=off][,bytes-per-second=][,packets-per-second=][,id=].
    #[arg(long, value_name = "LIST", num_args = 0..=1, default_missing_value = "queues=1", value_parser = values::net)]
    pub(crate) net: Vec<NetConfig>,
    /// Entropy source: [source=FILE][,bytes-per-second=].
    #[arg(long, value_name = "LIST", num_args = 0..=1, default_missing_value = "source=/dev/urandom", value_parser = values::rng)]
    pub(crate) rng: Option<RngConfig>,
    /// Memory balloon: [size=][,deflate-on-oom][,free-page-reporting][,stats-interval=SECONDS].
    #[arg(long, value_name = "LIST", num_args = 0..=1, default_missing_value = "size=0", value_parser = values::balloon)]
    pub(crate) balloon: Option<BalloonConfig>,
    /// Sockets to the host: cid=N,socket=PATH.
    #[arg(long, value_name = "LIST", value_parser = values::vsock)]
    pub(crate) vsock: Option<VsockConfig>,
    /// Shared directory behind virtiofsd: tag=NAME,socket=PATH[,queues=][,queue-size=][,id=].
    #[arg(long, value_name = "LIST", value_parser = values::fs)]
    pub(crate) fs: Vec<FsConfig>,
    /// Assigned device: vfio=BDF|UUID[,iommufd=on|off][,bind][,p2p][,fd=N[,iommu-fd=N]] of the host, or vfio-user=SOCKET of another process[,id=].
    #[arg(long, value_name = "LIST", value_parser = values::device)]
    pub(crate) device: Vec<DeviceConfig>,
    /// GPU, or a part of one, whichever is free: auto[,count=N][,type=NAME|ID|whole][,vram=>=SIZE][,id=], or pci=BDF[,...].
    #[arg(long, value_name = "LIST", value_parser = values::gpus)]
    pub(crate) gpu: Vec<Gpus>,
    /// When the guest powers off [default: exit].
    #[arg(long, value_name = "ACTION", value_parser = values::reaction())]
    pub(crate) on_poweroff: Option<OnGuestEnd>,
    /// When the guest reboots [default: restart].
    #[arg(long, value_name = "ACTION", value_parser = values::reaction())]
    pub(crate) on_reboot: Option<OnGuestEnd>,
    /// When the guest's kernel panics [default: exit].
    #[arg(long, value_name = "ACTION", value_parser = values::reaction())]
    pub(crate) on_panic: Option<OnGuestEnd>,
    /// When the guest shuts down by a triple fault [default: exit].
    #[arg(long, value_name = "ACTION", value_parser = values::reaction())]
    pub(crate) on_triple_fault: Option<OnGuestEnd>,
    /// Print the resolved configuration as TOML and exit.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Run these commands of the guest (see tests/guest/README.md) in this process alone, and
    /// move nothing.
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
}

/// What protects connections.
#[derive(Debug, Args)]
pub(crate) struct SecurityArgs {
    /// Our certificate for tls://, PEM, with those between it and the authority's.
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// The authority that signs the peer's certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Allow tcp:// to leave this host, unencrypted and to whoever answers.
    #[arg(long)]
    pub(crate) plaintext: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// Name of the VM.
    pub(crate) name: VmName,
    /// Ways to the destination, tried side by side: tcp://HOST:PORT, tls://HOST:PORT or unix:PATH.
    #[arg(value_name = "URL", required = true, value_parser = values::destination)]
    pub(crate) urls: Vec<LinkUrl>,
    /// Connections for memory: 1 to 16, or auto.
    #[arg(long, value_name = "N", default_value = "auto")]
    pub(crate) streams: Streams,
    /// Spread them over all URLs that work.
    #[arg(long)]
    pub(crate) multipath: bool,
    /// How memory travels.
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = values::encoding())]
    pub(crate) encoding: EncodingChoice,
    /// How long the VM may stand still.
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = values::downtime)]
    pub(crate) max_downtime: Duration,
    /// Limit of all connections together: 2Gbit, 100M (bytes per second), or none.
    #[arg(long, value_name = "RATE", default_value = "none")]
    pub(crate) bandwidth: Bandwidth,
    /// How long memory may be copied until the VM can be stopped: 10m, 1500ms.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = values::timeout)]
    pub(crate) timeout: Duration,
    /// What happens then: cancel, force (stop the VM however long the rest takes), or
    /// postcopy (the VM goes on at the destination, which fetches the rest).
    #[arg(long, value_name = "ACTION", default_value = "cancel", value_parser = values::on_timeout())]
    pub(crate) on_timeout: OnTimeout,
    /// Memory for pages sent before, which makes deltas possible [default: 1/4 of the VM's,
    /// 1 GiB at most].
    #[arg(long, value_name = "SIZE")]
    pub(crate) cache: Option<ByteSize>,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    /// Find out whether it would work, and what it would be like, and move nothing: every reason
    /// against it, on either host, the time that it would take, and how long the VM would stand
    /// still. The destination waits on afterwards.
    #[arg(long)]
    pub(crate) check: bool,
    /// Have the guest let its assigned devices go first, and move without them: the destination plugs
    /// in what its --device and --gpu say for them once the VM runs there. When the VM does not
    /// move, it gets its own back.
    #[arg(long, conflicts_with = "check")]
    pub(crate) detach: bool,
    /// Write a page that shows how it went.
    #[arg(long, value_name = "FILE.html", conflicts_with = "check")]
    pub(crate) report: Option<PathBuf>,
    /// The name that the destination's certificate must be for [default: the URL's host].
    #[arg(long, value_name = "NAME")]
    pub(crate) tls_server_name: Option<String>,
    /// Print JSON at the end, and no progress.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Name of the VM here.
    #[arg(long)]
    pub(crate) name: VmName,
    /// Where to listen: tcp://HOST:PORT (port 0 chooses one), tls://HOST:PORT or unix:PATH
    /// [default: the socket that the service manager hands over].
    #[arg(long, value_name = "URL")]
    pub(crate) listen: Option<LinkUrl>,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    #[command(flatten)]
    pub(crate) arrival: ArrivalArgs,
    /// Directory below which the source may name files; its TAPs are named by --tap then
    /// [default: anywhere for a source that comes over TLS or a unix socket, or over loopback TCP
    /// as a process of this user or of root; nowhere for any other, and over tcp:// with
    /// --plaintext].
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_path: Vec<PathBuf>,
    /// Print the address as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    /// Name of the VM.
    pub(crate) name: VmName,
    /// Where the snapshot goes; one that is there is replaced.
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
    /// How long the VM may stand still.
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = values::downtime)]
    pub(crate) max_downtime: Duration,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The snapshot.
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
    /// Name of the VM [default: as it was called].
    #[arg(long)]
    pub(crate) name: Option<VmName>,
    /// Start at once; memory is loaded when it is touched, and in the background.
    #[arg(long)]
    pub(crate) lazy: bool,
    /// Also when disks were written since the snapshot was taken.
    #[arg(long)]
    pub(crate) allow_changed_disks: bool,
    #[command(flatten)]
    pub(crate) arrival: ArrivalArgs,
    /// Directory below which the snapshot may name files [default: anywhere].
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_path: Vec<PathBuf>,
}

/// What is different from where a VM comes from.
#[derive(Debug, Args)]
pub(crate) struct ArrivalArgs {
    /// Serial port here, when not as the VM has it: stdio, null, pty, file=PATH or socket=PATH.
    #[arg(long, value_name = "TARGET")]
    pub(crate) serial: Option<CharTarget>,
    /// Virtio console here: the same targets.
    #[arg(long, value_name = "TARGET")]
    pub(crate) console: Option<CharTarget>,
    /// Where a disk is here: disk0=/srv/web.img.
    #[arg(long, value_name = "ID=PATH", value_parser = values::disk_here)]
    pub(crate) disk: Vec<(String, PathBuf)>,
    /// An interface's TAP here: net0=tap7.
    #[arg(long, value_name = "ID=NAME", value_parser = values::tap_here)]
    pub(crate) tap: Vec<(String, String)>,
    /// The socket of a device's vhost-user server here: disk1=/run/vub.sock.
    #[arg(long, value_name = "ID=SOCKET", value_parser = values::server_here)]
    pub(crate) vhost_user: Vec<(String, PathBuf)>,
    /// Which assigned device it is here: device0=vfio=0000:41:00.4 or device0=vfio-user=/run/gpu.sock,
    /// with the other keys of --device.
    #[arg(long, value_name = "ID=LIST", value_parser = values::device_here)]
    pub(crate) device: Vec<(String, DeviceConfig)>,
    /// Which GPU, or part of one, it is here: device0=auto or device0=pci=0000:41:00.4, with the other
    /// keys of --gpu [default: as the VM has it, where that is for this host to choose].
    #[arg(long, value_name = "ID=LIST", value_parser = values::gpu_here)]
    pub(crate) gpu: Vec<(String, DeviceConfig)>,
    /// Socket of vsock here.
    #[arg(long, value_name = "PATH")]
    pub(crate) vsock: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct MigrationArgs {
    #[command(subcommand)]
    pub(crate) command: MigrationCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MigrationCommand {
    /// Show the migration that runs, or the last one.
    Status(NameJsonArgs),
    /// Give it up; the VM goes on where it is.
    Cancel(NameJsonArgs),
    /// Change it while it runs.
    Set(MigrationSetArgs),
}

#[derive(Debug, Args)]
pub(crate) struct MigrationSetArgs {
    /// Name of the VM.
    pub(crate) name: VmName,
    /// Limit of all connections together: 2Gbit, 100M (bytes per second), or none.
    #[arg(long, value_name = "RATE")]
    pub(crate) bandwidth: Option<Bandwidth>,
    /// How long the VM may stand still.
    #[arg(long, value_name = "TIME", value_parser = values::downtime)]
    pub(crate) max_downtime: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct BalloonArgs {
    /// Name of the VM.
    pub(crate) name: VmName,
    /// How much the guest shall give up in all: 512M, 0; shown when absent.
    #[arg(value_name = "SIZE")]
    pub(crate) target: Option<ByteSize>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// Name of the VM.
    pub(crate) name: VmName,
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
    pub(crate) name: VmName,
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
    pub(crate) name: VmName,
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
    pub(crate) name: VmName,
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
