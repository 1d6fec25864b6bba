//! A VM, as a test starts, watches and ends it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::control::Control;
use super::follower::Follower;
use super::ground::Ground;
use super::proc::ProcessView;
use super::process::{self, Finished, describe};
use super::ram::GuestMemory;
use super::report::{self, Report};

/// For something that takes milliseconds on a quiet machine.
pub const SOON: Duration = Duration::from_secs(30);
/// For something that takes seconds on a quiet machine.
pub const LATER: Duration = Duration::from_secs(120);

/// Where the guest's serial port goes.
#[derive(Clone, Debug, Default)]
enum SerialTarget {
    /// Through the VMM's standard streams, followed by [`Vm::console`].
    #[default]
    Stdio,
    /// Anything else; the test looks after it.
    Other(String),
}

/// A VM that is not started yet.
#[derive(Clone, Debug)]
pub struct VmSpec<'a> {
    ground: &'a Ground,
    name: String,
    kernel: PathBuf,
    cmdline: Option<String>,
    memory: Option<String>,
    cpus: Option<String>,
    serial: SerialTarget,
    extra: Vec<String>,
}

impl<'a> VmSpec<'a> {
    /// A VM named `vm` with 64 MiB, one vCPU and its serial port on the standard streams.
    pub(super) fn new(ground: &'a Ground, kernel: &Path) -> Self {
        Self {
            ground,
            name: "vm".to_owned(),
            kernel: kernel.to_owned(),
            cmdline: None,
            memory: Some("64M".to_owned()),
            cpus: None,
            serial: SerialTarget::default(),
            extra: Vec::new(),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, text: &str) -> Self {
        self.cmdline = Some(text.to_owned());
        self
    }

    /// `--memory`.
    #[must_use]
    pub fn memory(mut self, memory: &str) -> Self {
        self.memory = Some(memory.to_owned());
        self
    }

    /// `--cpus`.
    #[must_use]
    pub fn cpus(mut self, cpus: &str) -> Self {
        self.cpus = Some(cpus.to_owned());
        self
    }

    /// `--serial`, to somewhere else than the standard streams.
    #[must_use]
    pub fn serial(mut self, target: &str) -> Self {
        self.serial = SerialTarget::Other(target.to_owned());
        self
    }

    /// Any other arguments.
    #[must_use]
    pub fn args<S: ToString>(mut self, arguments: &[S]) -> Self {
        self.extra.extend(arguments.iter().map(S::to_string));
        self
    }

    /// The arguments of `drover`.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["run".to_owned(), "--name".to_owned(), self.name.clone()];
        let kernel = Some(self.kernel.display().to_string());
        let serial = match &self.serial {
            SerialTarget::Stdio => "stdio".to_owned(),
            SerialTarget::Other(target) => target.clone(),
        };
        for (option, value) in [
            ("--kernel", &kernel),
            ("--cmdline", &self.cmdline),
            ("--memory", &self.memory),
            ("--cpus", &self.cpus),
            ("--serial", &Some(serial)),
        ] {
            arguments.extend(value.iter().flat_map(|v| [option.to_owned(), v.clone()]));
        }
        arguments.extend(self.extra.iter().cloned());
        arguments
    }

    /// Starts the VM.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(&self) -> anyhow::Result<Vm> {
        self.start_with(&[])
    }

    /// Starts the VM by way of `wrapper`, a program with its first arguments that becomes
    /// `drover` by exec.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start_with(&self, wrapper: &[&str]) -> anyhow::Result<Vm> {
        let mut command = self.ground.wrapped(wrapper);
        command.args(self.arguments());
        Vm::spawn(command, Control::new(self.ground, &self.name))
    }

    /// Starts the VM and waits until its control socket answers.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn start_controlled(&self) -> anyhow::Result<Vm> {
        let mut vm = self.start()?;
        vm.wait_control(SOON)?;
        Ok(vm)
    }

    /// Runs the VM to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run(&self, limit: Duration) -> anyhow::Result<Ended> {
        self.start()?.wait_end(limit)
    }

    /// Runs `drover run` where it must refuse: exit code 1, one message without a panic, nothing
    /// left in the runtime directory.
    ///
    /// # Errors
    /// When it does anything else; the message otherwise, without its newline.
    pub fn refused(&self) -> anyhow::Result<String> {
        let mut command = self.ground.drover();
        let finished = process::run(command.args(self.arguments()), SOON)?;
        refusal(&finished, 1, self.ground)
    }

    /// The same for a configuration that cannot be, whatever the host is like: exit code 2.
    ///
    /// # Errors
    /// When it does anything else.
    pub fn misconfigured(&self) -> anyhow::Result<String> {
        let mut command = self.ground.drover();
        let finished = process::run(command.args(self.arguments()), SOON)?;
        refusal(&finished, 2, self.ground)
    }
}

/// The message of a command that has refused as it should with `code`, see [`VmSpec::refused`].
///
/// # Errors
/// When it did anything else.
pub fn refusal(finished: &Finished, code: i32, ground: &Ground) -> anyhow::Result<String> {
    let message = finished.stderr.trim_end().to_owned();
    if finished.code() != Some(code) {
        let end = describe(finished.status);
        bail!("expected exit status {code}, got {end}; it said: {message}");
    }
    if message.lines().count() != 1 || message.contains("panicked") {
        bail!("expected one message, got: {message:?}");
    }
    if !finished.stdout.is_empty() {
        bail!("standard output has {:?}", finished.stdout);
    }
    let left = ground.runtime_files();
    if !left.is_empty() {
        bail!("the runtime directory still has {left:?}; it said: {message}");
    }
    let message = message.strip_prefix("drover: ");
    Ok(message
        .context("no 'drover: ' before the message")?
        .to_owned())
}

/// A running VM. Dropping it kills it.
#[derive(Debug)]
pub struct Vm {
    control: Control,
    child: Child,
    stdin: Option<ChildStdin>,
    /// The guest's serial console, as long as it is on the standard streams.
    pub console: Follower,
    /// What the VMM says on its standard error.
    pub messages: Follower,
}

/// A VM that has ended by itself.
#[derive(Debug)]
pub struct Ended {
    /// How the process ended.
    pub status: ExitStatus,
    /// All that the guest wrote to the standard streams.
    pub console: String,
    /// All that the VMM wrote on standard error.
    pub messages: String,
}

impl Vm {
    /// Starts a `drover` that is one VM's process.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn spawn(mut command: Command, control: Control) -> anyhow::Result<Self> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        process::die_with_parent(&mut command, libc::SIGKILL);
        let mut child = command.spawn().context("cannot start drover")?;
        let stdin = child.stdin.take();
        let console = Follower::follow(child.stdout.take().context("piped")?);
        let messages = Follower::follow(child.stderr.take().context("piped")?);
        Ok(Self {
            control,
            child,
            stdin,
            console,
            messages,
        })
    }

    /// Requests to the VM.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The VMM's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The VMM's process from outside.
    #[must_use]
    pub fn process(&self) -> ProcessView {
        ProcessView::of(self.child.id())
    }

    /// The guest's memory, read through the VMM's descriptor, as soon as there is one.
    ///
    /// # Errors
    /// When the process has no such descriptor in time.
    pub fn memory(&self) -> anyhow::Result<GuestMemory> {
        let find = || GuestMemory::of(self.child.id()).ok();
        let found = process::wait_until(Instant::now() + SOON, find);
        found.with_context(|| format!("the VMM has no guest memory; {}", self.said()))
    }

    /// Waits for the guest's next line about `subject` that has `key`.
    ///
    /// # Errors
    /// When it does not come in time, or says `result=fail`; then with what the VMM said.
    pub fn report(&mut self, subject: &str, key: &str, limit: Duration) -> anyhow::Result<Report> {
        let report = self.console.wait_line(limit, |line| {
            let report = Report::from_line(line)?;
            let wanted = report.subject() == subject;
            let failed = report.get("result") == Some("fail");
            (wanted && (failed || report.get(key).is_some())).then_some(report)
        });
        report.and_then(Report::check).with_context(|| {
            format!(
                "waited for the guest's {subject} with {key}; {}",
                self.said()
            )
        })
    }

    /// Waits for the guest's banner.
    ///
    /// # Errors
    /// As [`Vm::report`].
    pub fn ready(&mut self) -> anyhow::Result<Report> {
        self.report("ready", "version", SOON)
    }

    /// Waits for the result of the guest's command `name`.
    ///
    /// # Errors
    /// As [`Vm::report`].
    pub fn result(&mut self, name: &str) -> anyhow::Result<Report> {
        self.report(&format!("command={name}"), "result", LATER)
    }

    /// Types into the guest's serial port.
    ///
    /// # Errors
    /// When the VMM does not take it.
    pub fn type_text(&mut self, text: &str) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin.write_all(text.as_bytes())?;
        Ok(stdin.flush()?)
    }

    /// Waits until the VM answers: then all that its configuration names is open. The socket
    /// alone takes connections earlier, as soon as the name is claimed.
    ///
    /// # Errors
    /// When it does not in time, or the process ends.
    pub fn wait_control(&mut self, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        let answers = || self.control.state().ok();
        if process::wait_until(deadline, answers).is_none() {
            let socket = self.control.socket();
            bail!("{} does not answer; {}", socket.display(), self.said());
        }
        Ok(())
    }

    /// Sends a signal to the VMM.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn signal(&self, signal: libc::c_int) -> anyhow::Result<()> {
        process::send_signal(&self.child, signal)
    }

    /// Waits for the VMM's end.
    ///
    /// # Errors
    /// When it still runs at the limit.
    pub fn wait_exit(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let ended = process::wait_exit(&mut self.child, limit)?;
        let seconds = limit.as_secs();
        ended.with_context(|| format!("drover still runs after {seconds} s; {}", self.said()))
    }

    /// Waits for the VMM's end and collects what was written.
    ///
    /// # Errors
    /// When it still runs at the limit.
    pub fn wait_end(mut self, limit: Duration) -> anyhow::Result<Ended> {
        let status = self.wait_exit(limit)?;
        self.console.wait_end(SOON)?;
        self.messages.wait_end(SOON)?;
        Ok(Ended {
            status,
            console: self.console.text(),
            messages: self.messages.text(),
        })
    }

    /// SIGKILL, and waits for the end.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The VMM's messages, for errors.
    fn said(&self) -> String {
        match self.messages.text().trim() {
            "" => "drover said nothing".to_owned(),
            text => format!("drover said: {text}"),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The exit code; `None` after a signal.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Everything that the guest reported.
    #[must_use]
    pub fn reports(&self) -> Vec<Report> {
        report::reports(&self.console)
    }

    /// The results of the guest's command `name`, in order.
    #[must_use]
    pub fn results(&self, name: &str) -> Vec<Report> {
        let subject = format!("command={name}");
        let all = self.reports().into_iter();
        all.filter(|report| report.subject() == subject && report.is_final())
            .collect()
    }

    /// # Errors
    /// When the VMM did not exit with 0, or the guest's last word is not that all went well.
    pub fn check(&self) -> anyhow::Result<()> {
        let done = self.reports().into_iter().rfind(|r| r.subject() == "done");
        let well = done.is_some_and(|report| report.get("result") == Some("ok"));
        if self.code() != Some(0) || !well {
            bail!(
                "{}; the guest said: {}; drover said: {}",
                describe(self.status),
                self.console,
                self.messages
            );
        }
        Ok(())
    }
}
