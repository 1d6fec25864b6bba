//! What `lab` and `lab_agent` tell each other.
//!
//! L0 writes one [`Request`] as `request.json` into the share. L1 answers on its
//! second serial port with lines of the form `LAB {json}`, one [`Event`] each. A
//! port of its own keeps kernel messages out of the middle of a line.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Name of the request file in the share.
pub const REQUEST_FILE: &str = "request.json";

/// L1's mount point of the share.
pub const SHARE_IN_L1: &str = "/host";

/// L1's mount point of the artefact cache.
pub const MEDIA_IN_L1: &str = "/media";

/// What L1 is asked to do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Scenarios to run, in this order.
    pub scenarios: Vec<String>,
    /// Time limits in seconds that replace those of the table.
    pub limit_s: Option<u64>,
    /// How often a guest moves in scenarios that go back and forth, if another number than theirs.
    pub moves: Option<u32>,
    /// Artefact name to its path in L1.
    pub artefacts: BTreeMap<String, PathBuf>,
}

/// One thing that happened in L1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// The agent runs.
    Boot {
        /// L1's kernel release.
        kernel: String,
        /// Seconds since L1's kernel started.
        uptime_s: f64,
    },
    /// A scenario starts.
    Start {
        /// Its name.
        scenario: String,
    },
    /// A scenario ended.
    End {
        /// Its name.
        scenario: String,
        /// How it ended.
        verdict: Verdict,
        /// How long it took.
        seconds: f64,
        /// Why it failed or was skipped; empty after a pass.
        reason: String,
    },
    /// Every requested scenario has ended; L1 powers off.
    Done,
}

/// How a scenario ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It did what it says.
    Pass,
    /// It did not.
    Fail,
    /// It could not run here.
    Skip,
}

/// What every verdict line starts with.
const PREFIX: &str = "LAB ";

impl Event {
    /// The event as a line, without its end.
    ///
    /// # Errors
    /// When the event cannot be put into JSON (a non-finite number).
    pub fn to_line(&self) -> serde_json::Result<String> {
        Ok(format!("{PREFIX}{}", serde_json::to_string(self)?))
    }

    /// Reads a line; `None` when it is no verdict line or a damaged one.
    #[must_use]
    pub fn from_line(line: &str) -> Option<Self> {
        serde_json::from_str(line.trim_end().strip_prefix(PREFIX)?).ok()
    }
}

/// A report line of the guest: `L2 task=NAME key=value ...`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    fields: BTreeMap<String, String>,
}

impl Report {
    /// Reads a console line; `None` when it is no report.
    #[must_use]
    pub fn from_line(line: &str) -> Option<Self> {
        let words = line.trim().strip_prefix("L2 ")?;
        let fields = words
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Some(Self { fields })
    }

    /// The value of `key`, if the line has one.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.fields.get(key).map(String::as_str)
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// When the line does not have it.
    pub fn text(&self, key: &str) -> anyhow::Result<&str> {
        self.get(key)
            .ok_or_else(|| anyhow::anyhow!("the guest's report {self:?} has no field '{key}'"))
    }

    /// The value of `key` as a number.
    ///
    /// # Errors
    /// When the line does not have it or it is not a number.
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> anyhow::Result<T> {
        let text = self.text(key)?;
        text.parse()
            .map_err(|_| anyhow::anyhow!("the guest reported {key}={text}, which is no number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_survives_the_serial_line() {
        let event = Event::End {
            scenario: "boot-lab".into(),
            verdict: Verdict::Fail,
            seconds: 1.5,
            reason: "console said \"panic\"\nand more".into(),
        };
        let line = event.to_line().unwrap();
        assert!(!line.contains('\n'), "one event is one line: {line}");
        assert_eq!(Event::from_line(&format!("{line}\r\n")), Some(event));
    }

    #[test]
    fn other_lines_are_no_events() {
        for line in [
            "",
            "LAB",
            "LAB {",
            "LAB {\"event\":\"end\"}",
            "[ 1.0] LAB {\"event\":\"done\"}",
        ] {
            assert_eq!(Event::from_line(line), None, "{line}");
        }
        assert_eq!(
            Event::from_line("LAB {\"event\":\"done\"}"),
            Some(Event::Done)
        );
    }

    #[test]
    fn report_gives_text_and_numbers_and_names_what_is_missing() {
        let report = Report::from_line("L2 task=boot cpus=4 kernel=6.12.1-lab\r\n").unwrap();
        assert_eq!(report.get("task"), Some("boot"));
        assert_eq!(report.number::<u32>("cpus").unwrap(), 4);
        assert!(
            report
                .number::<u32>("kernel")
                .unwrap_err()
                .to_string()
                .contains("kernel=6.12.1")
        );
        assert!(
            report
                .text("sum")
                .unwrap_err()
                .to_string()
                .contains("'sum'")
        );
        assert_eq!(Report::from_line("login: L2 task=boot"), None);
    }
}
