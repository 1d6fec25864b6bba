//! A Drover process and its VM, as a scenario handles them.
//!
//! Everything that depends on Drover's command line and API is in this file.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use super::console::Console;
use super::ctx::output;
use super::memory::MemoryUse;
use super::process::{describe, wait_until};
use super::protocol::Report;
use super::report::tail;

/// The program.
const DROVER: &str = "drover";

/// A lab option and not a default: under QEMU's emulated SVM an L2 guest must not
/// see the TSC-deadline timer, or its sleeps never end.
const LAB_CPU: &str = "host,-tsc-deadline";

/// Spares a slow, loaded emulation its timer and TSC checks; `panic=-1` makes a
/// panicked guest reboot at once, which the VMM sees.
const LAB_CMDLINE: &str = "console=ttyS0 quiet loglevel=4 no_timer_check tsc=reliable panic=-1";

/// For a guest kernel to come up to its first report or prompt.
pub const BOOT: Duration = Duration::from_secs(120);
/// For something a running guest does at once.
pub const SOON: Duration = Duration::from_secs(60);

/// A VM that is not started yet.
#[derive(Debug, Clone)]
pub struct VmSpec {
    name: String,
    run_folder: PathBuf,
    logs: PathBuf,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: Vec<String>,
    cpus: String,
    memory: String,
    extra: Vec<String>,
}

impl VmSpec {
    /// A VM with 1 vCPU, 256 MiB and no device. Sockets go into `run_folder`.
    #[must_use]
    pub fn new(name: &str, run_folder: PathBuf, logs: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            run_folder,
            logs,
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: vec![LAB_CMDLINE.to_owned()],
            cpus: "1".to_owned(),
            memory: "256M".to_owned(),
            extra: Vec::new(),
        }
    }

    /// The kernel to boot.
    #[must_use]
    pub fn kernel(mut self, path: PathBuf) -> Self {
        self.kernel = path;
        self
    }

    /// The initrd.
    #[must_use]
    pub fn initrd(mut self, path: PathBuf) -> Self {
        self.initrd = Some(path);
        self
    }

    /// No initrd.
    #[must_use]
    pub fn no_initrd(mut self) -> Self {
        self.initrd = None;
        self
    }

    /// More words for the kernel command line, such as `lab.do=disk lab.mib=8`.
    #[must_use]
    pub fn words(mut self, words: &str) -> Self {
        self.cmdline.push(words.to_owned());
        self
    }

    /// `--cpus`.
    #[must_use]
    pub fn cpus(mut self, cpus: &str) -> Self {
        cpus.clone_into(&mut self.cpus);
        self
    }

    /// `--memory`.
    #[must_use]
    pub fn memory(mut self, memory: &str) -> Self {
        memory.clone_into(&mut self.memory);
        self
    }

    /// Any other option with its value.
    #[must_use]
    pub fn with(mut self, option: &str, value: impl std::fmt::Display) -> Self {
        self.extra.extend([option.to_owned(), value.to_string()]);
        self
    }

    /// Any other option without a value.
    #[must_use]
    pub fn flag(mut self, option: &str) -> Self {
        self.extra.push(option.to_owned());
        self
    }

    /// A disk image with further options, for example `format=qcow2`.
    #[must_use]
    pub fn disk(self, path: &Path, options: &str) -> Self {
        let comma = if options.is_empty() { "" } else { "," };
        self.with("--disk", format!("path={}{comma}{options}", path.display()))
    }

    /// The whole command line, without the program.
    #[must_use]
    pub fn args(&self) -> Vec<String> {
        let mut args: Vec<String> = ["run", "--name", &self.name, "--kernel"]
            .map(str::to_owned)
            .into();
        args.push(self.kernel.display().to_string());
        if let Some(initrd) = &self.initrd {
            args.extend(["--initrd".to_owned(), initrd.display().to_string()]);
        }
        args.extend(["--cmdline".to_owned(), self.cmdline.join(" ")]);
        args.extend(["--cpus", &self.cpus, "--memory", &self.memory].map(str::to_owned));
        args.extend(["--cpu", LAB_CPU, "--serial", "stdio"].map(str::to_owned));
        args.extend(self.extra.iter().cloned());
        args
    }

    /// Starts the VM. Its serial console is followed and kept as
    /// `NAME.console.log`, the VMM's own messages as `NAME.vmm.log`.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(&self) -> anyhow::Result<Vmm> {
        std::fs::create_dir_all(&self.run_folder)?;
        let messages = self.logs.join(format!("{}.vmm.log", self.name));
        let mut child = Command::new(DROVER)
            .args(self.args())
            .env("DROVER_RUNTIME_DIR", &self.run_folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&messages)?)
            .spawn()
            .context("cannot start drover")?;
        let source = child
            .stdout
            .take()
            .context("drover has no standard output")?;
        let console = Console::follow(
            source,
            &self.logs.join(format!("{}.console.log", self.name)),
        )?;
        Ok(Vmm {
            spec: self.clone(),
            child,
            console,
            messages,
        })
    }

    /// Runs `drover run` where it must refuse; its error message.
    ///
    /// # Errors
    /// When it does not refuse in time, or says nothing about why.
    pub fn start_refused(&self, limit: Duration) -> anyhow::Result<String> {
        let mut vmm = self.start()?;
        let status = vmm.wait_exit(limit)?;
        let message = vmm.messages()?;
        if status.success() || message.trim().is_empty() {
            bail!(
                "drover ended with {} and said '{message}'",
                describe(status)
            );
        }
        Ok(message)
    }
}

/// A running Drover. Dropping it kills it.
#[derive(Debug)]
pub struct Vmm {
    spec: VmSpec,
    child: Child,
    /// The guest's serial console.
    pub console: Console,
    messages: PathBuf,
}

impl Vmm {
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
        let report = self.console.wait_report(task, key, limit);
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
        let output = output(
            Command::new(DROVER)
                .arg(command)
                .arg(&self.spec.name)
                .args(args)
                .arg("--json")
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
        if output.stdout.iter().all(u8::is_ascii_whitespace) {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "drover {command} --json wrote {}",
                String::from_utf8_lossy(&output.stdout)
            )
        })
    }

    /// Asks for a balloon of `mib` MiB, over the API.
    ///
    /// # Errors
    /// When the API refuses.
    pub fn set_balloon(&self, mib: u64) -> anyhow::Result<()> {
        let body = format!("{{\"target_mib\":{mib}}}");
        self.api("PUT", "/v1/vm/balloon", Some(&body)).map(drop)
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

    /// Follows `drover events NAME --json`; the stream ends with the VM.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn events(&self) -> anyhow::Result<Console> {
        let mut child = Command::new(DROVER)
            .args(["events", &self.spec.name, "--json"])
            .env("DROVER_RUNTIME_DIR", &self.spec.run_folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run drover events")?;
        let source = child
            .stdout
            .take()
            .context("drover events has no standard output")?;
        Console::follow(
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
        ended.with_context(|| {
            format!(
                "drover still runs after {} s; {}",
                limit.as_secs(),
                self.state()
            )
        })
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

    /// The VMM's last messages, for errors.
    fn state(&self) -> String {
        let messages = self.messages().unwrap_or_default();
        match tail(&messages, 3).join(" | ") {
            nothing if nothing.is_empty() => "drover said nothing".to_owned(),
            said => format!("drover said: {said}"),
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_has_the_lab_options_and_every_extra() {
        let spec = VmSpec::new("vm", "/run/x".into(), "/logs".into())
            .kernel("/k".into())
            .initrd("/i".into())
            .words("lab.do=disk")
            .cpus("2")
            .disk(Path::new("/d"), "readonly=on")
            .flag("--rng");
        let args = spec.args();
        let value = |option: &str| {
            let at = args.iter().position(|arg| arg == option).unwrap();
            args[at + 1].as_str()
        };
        assert_eq!(args[..3], ["run", "--name", "vm"]);
        assert_eq!(
            (value("--kernel"), value("--initrd"), value("--cpus")),
            ("/k", "/i", "2")
        );
        assert_eq!(value("--cpu"), "host,-tsc-deadline");
        assert_eq!(value("--disk"), "path=/d,readonly=on");
        assert!(value("--cmdline").ends_with("lab.do=disk"));
        assert_eq!(args.last().unwrap(), "--rng");
        assert!(!spec.no_initrd().args().contains(&"--initrd".to_owned()));
    }
}
