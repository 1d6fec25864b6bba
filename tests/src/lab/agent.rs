//! The side of the lab that runs in L1.
//!
//! `lab_agent serve` runs the requested scenarios one after another. Each gets a
//! process of its own (`lab_agent run NAME`), a network and a mount namespace, and
//! a cgroup. When it ends, in whatever way, killing the cgroup and dropping the
//! namespaces leaves nothing of it: no VMM, no tap, no netns.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::ctx::{Ctx, Skipped};
use super::protocol::{Event, REQUEST_FILE, Request, SHARE_IN_L1, Verdict};
use super::report::tail;
use super::scenario::Scenario;
use super::scenarios::TABLE;
use crate::harness::process::{describe, wait_until};

/// The serial port that carries verdicts.
const VERDICT_PORT: &str = "/dev/ttyS1";
const CGROUPS: &str = "/sys/fs/cgroup";
/// Exit status of a scenario's process that was skipped (as automake's tests do).
const EXIT_SKIPPED: i32 = 77;
/// In a scenario's log folder: why it failed or was skipped.
const REASON_FILE: &str = "reason.txt";
/// For killed processes to leave their cgroup.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// The `lab_agent` program.
///
/// # Errors
/// When the arguments are wrong or L1 is not what it should be; a scenario's own
/// failure is an exit status.
pub fn main(args: &[String]) -> anyhow::Result<ExitCode> {
    match args
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        ["serve"] => serve(&read_request()?).map(|()| ExitCode::SUCCESS),
        ["run", name] => run(&read_request()?, find(name)?),
        ["claim", kind] => super::scenarios::claim_one(kind).map(|()| ExitCode::SUCCESS),
        ["witness", args @ ..] => super::witness::main(args),
        _ => bail!(
            "usage: lab_agent serve | lab_agent run SCENARIO (inside the lab's L1) | \
             lab_agent claim TYPE|BDF,BDF... | lab_agent witness ..."
        ),
    }
}

fn read_request() -> anyhow::Result<Request> {
    let path = Path::new(SHARE_IN_L1).join(REQUEST_FILE);
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no request", path.display()))
}

fn find(name: &str) -> anyhow::Result<&'static Scenario> {
    TABLE
        .iter()
        .find(|scenario| scenario.name == name)
        .with_context(|| format!("unknown scenario '{name}'"))
}

fn log_folder(scenario: &Scenario) -> PathBuf {
    Path::new(SHARE_IN_L1).join("logs").join(scenario.name)
}

/// Runs all requested scenarios.
fn serve(request: &Request) -> anyhow::Result<()> {
    let mut port = OpenOptions::new()
        .write(true)
        .open(VERDICT_PORT)
        .context("no second serial port")?;
    let mut tell = |event: &Event| -> anyhow::Result<()> {
        Ok(port.write_all(format!("{}\n", event.to_line()?).as_bytes())?)
    };
    tell(&Event::Boot {
        kernel: kernel_release()?,
        uptime_s: uptime_s()?,
    })?;
    for name in &request.scenarios {
        let scenario = find(name)?;
        tell(&Event::Start {
            scenario: name.clone(),
        })?;
        let started = Instant::now();
        let (verdict, reason) = match supervise(scenario, request) {
            Ok(ended) => ended,
            Err(error) => (
                Verdict::Fail,
                format!("the agent could not run it: {error:#}"),
            ),
        };
        let seconds = started.elapsed().as_secs_f64();
        tell(&Event::End {
            scenario: name.clone(),
            verdict,
            seconds,
            reason,
        })?;
    }
    tell(&Event::Done)
}

/// Runs one scenario in a process of its own and cleans up after it.
fn supervise(scenario: &Scenario, request: &Request) -> anyhow::Result<(Verdict, String)> {
    let logs = log_folder(scenario);
    fs::create_dir_all(&logs).context("cannot create its log folder")?;
    let log = File::create(logs.join("scenario.log")).context("cannot create its log")?;
    let cgroup = Path::new(CGROUPS).join(scenario.name);
    fs::create_dir(&cgroup).context("cannot create its cgroup")?;
    let limit = scenario.limit(request.limit_s);
    let mut child = Command::new("unshare")
        .args(["--net", "--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe()?)
        .args(["run", scenario.name])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot run unshare")?;
    let ended = wait_until(Instant::now() + limit, || child.try_wait().transpose()).transpose()?;
    fs::write(cgroup.join("cgroup.kill"), "1").context("cannot kill its cgroup")?;
    // It may not have entered the cgroup. This fails only when it has ended.
    let _ = child.kill();
    child.wait()?;
    let empty = wait_until(Instant::now() + KILL_LIMIT, || fs::remove_dir(&cgroup).ok());
    let (verdict, mut reason) = judge(ended, &logs, limit);
    if empty.is_none() {
        // A process that SIGKILL does not end is stuck in the kernel.
        return Ok((
            Verdict::Fail,
            format!("{reason} [processes were left that cannot be killed]"),
        ));
    }
    if let Err(error) = remove_scratch(scenario) {
        reason = format!("{reason} [{error:#}]");
    }
    Ok((verdict, reason))
}

/// The verdict from the process's end (`None`: it ran into its limit).
fn judge(ended: Option<ExitStatus>, logs: &Path, limit: Duration) -> (Verdict, String) {
    let said = fs::read_to_string(logs.join(REASON_FILE)).unwrap_or_default();
    match ended {
        None => (
            Verdict::Fail,
            format!(
                "still running after {} s: {}",
                limit.as_secs(),
                last_step(logs)
            ),
        ),
        Some(status) if status.success() => (Verdict::Pass, String::new()),
        Some(status) if status.code() == Some(EXIT_SKIPPED) => (Verdict::Skip, said),
        Some(_) if !said.is_empty() => (Verdict::Fail, said),
        Some(status) => (
            Verdict::Fail,
            format!(
                "its process ended with {}: {}",
                describe(status),
                last_step(logs)
            ),
        ),
    }
}

/// The last line of the scenario's own log: a step, or a panic's message.
fn last_step(logs: &Path) -> String {
    let log = fs::read(logs.join("scenario.log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log).into_owned();
    tail(&log, 1).first().map_or_else(
        || "its log is empty".to_owned(),
        |line| line.trim().to_owned(),
    )
}

fn remove_scratch(scenario: &Scenario) -> anyhow::Result<()> {
    let scratch = super::ctx::scratch_folder(scenario.name);
    if scratch.exists() {
        fs::remove_dir_all(&scratch)
            .with_context(|| format!("cannot remove {}", scratch.display()))?;
    }
    Ok(())
}

/// Runs one scenario in this process.
fn run(request: &Request, scenario: &Scenario) -> anyhow::Result<ExitCode> {
    // First of all, so that everything it starts is in the cgroup.
    let members = Path::new(CGROUPS).join(scenario.name).join("cgroup.procs");
    fs::write(&members, "0").context("cannot enter the scenario's cgroup")?;
    let logs = log_folder(scenario);
    let mut ctx = Ctx::new(scenario.name, request, logs.clone())?;
    report_panics(logs.join(REASON_FILE));
    let (status, reason) = match (scenario.run)(&mut ctx) {
        Ok(()) => return Ok(ExitCode::SUCCESS),
        Err(error) => match error.downcast_ref::<Skipped>() {
            Some(skipped) => (EXIT_SKIPPED, skipped.to_string()),
            None => (1, format!("{error:#}")),
        },
    };
    eprintln!("{reason}");
    fs::write(logs.join(REASON_FILE), reason).context("cannot write the reason")?;
    Ok(ExitCode::from(u8::try_from(status)?))
}

/// A panic's reason is its message; the trace stays in the scenario's log.
fn report_panics(reason_file: PathBuf) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        // Without the file the verdict still names the exit status.
        let _ = fs::write(&reason_file, info.to_string().replace('\n', " "));
    }));
}

fn kernel_release() -> anyhow::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned())
}

/// Seconds since L1's kernel started.
fn uptime_s() -> anyhow::Result<f64> {
    let text = fs::read_to_string("/proc/uptime")?;
    let word = text
        .split_whitespace()
        .next()
        .context("/proc/uptime is empty")?;
    Ok(word.parse()?)
}
