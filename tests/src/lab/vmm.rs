//! A Drover process and its VM, as a scenario handles them.
//!
//! Everything that depends on Drover's control commands and API is in this file;
//! what depends on `drover run` is in `vm_spec.rs`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use super::console;
use super::ctx::{output, run};
use super::memory::MemoryUse;
use super::protocol::Report;
use super::report::tail;
use super::vm_spec::VmSpec;
use crate::harness::follower::Follower;
use crate::harness::process::{describe, wait_until};

/// The program.
pub(super) const DROVER: &str = "drover";

/// For a guest kernel to come up to its first report or prompt.
pub const BOOT: Duration = Duration::from_secs(120);
/// For something a running guest does at once.
pub const SOON: Duration = Duration::from_secs(60);

/// A running Drover. Dropping it kills it.
#[derive(Debug)]
pub struct Vmm {
    pub(super) spec: VmSpec,
    child: Child,
    /// The guest's serial console.
    pub console: Follower,
    messages: PathBuf,
}

impl Vmm {
    /// Of the process `child`, whose standard error goes to the file `messages`.
    pub(super) fn new(spec: VmSpec, child: Child, console: Follower, messages: PathBuf) -> Self {
        Self {
            spec,
            child,
            console,
            messages,
        }
    }

    /// Waits for the guest's report of `task` with a result.
    ///
    /// # Errors
    /// When it fails or does not come; then with what the VMM said.
    pub fn report(&mut self, task: &str, limit: Duration) -> anyhow::Result<Report> {
        self.report_with(task, "result", limit)
    }

    /// Waits for the guest's next report of `task` that holds `key`.
    ///
    /// # Errors
    /// When the task fails or it does not come; then with what the VMM said.
    pub fn report_with(
        &mut self,
        task: &str,
        key: &str,
        limit: Duration,
    ) -> anyhow::Result<Report> {
        let report = console::wait_report(&mut self.console, task, key, limit);
        report.with_context(|| self.state())
    }

    /// Waits for the guest's report of `task` that says `state=STATE`.
    ///
    /// # Errors
    /// When another state or none comes.
    pub fn report_state(
        &mut self,
        task: &str,
        state: &str,
        limit: Duration,
    ) -> anyhow::Result<Report> {
        let report = self.report_with(task, "state", limit)?;
        if report.get("state") != Some(state) {
            bail!("the guest reports {report:?}, not state={state}");
        }
        Ok(report)
    }

    /// Waits for `text` on the console.
    ///
    /// # Errors
    /// When it does not come; then with what the VMM said.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> anyhow::Result<String> {
        let before = self.console.wait_for(text, limit);
        before.with_context(|| self.state())
    }

    /// Types into the console.
    ///
    /// # Errors
    /// When the VMM does not take it.
    pub fn send(&mut self, text: &str) -> anyhow::Result<()> {
        let stdin = self
            .child
            .stdin
            .as_mut()
            .context("drover's standard input is closed")?;
        stdin
            .write_all(text.as_bytes())
            .context("drover takes no console input")
    }

    /// Has the guest's shell (task `shell`) run another task; its report.
    ///
    /// # Errors
    /// When it fails or does not come.
    pub fn do_task(&mut self, task: &str, limit: Duration) -> anyhow::Result<Report> {
        self.send(&format!(". /lib/lab/tasks.sh; try {task}\n"))?;
        self.report(task, limit)
    }

    /// `drover COMMAND NAME ARGS --json` about this VM; its JSON, null if empty.
    ///
    /// # Errors
    /// When the command fails or writes something else.
    pub fn ctl(&self, command: &str, args: &[&str]) -> anyhow::Result<Value> {
        let mut about = vec![self.spec.name.as_str()];
        about.extend(args);
        self.json(command, &about)
    }

    /// `drover COMMAND SUBCOMMAND NAME --json`; its JSON.
    ///
    /// # Errors
    /// When the command fails or writes something else.
    pub fn subcommand(&self, command: &str, subcommand: &str) -> anyhow::Result<Value> {
        self.json(command, &[subcommand, &self.spec.name])
    }

    /// `drover device ACTION NAME ARGS --json`; its JSON, null if empty.
    ///
    /// # Errors
    /// When the command fails or writes something else.
    pub fn device(&self, action: &str, args: &[&str]) -> anyhow::Result<Value> {
        let mut about = vec![action, self.spec.name.as_str()];
        about.extend(args);
        self.json("device", &about)
    }

    /// `drover gpu assign NAME LIST --json`; its JSON.
    ///
    /// # Errors
    /// When the command fails or writes something else.
    pub fn assign_gpu(&self, gpus: &str) -> anyhow::Result<Value> {
        self.json("gpu", &["assign", &self.spec.name, gpus])
    }

    /// `drover gpu release NAME`; what it says.
    ///
    /// # Errors
    /// When the command fails.
    pub fn release_gpus(&self) -> anyhow::Result<String> {
        self.drover("gpu", &["release", &self.spec.name])
    }

    /// The VMM's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A counter of the VM's, over all that have it.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn counter(&self, name: &str) -> anyhow::Result<u64> {
        let text = self.api("GET", "/metrics", None)?;
        let of_name = |line: &&str| line.starts_with(&format!("drover_{name}{{"));
        let values = text.lines().filter(of_name).map(|line| {
            let value = line.rsplit(' ').next().unwrap_or_default();
            value
                .parse::<u64>()
                .with_context(|| format!("'{line}' is no counter"))
        });
        let values = values.collect::<anyhow::Result<Vec<_>>>()?;
        anyhow::ensure!(!values.is_empty(), "the VM has no counter '{name}'");
        Ok(values.iter().sum())
    }

    /// `drover list --json`, of the VMs with this one's runtime folder.
    ///
    /// # Errors
    /// When the command fails or writes something else.
    pub fn list(&self) -> anyhow::Result<Value> {
        self.json("list", &[])
    }

    fn json(&self, command: &str, args: &[&str]) -> anyhow::Result<Value> {
        let said = self.drover(command, &[args, &["--json"]].concat())?;
        if said.trim().is_empty() {
            return Ok(Value::Null);
        }
        let json = serde_json::from_str(&said);
        json.with_context(|| format!("drover {command} --json wrote {said}"))
    }

    /// What `drover COMMAND ARGS` writes.
    fn drover(&self, command: &str, args: &[&str]) -> anyhow::Result<String> {
        let output = output(
            Command::new(DROVER)
                .arg(command)
                .args(args)
                .env("DROVER_RUNTIME_DIR", &self.spec.run_folder),
        )?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!(
                "drover {command}: {}: {}",
                describe(output.status),
                stderr.trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Asks for a balloon of `mib` MiB, over the API.
    ///
    /// # Errors
    /// When the API refuses.
    pub fn set_balloon(&self, mib: u64) -> anyhow::Result<()> {
        let body = format!("{{\"target_bytes\":{}}}", mib << 20);
        self.api("PUT", "/v1/balloon", Some(&body)).map(drop)
    }

    /// One request to the control API by curl; the answer's body.
    ///
    /// # Errors
    /// When curl fails or the status is not a success.
    pub fn api(&self, method: &str, path: &str, body: Option<&str>) -> anyhow::Result<String> {
        let socket = self
            .spec
            .run_folder
            .join(format!("{}.sock", self.spec.name));
        let mut command = Command::new("curl");
        command.args([
            "--silent",
            "--show-error",
            "--fail-with-body",
            "--max-time",
            "20",
        ]);
        command
            .arg("--unix-socket")
            .arg(socket)
            .args(["--request", method]);
        if let Some(body) = body {
            command.args(["--header", "Content-Type: application/json", "--data", body]);
        }
        let output = output(command.arg(format!("http://localhost{path}")))?;
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("{method} {path}: {} {answer}", stderr.trim());
        }
        Ok(answer)
    }

    /// Runs `drover events NAME --follow --json`; the stream ends with the VM.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn events(&self) -> anyhow::Result<Follower> {
        let mut child = Command::new(DROVER)
            .args(["events", &self.spec.name, "--follow", "--json"])
            .env("DROVER_RUNTIME_DIR", &self.spec.run_folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run drover events")?;
        let source = child
            .stdout
            .take()
            .context("drover events has no standard output")?;
        console::follow(
            source,
            &self
                .spec
                .logs
                .join(format!("{}.events.log", self.spec.name)),
        )
    }

    /// The VMM's memory.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn memory(&self) -> anyhow::Result<MemoryUse> {
        MemoryUse::of(self.child.id())
    }

    /// SIGKILL, and waits for the end.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn kill9(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for the VMM to end by itself.
    ///
    /// # Errors
    /// When it still runs at the limit.
    pub fn wait_exit(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let ended =
            wait_until(Instant::now() + limit, || self.child.try_wait().transpose()).transpose()?;
        ended.with_context(|| format!("waited {} s; {}", limit.as_secs(), self.state()))
    }

    /// Waits for the guest to power off and the VMM to end with status 0.
    ///
    /// # Errors
    /// When it does not, or ends otherwise.
    pub fn wait_poweroff(&mut self, limit: Duration) -> anyhow::Result<()> {
        let status = self.wait_exit(limit)?;
        if !status.success() {
            bail!("drover ended with {}; {}", describe(status), self.state());
        }
        Ok(())
    }

    /// What the VMM has written on its standard error.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn messages(&self) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(&self.messages)?)
    }

    /// Whether the VMM runs, and its last messages, for errors.
    pub(super) fn state(&mut self) -> String {
        let life = match self.child.try_wait() {
            Ok(Some(status)) => format!("drover has ended with {}", describe(status)),
            Ok(None) => format!("drover runs{}", self.threads()),
            Err(error) => format!("drover cannot be waited for ({error})"),
        };
        let messages = self.messages().unwrap_or_default();
        match tail(&messages, 3).join(" | ") {
            nothing if nothing.is_empty() => format!("{life} and said nothing"),
            said => format!("{life} and said: {said}"),
        }
    }

    /// What each thread waits for in the kernel, and which of KVM's and Drover's counters change in a second: a
    /// guest that is silent is idle, spins or waits for its VMM.
    fn threads(&self) -> String {
        let tasks = || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid()));
            tasks
                .into_iter()
                .flatten()
                .flatten()
                .map(|task| task.path())
        };
        let counters = || {
            let metrics = self.api("GET", "/metrics", None).unwrap_or_default();
            let mut lines: Vec<String> = metrics.lines().map(str::to_owned).collect();
            // Debugfs may be there already.
            let _ = run("mount", &["-t", "debugfs", "none", "/sys/kernel/debug"]);
            let threads = tasks().filter_map(|task| Some(task.file_name()?.to_str()?.to_owned()));
            lines.extend(kvm_counters(&threads.collect::<Vec<_>>()));
            let times =
                |task: PathBuf| std::fs::read_to_string(task.join("stat")).unwrap_or_default();
            lines.extend(tasks().map(times));
            lines
        };
        let before = counters();
        std::thread::sleep(Duration::from_secs(1));
        let mut after = counters();
        after.retain(|line| !before.contains(line));
        let mut text = format!(" (in a second: {})", after.join(", "));
        for task in tasks() {
            let read = |name: &str| {
                let text = std::fs::read_to_string(task.join(name)).unwrap_or_default();
                let lines = text.lines().take(12).map(str::trim);
                lines.collect::<Vec<_>>().join(" < ")
            };
            let [name, wchan, syscall, stack] = ["comm", "wchan", "syscall", "stack"].map(read);
            text.push_str(&format!("; {name}: {wchan} [{syscall}] {stack}"));
        }
        text
    }
}

/// What KVM counts of the VMs that these threads have made, in debugfs (Documentation/virt/kvm/api.rst,
/// `KVM_GET_STATS_FD`, has what it means).
fn kvm_counters(threads: &[String]) -> Vec<String> {
    let list = |folder: &Path| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    // They are called after thread and descriptor.
    let is_theirs = |folder: &PathBuf| {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let thread = name.split('-').next().unwrap_or_default();
        threads.iter().any(|one| one == thread)
    };
    let mut folders = list(Path::new("/sys/kernel/debug/kvm"));
    folders.retain(is_theirs);
    let files = folders.iter().flat_map(|folder| list(folder));
    let lines = files.filter_map(|path| {
        let value = std::fs::read_to_string(&path).ok()?;
        let name = path.file_name()?.to_string_lossy();
        Some(format!("{name} {}", value.trim()))
    });
    lines.collect()
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
