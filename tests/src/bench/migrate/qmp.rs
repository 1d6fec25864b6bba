//! QEMU's control socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::harness::process;

const LIMIT: Duration = Duration::from_secs(30);

/// A connection to QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    /// The start of a line whose end has not come yet.
    line: String,
    /// Statuses of the migration that came while an answer was awaited.
    statuses: Vec<String>,
}

impl Qmp {
    /// Connects as soon as the socket is there.
    ///
    /// # Errors
    /// When it is not in time, or does not speak QMP.
    pub(super) fn connect(path: &Path) -> anyhow::Result<Self> {
        let connect = || UnixStream::connect(path).ok();
        let stream = process::wait_until(Instant::now() + LIMIT, connect);
        let stream = stream.with_context(|| format!("{} does not answer", path.display()))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            line: String::new(),
            statuses: Vec::new(),
        };
        let greeting = qmp.message(Instant::now() + LIMIT)?;
        greeting.context("QEMU does not greet")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; its answer.
    ///
    /// # Errors
    /// What QEMU says against it.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{request}")?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let message = self.message(deadline)?;
            let mut message = message.with_context(|| format!("no answer to {command}"))?;
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.get("error") {
                bail!("{command}: {error}");
            }
            self.statuses.extend(status(&message));
        }
    }

    /// Waits until the migration has come to an end: `completed`, `failed`, `cancelled`. `None`:
    /// it still runs at the deadline.
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn wait_migration(&mut self, deadline: Instant) -> anyhow::Result<Option<String>> {
        loop {
            for status in std::mem::take(&mut self.statuses) {
                if ["completed", "failed", "cancelled"].contains(&status.as_str()) {
                    return Ok(Some(status));
                }
            }
            match self.message(deadline)? {
                Some(message) => self.statuses.extend(status(&message)),
                None => return Ok(None),
            }
        }
    }

    /// The next message; `None`: none came in time.
    fn message(&mut self, deadline: Instant) -> anyhow::Result<Option<Value>> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        self.stream.get_ref().set_read_timeout(Some(left))?;
        match self.stream.read_line(&mut self.line) {
            Ok(0) => bail!("QEMU has closed its control socket"),
            Ok(_) => {
                let message = serde_json::from_str(&self.line);
                let message = message.with_context(|| format!("QEMU wrote {}", self.line))?;
                self.line.clear();
                Ok(Some(message))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Ok(None)
            }
            Err(error) => Err(error).context("QEMU's control socket"),
        }
    }
}

/// The migration's status, if the message tells one.
fn status(message: &Value) -> Option<String> {
    let is_migration = message.get("event").and_then(Value::as_str) == Some("MIGRATION");
    let status = message.pointer("/data/status").and_then(Value::as_str);
    status.filter(|_| is_migration).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_a_migration_is_heard_also_before_the_answer() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut qmp = Qmp {
            stream: BufReader::new(ours),
            line: String::new(),
            statuses: Vec::new(),
        };
        let lines = [
            json!({ "event": "MIGRATION", "data": { "status": "active" } }),
            json!({ "event": "STOP", "data": { "status": "failed" } }),
            json!({ "event": "MIGRATION", "data": { "status": "completed" } }),
            json!({ "return": {} }),
        ];
        for line in lines {
            writeln!(&theirs, "{line}").unwrap();
        }
        qmp.execute("migrate", json!({ "uri": "tcp:" })).unwrap();
        let end = qmp.wait_migration(Instant::now()).unwrap();
        assert_eq!(end.as_deref(), Some("completed"));
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(qmp.wait_migration(soon).unwrap(), None);
    }
}
