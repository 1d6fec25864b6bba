//! VMs that move: a place that waits for one, and what `drover migrate` says.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use super::control::Control;
use super::ground::Ground;
use super::process::{self, Finished};
use super::vm::{SOON, Vm};

/// What a migration may take.
const LIMIT: Duration = Duration::from_secs(90);

/// A place for a VM, not yet there.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    ground: &'a Ground,
    name: String,
    listen: String,
    extra: Vec<String>,
}

/// A place that waits. The VM's console and control are there as soon as it has come.
#[derive(Debug)]
pub struct Waiting {
    /// The process.
    pub vm: Vm,
    /// Where it waits.
    pub url: String,
}

impl<'a> Place<'a> {
    /// A place on a port of this host's own, for a VM that will be called `name`.
    #[must_use]
    pub fn new(ground: &'a Ground, name: &str) -> Self {
        Self {
            ground,
            name: name.to_owned(),
            listen: "tcp://127.0.0.1:0".to_owned(),
            extra: Vec::new(),
        }
    }

    /// Another address.
    #[must_use]
    pub fn listen(mut self, url: &str) -> Self {
        url.clone_into(&mut self.listen);
        self
    }

    /// Further arguments of `drover receive`.
    #[must_use]
    pub fn args<S: ToString>(mut self, arguments: &[S]) -> Self {
        self.extra.extend(arguments.iter().map(S::to_string));
        self
    }

    /// The command.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = self.ground.drover();
        command
            .args(["receive", "--name", &self.name, "--listen", &self.listen])
            .args(&self.extra);
        command
    }

    /// Starts to wait.
    ///
    /// # Errors
    /// When it does not say where in time.
    pub fn start(&self) -> anyhow::Result<Waiting> {
        let control = Control::new(self.ground, &self.name);
        let mut vm = Vm::spawn(self.command(), control)?;
        let begin = format!("waiting for {} at ", self.name);
        let found = vm
            .console
            .wait_line(SOON, |line| line.strip_prefix(&begin).map(str::to_owned));
        let said = || {
            format!(
                "{} does not wait; it said {}",
                self.name,
                vm.messages.text()
            )
        };
        let url = found.with_context(said)?;
        Ok(Waiting { vm, url })
    }

    /// Starts it by way of `wrapper`, a service manager that hands it the socket to wait on.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start_activated(&self, wrapper: &[&str]) -> anyhow::Result<Vm> {
        let mut command = self.ground.wrapped(wrapper);
        command.args(["receive", "--name", &self.name]);
        command.args(&self.extra);
        Vm::spawn(command, Control::new(self.ground, &self.name))
    }

    /// Runs `drover receive` where it must refuse; its message without its newline.
    ///
    /// # Errors
    /// When it does anything else.
    pub fn refused(&self) -> anyhow::Result<String> {
        let finished = process::run(&mut self.command(), SOON)?;
        failure(&finished, 1)
    }
}

/// `drover migrate VM URL ARGUMENTS...` to its end, whatever that is.
///
/// # Errors
/// When it does not end.
pub fn try_migrate(vm: &Control, url: &str, arguments: &[&str]) -> anyhow::Result<Finished> {
    let mut command = vm.command("migrate", &[url]);
    process::run(command.args(arguments), LIMIT)
}

/// Moves a VM; the report.
///
/// # Errors
/// When it does not move.
pub fn migrate(vm: &Control, url: &str, arguments: &[&str]) -> anyhow::Result<Value> {
    let mut command = vm.command("migrate", &[url, "--json"]);
    let finished = process::run(command.args(arguments), LIMIT)?;
    let report = parse(&finished)?;
    if finished.code() != Some(0) || report["outcome"] != "migrated" {
        bail!("the VM has not moved: {finished:?}");
    }
    Ok(report)
}

/// The report that `drover migrate --json` has printed.
///
/// # Errors
/// When it has not.
pub fn parse(finished: &Finished) -> anyhow::Result<Value> {
    serde_json::from_str(&finished.stdout).with_context(|| format!("no report: {finished:?}"))
}

/// A VM whose migration must fail, while it goes on: the reason.
///
/// # Errors
/// When the exit code is not 1, or something else is said.
pub fn reason_not_moved(finished: &Finished, name: &str) -> anyhow::Result<String> {
    if finished.code() != Some(1) {
        bail!("expected exit status 1: {finished:?}");
    }
    let first = finished.stdout.lines().next().context("nothing was said")?;
    let begin = format!("{name} has not moved and goes on here (after ");
    let rest = first.strip_prefix(&begin);
    let reason = rest.and_then(|rest| Some(rest.split_once(" ms): ")?.1));
    Ok(reason
        .with_context(|| format!("unexpected: {finished:?}"))?
        .to_owned())
}

/// The one message of a command that has failed with `code`, without `drover: ` and newline.
///
/// # Errors
/// When it ended or spoke otherwise.
pub fn failure(finished: &Finished, code: i32) -> anyhow::Result<String> {
    let message = finished.stderr.strip_prefix("drover: ");
    match message.and_then(|text| text.strip_suffix('\n')) {
        Some(text) if finished.code() == Some(code) && !text.contains('\n') => Ok(text.to_owned()),
        _ => bail!("expected exit status {code} and one message: {finished:?}"),
    }
}

/// A number of repetitions: `default`, unless the environment variable says another.
///
/// # Errors
/// When it says no number.
pub fn repetitions(variable: &str, default: u32) -> anyhow::Result<u32> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text}")),
        Err(_) => Ok(default),
    }
}
