//! A VM's event stream.

use std::process::Child;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use super::follower::Follower;
use super::process;

/// Events as they come. Dropping it disconnects.
#[derive(Debug)]
pub struct EventStream {
    reader: Child,
    lines: Follower,
}

impl EventStream {
    /// Takes a reader that was just started, and waits for the first line: from then on it is
    /// connected and misses nothing.
    pub(super) fn connected(
        reader: Child,
        lines: Follower,
        limit: Duration,
    ) -> anyhow::Result<Self> {
        let mut stream = Self { reader, lines };
        let first = stream.lines.wait_line(limit, |_| Some(()));
        first.context("waited for the first event")?;
        stream.lines.rewind();
        Ok(stream)
    }

    /// Waits for the next event named `name`; those before it are passed.
    ///
    /// # Errors
    /// When none comes in time, or the stream ends before.
    pub fn wait(&mut self, name: &str, limit: Duration) -> anyhow::Result<Value> {
        let found = self.lines.wait_line(limit, |line| {
            let event: Value = serde_json::from_str(line).ok()?;
            (event["event"] == name).then_some(event)
        });
        found.with_context(|| format!("waited for event {name}"))
    }

    /// Waits for the end of the stream; all its events.
    ///
    /// # Errors
    /// When it does not end in time, ends with an error, or holds something else than events.
    pub fn wait_end(mut self, limit: Duration) -> anyhow::Result<Vec<Value>> {
        self.lines.wait_end(limit)?;
        let status = process::wait_exit(&mut self.reader, limit)?;
        if !status.is_some_and(|status| status.success()) {
            bail!("the reader of the event stream ended with {status:?}");
        }
        let text = self.lines.text();
        text.lines()
            .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
            .collect()
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.reader.kill();
        let _ = self.reader.wait();
    }
}

/// The names of `events`.
#[must_use]
pub fn names(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|e| e["event"].as_str()).collect()
}
