//! `drover demo`: the built-in guest under load, moved from this process to another.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use vmm::config::{ByteSize, CharTarget, VmConfig};
use vmm::control::{Client, RuntimeDir};
use vmm::host::link::LinkUrl;
use vmm::machine::{EndReason, LaunchOptions, VmHandle};
use vmm::migrate::{MigrationOutcome, MigrationReport, MigrationRequest};

use crate::args::DemoArgs;
use crate::control::block_on;
use crate::ending::Ending;
use crate::migrate::{print_report, watch};
use crate::units::time;

/// A bare-metal guest: a PVH ELF that runs commands from its command line.
pub(crate) static GUEST: &[u8] = include_bytes!(env!("DROVER_GUEST_ELF"));

/// Fills 192 MiB, then writes to their pages one after the other, 100 MiB of pages a second and a few
/// bytes in each, and after 8 s checks all of them.
const LOAD: &str = "run=dirty dirty.dirty_len=192M dirty.prefill=text dirty.rate_mib_s=100 dirty.seconds=8 \
                    dirty.progress_ms=1000";

/// How the guest says that it has filled them.
const LOAD_STARTED: &str = "command=dirty event=started";

/// How long that may take.
const START_LIMIT: Duration = Duration::from_secs(30);

const NAME: &str = "demo";

pub(crate) fn demo(args: DemoArgs) -> Result<ExitCode> {
    match args.cmdline {
        Some(cmdline) => stay(cmdline),
        None => moved(),
    }
}

fn config(cmdline: String, serial: CharTarget) -> VmConfig {
    let mut config = VmConfig::default();
    config.memory.size = ByteSize::mib(256);
    config.serial = serial;
    config.boot.cmdline = cmdline;
    config
}

/// Runs the guest in this process to its end.
fn stay(cmdline: String) -> Result<ExitCode> {
    let options = LaunchOptions {
        builtin_kernel: Some(GUEST),
        handle_signals: true,
        ..LaunchOptions::default()
    };
    let vm = VmHandle::launch(config(cmdline, CharTarget::Stdio), options).context("demo")?;
    Ok(ExitCode::from(vm.wait().exit_code()))
}

/// Runs the guest in this process and moves it to another.
fn moved() -> Result<ExitCode> {
    let scratch = Scratch::new()?;
    println!(
        "A VM with 256 MiB starts in process {}.",
        std::process::id()
    );
    let source = RuntimeDir::at(scratch.0.join("first"));
    let serial = scratch.0.join("first.serial");
    let mut config = config(LOAD.to_owned(), CharTarget::File(serial.clone()));
    config.name = NAME.parse()?;
    let options = LaunchOptions {
        builtin_kernel: Some(GUEST),
        runtime_dir: Some(source.clone()),
        handle_signals: true,
    };
    let vm = VmHandle::launch(config, options).context("demo")?;
    let mut second = Second::start(&scratch.0.join("second"))?;
    println!(
        "Process {} waits for it at {}.",
        second.child.id(),
        second.url
    );
    for line in wait_for_load(&serial)?.lines() {
        println!("[first process] {line}");
    }
    println!("It moves, live:");
    let client = Client::new(source.find(&NAME.parse()?)?);
    let request = MigrationRequest::to(vec![second.url.clone()]);
    let ending = block_on(async { watch(&client, &request, false).await })?;
    let Ending::Told(report) = ending else {
        bail!("the first process has ended before the VM has moved");
    };
    print_report(&report);
    if report.outcome != MigrationOutcome::Migrated {
        bail!("the VM has not moved");
    }
    let reason = vm.wait();
    if reason != EndReason::Migrated {
        bail!("the first process ended otherwise: {reason}");
    }
    second.finish(&report)
}

/// What the guest has said on its serial port, up to when it is under load.
fn wait_for_load(serial: &Path) -> Result<String> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let said = std::fs::read_to_string(serial)
            .with_context(|| format!("serial port {}", serial.display()))?;
        if let Some((_, rest)) = said.split_once(LOAD_STARTED)
            && let Some(end) = rest.find('\n')
        {
            let length = said.len() - rest.len() + end;
            return Ok(said[..length].to_owned());
        }
        if Instant::now() > deadline {
            let seconds = START_LIMIT.as_secs();
            bail!("the guest is not under load after {seconds} s: {said:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The process that the VM moves to.
struct Second {
    child: Child,
    output: BufReader<ChildStdout>,
    url: LinkUrl,
}

impl Second {
    fn start(runtime_dir: &Path) -> Result<Self> {
        let program = std::env::current_exe().context("this program's own path")?;
        let mut child = Command::new(program)
            .args(["receive", "--name", NAME, "--json"])
            .args(["--listen", "tcp://127.0.0.1:0", "--serial", "stdio"])
            .env("DROVER_RUNTIME_DIR", runtime_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("the second process cannot be started")?;
        let stdout = child.stdout.take().expect("it was asked for");
        let mut output = BufReader::new(stdout);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let told: serde_json::Value =
            serde_json::from_str(&line).context("the second process does not listen")?;
        let url = serde_json::from_value(told["listening"].clone())?;
        Ok(Self { child, output, url })
    }

    /// Shows what the guest says to its end, which tells whether its memory is whole.
    fn finish(&mut self, report: &MigrationReport) -> Result<ExitCode> {
        let mut verdict = None;
        for line in (&mut self.output).lines() {
            let line = line?;
            println!("[second process] {line}");
            if line.contains("command=dirty") && line.contains("result=") {
                verdict = Some(line);
            }
        }
        let status = self.child.wait()?;
        let verdict = verdict.context("the guest has not said whether its memory is whole")?;
        let field = |name: &str| {
            let mut words = verdict.split_whitespace();
            let value = words.find_map(|word| word.strip_prefix(name));
            value.unwrap_or("?").to_owned()
        };
        if !status.success() || field("bad=") != "0" || field("result=") != "ok" {
            bail!("the guest found its memory damaged: {verdict}");
        }
        let blackout = report.blackout.map_or(0, |blackout| blackout.total_us);
        println!(
            "\nThe guest has checked {} pages after the move: all as it had written them.\n\
             It stood still for {}.",
            field("checked="),
            time(blackout)
        );
        Ok(ExitCode::SUCCESS)
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        // After a good end there is nobody left to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory for control sockets, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let name = format!("drover-demo-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).with_context(|| format!("directory {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            log::debug!(path:? = self.0, error:% = error; "could not be removed");
        }
    }
}
