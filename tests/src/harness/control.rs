//! Requests to a running VM: by the command line, and by curl.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use super::curl::{self, Answer};
use super::events::EventStream;
use super::follower::Follower;
use super::ground::Ground;
use super::process::{self, Finished};

/// What a command may take.
const LIMIT: Duration = Duration::from_secs(90);

/// How a VM is reached. It does not need the VM to run.
#[derive(Clone, Debug)]
pub struct Control {
    drover: PathBuf,
    runtime_dir: PathBuf,
    name: String,
    socket: PathBuf,
}

impl Control {
    /// The way to the VM `name` of a test.
    #[must_use]
    pub fn new(ground: &Ground, name: &str) -> Self {
        Self {
            drover: ground.drover_path().clone(),
            runtime_dir: ground.runtime_dir(),
            name: name.to_owned(),
            socket: ground.runtime_dir().join(format!("{name}.sock")),
        }
    }

    /// The control socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `drover COMMAND NAME ARGUMENTS...`, not yet run.
    #[must_use]
    pub fn command(&self, command: &str, arguments: &[&str]) -> Command {
        let mut result = Command::new(&self.drover);
        result
            .arg(command)
            .arg(&self.name)
            .args(arguments)
            .env("DROVER_RUNTIME_DIR", &self.runtime_dir);
        result
    }

    /// Runs `drover COMMAND NAME ARGUMENTS...` to its end, whatever that is.
    ///
    /// # Errors
    /// When it does not end.
    pub fn try_drover(&self, command: &str, arguments: &[&str]) -> anyhow::Result<Finished> {
        process::run(&mut self.command(command, arguments), LIMIT)
    }

    /// Runs `drover COMMAND NAME ARGUMENTS...`, which must succeed; its output.
    ///
    /// # Errors
    /// When it fails.
    pub fn drover(&self, command: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let finished = self.try_drover(command, arguments)?;
        finished
            .success()
            .with_context(|| format!("drover {command}"))
    }

    /// Runs `drover COMMAND NAME --json`; its JSON.
    ///
    /// # Errors
    /// When it fails or prints something else.
    pub fn json(&self, command: &str) -> anyhow::Result<Value> {
        let text = self.drover(command, &["--json"])?;
        serde_json::from_str(&text).with_context(|| format!("drover {command} wrote {text}"))
    }

    /// One request to the control API by curl.
    ///
    /// # Errors
    /// When no answer comes.
    pub fn curl(&self, method: &str, path: &str) -> anyhow::Result<Answer> {
        self.curl_with(method, path, &[])
    }

    /// The same with further options of curl.
    ///
    /// # Errors
    /// When no answer comes.
    pub fn curl_with(&self, method: &str, path: &str, options: &[&str]) -> anyhow::Result<Answer> {
        curl::request(&self.socket, method, path, options)
    }

    /// `POST path`, which must succeed with 204 and nothing else.
    ///
    /// # Errors
    /// When it does not.
    pub fn post(&self, path: &str) -> anyhow::Result<()> {
        let answer = self.curl("POST", path)?;
        if answer.status != 204 || !answer.body.is_empty() {
            bail!("POST {path} answered {answer:?}");
        }
        Ok(())
    }

    /// The VM's state: `running`, `paused`.
    ///
    /// # Errors
    /// When the VM does not answer.
    pub fn state(&self) -> anyhow::Result<String> {
        let info = self.curl("GET", "/v1/info")?.json()?;
        let state = info["state"].as_str().context("info has no state")?;
        Ok(state.to_owned())
    }

    /// What the VM's list of devices has of the device `id`.
    ///
    /// # Errors
    /// When the VM does not answer, or has no such device.
    pub fn device(&self, id: &str) -> anyhow::Result<Value> {
        let devices = self.json("devices")?;
        let mut all = devices.as_array().into_iter().flatten();
        let found = all.find(|device| device["id"] == id).cloned();
        found.with_context(|| format!("no {id} in {devices}"))
    }

    /// Names of all events so far, in order.
    ///
    /// # Errors
    /// When the VM does not answer.
    pub fn event_names(&self) -> anyhow::Result<Vec<String>> {
        let answer = self.curl("GET", "/v1/events?follow=false")?;
        let name = |line: &str| -> anyhow::Result<String> {
            let event: Value = serde_json::from_str(line)?;
            Ok(event["event"].as_str().context("no name")?.to_owned())
        };
        answer.body.lines().map(name).collect()
    }

    /// Follows the event stream by curl; it ends with the VM.
    ///
    /// # Errors
    /// When curl cannot be started, or the VM does not answer.
    pub fn follow_events(&self) -> anyhow::Result<EventStream> {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--no-buffer", "--max-time"])
            .arg(LIMIT.as_secs().to_string())
            .arg("--unix-socket")
            .arg(&self.socket)
            .arg("http://drover/v1/events");
        let (child, lines) = self.spawn(command)?;
        EventStream::connected(child, lines, LIMIT)
    }

    /// Starts a command whose output is followed.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, mut command: Command) -> anyhow::Result<(Child, Follower)> {
        process::die_with_parent(&mut command, libc::SIGKILL);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let output = child.stdout.take().context("piped")?;
        Ok((child, Follower::follow(output)))
    }
}
