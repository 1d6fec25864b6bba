//! A process that runs the guest, or waits for it.

use std::io::Write;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::harness::follower::Follower;
use crate::harness::process;
use crate::harness::report::Report;

/// Filling and checking memory.
const LIMIT: Duration = Duration::from_secs(300);

/// A VMM with the guest's serial port on its standard streams. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Guest {
    child: Child,
    stdin: ChildStdin,
    console: Follower,
    messages: Follower,
}

impl Guest {
    /// # Errors
    /// When the program cannot be started.
    pub(super) fn start(mut command: Command) -> anyhow::Result<Self> {
        process::die_with_parent(&mut command, libc::SIGKILL);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let stdin = child.stdin.take().context("piped")?;
        let console = Follower::follow(child.stdout.take().context("piped")?);
        let messages = Follower::follow(child.stderr.take().context("piped")?);
        Ok(Self {
            child,
            stdin,
            console,
            messages,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the first line of which `pick` makes something.
    ///
    /// # Errors
    /// When none comes.
    pub(super) fn wait_line<T>(&mut self, pick: impl Fn(&str) -> Option<T>) -> anyhow::Result<T> {
        let found = self.console.wait_line(LIMIT, pick);
        found.with_context(|| format!("the VMM said: {:?}", self.messages.text().trim()))
    }

    /// Waits until the guest's line about `subject` has `key`.
    ///
    /// # Errors
    /// When it does not come, or is a failure.
    pub(super) fn wait_report(&mut self, subject: &str, key: &str) -> anyhow::Result<()> {
        let report = self.wait_line(|line| {
            let report = Report::from_line(line)?;
            let wanted = report.subject() == subject && report.get(key).is_some();
            (wanted || ends_badly(&report)).then_some(report)
        })?;
        ensure!(!ends_badly(&report), "the guest failed: {report:?}");
        Ok(())
    }

    /// Tells the guest to stop what it does, and waits until it has checked its memory.
    ///
    /// # Errors
    /// When the guest does not find what it wrote, or says no more.
    pub(super) fn check_memory(&mut self) -> anyhow::Result<()> {
        self.stdin.write_all(b"s")?;
        self.stdin.flush()?;
        let checked = self.wait_report("done", "result");
        checked.context("memory did not arrive intact, or not the guest")
    }

    /// All that the VMM has said, for errors.
    pub(super) fn said(&self) -> String {
        self.messages.text()
    }
}

fn ends_badly(report: &Report) -> bool {
    let fatal = ["exception", "panic"].contains(&report.subject());
    fatal || report.get("result") == Some("fail")
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
