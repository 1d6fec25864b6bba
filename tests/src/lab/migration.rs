//! `drover receive` and `drover migrate`, as a scenario handles them.

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::ctx::output;
use super::vm_spec::VmSpec;
use super::vmm::{DROVER, Vmm};
use crate::harness::process::{describe, wait_exit, wait_until};

/// For `drover receive` to listen.
const LISTEN: Duration = Duration::from_secs(40);

/// A Drover that waits for a VM.
#[derive(Debug)]
pub struct Receiver {
    /// It, with the guest's console from the moment the guest is here.
    pub vmm: Vmm,
    /// Where it listens.
    pub url: String,
}

impl VmSpec {
    /// Starts `drover receive --listen URL` with further options, where this VM shall come to.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn receive(&self, listen: &str, options: &[String]) -> anyhow::Result<Receiver> {
        let words = [
            "receive", "--name", &self.name, "--listen", listen, "--serial", "stdio", "--json",
        ];
        let mut args: Vec<String> = words.map(str::to_owned).into();
        args.extend(options.iter().cloned());
        let mut vmm = self.start_with(&args)?;
        let url = vmm.console.wait_line(LISTEN, |line| {
            let announced: Value = serde_json::from_str(line).ok()?;
            Some(announced["listening"].as_str()?.to_owned())
        });
        let url = url.with_context(|| format!("drover receive: {}", vmm.state()))?;
        Ok(Receiver { vmm, url })
    }
}

/// How a migration ended.
#[derive(Debug)]
pub struct Migrated {
    /// `drover migrate`'s exit status.
    pub status: Option<i32>,
    /// What it wrote.
    pub report: Value,
}

impl Migrated {
    /// What [`Vmm::start_migration`] has started, once it has ended.
    ///
    /// # Errors
    /// When it does not end in time, or tells nothing.
    pub fn wait(mut migration: Child, limit: Duration) -> anyhow::Result<Self> {
        if wait_exit(&mut migration, limit)?.is_none() {
            migration.kill()?;
            bail!("drover migrate still ran after {} s", limit.as_secs());
        }
        Self::of(&migration.wait_with_output()?)
    }

    fn of(output: &Output) -> anyhow::Result<Self> {
        let Ok(report) = serde_json::from_slice(&output.stdout) else {
            bail!(
                "drover migrate: {}: {}",
                describe(output.status),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        };
        Ok(Self {
            status: output.status.code(),
            report,
        })
    }

    /// How long the guest stood still.
    ///
    /// # Errors
    /// When the VM has not moved.
    pub fn blackout(&self) -> anyhow::Result<Duration> {
        let outcome = &self.report["outcome"];
        ensure!(
            self.status == Some(0) && outcome == "migrated",
            "the VM has not moved: {outcome}, {}",
            self.report["error"]
        );
        let micros = self.report["blackout"]["total_us"].as_u64();
        Ok(Duration::from_micros(
            micros.context("no blackout is reported")?,
        ))
    }

    /// Why the VM is still where it was.
    ///
    /// # Errors
    /// When it is not.
    pub fn refusal(&self) -> anyhow::Result<&str> {
        ensure!(
            self.status == Some(1) && self.report["outcome"] == "resumed",
            "the migration ended with {:?} and {}",
            self.status,
            self.report
        );
        self.report["error"].as_str().context("no reason is given")
    }
}

impl Vmm {
    /// `drover migrate NAME WORDS --json`, to its end.
    ///
    /// # Errors
    /// When it cannot be run, or tells nothing.
    pub fn migrate(&self, words: &[&str]) -> anyhow::Result<Migrated> {
        Migrated::of(&output(&mut self.migrate_command(words))?)
    }

    /// The same, in the background.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn start_migration(&self, words: &[&str]) -> anyhow::Result<Child> {
        let mut command = self.migrate_command(words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().context("cannot run drover migrate")
    }

    /// Waits until the migration that runs is in its rounds.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn wait_precopy(&self, limit: Duration) -> anyhow::Result<()> {
        let mut last = Value::Null;
        let arrived = wait_until(Instant::now() + limit, || {
            last = self.subcommand("migration", "status").ok()?;
            let moving = last["progress"]["wire_bytes"].as_u64() > Some(0);
            (last["active"] == true && last["progress"]["phase"] == "precopy" && moving)
                .then_some(())
        });
        arrived.with_context(|| format!("no memory is copied: {last}"))
    }

    fn migrate_command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(DROVER);
        command
            .args(["migrate", &self.spec.name])
            .args(words)
            .arg("--json")
            .env("DROVER_RUNTIME_DIR", &self.spec.run_folder)
            .stdin(Stdio::null());
        command
    }
}
