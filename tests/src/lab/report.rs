//! What a person reads after a run.

use std::fmt::Write;
use std::path::Path;

use super::protocol::Verdict;

/// Lines of each log that a failure shows.
const TAIL_LINES: usize = 25;

/// How one scenario ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Its name.
    pub scenario: String,
    /// How it ended.
    pub verdict: Verdict,
    /// How long it took.
    pub seconds: f64,
    /// Why it failed or was skipped.
    pub reason: String,
}

impl Outcome {
    /// A failure.
    #[must_use]
    pub fn failed(scenario: &str, seconds: f64, reason: String) -> Self {
        Self {
            scenario: scenario.to_owned(),
            verdict: Verdict::Fail,
            seconds,
            reason,
        }
    }

    /// One line: verdict, name, time and the first line of the reason.
    #[must_use]
    pub fn line(&self) -> String {
        let reason = self.reason.lines().next().unwrap_or_default();
        format!(
            "{:<7} {:<24} {:>6.1} s  {reason}",
            word(self.verdict),
            self.scenario,
            self.seconds
        )
        .trim_end()
        .to_owned()
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Fail => "FAIL",
        Verdict::Skip => "SKIPPED",
    }
}

/// The table of all outcomes, with a sum.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for outcome in outcomes {
        text.push_str(&outcome.line());
        text.push('\n');
    }
    let count = |verdict| {
        outcomes
            .iter()
            .filter(|outcome| outcome.verdict == verdict)
            .count()
    };
    let (passed, failed, skipped) = (
        count(Verdict::Pass),
        count(Verdict::Fail),
        count(Verdict::Skip),
    );
    // Writing to a String does not fail.
    let _ = writeln!(text, "{passed} passed, {failed} failed, {skipped} skipped");
    text
}

/// The whole reason of a failure and the ends of its logs in `folder`.
///
/// # Errors
/// When the folder cannot be read.
pub fn failure(outcome: &Outcome, folder: &Path) -> std::io::Result<String> {
    let mut text = format!("---- {}: {}\n", outcome.scenario, outcome.reason);
    let mut logs = std::fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
    // The scenario's own log last, where the eye is.
    logs.sort_by_key(|path| (path.ends_with("scenario.log"), path.clone()));
    for log in logs {
        let content = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
        let lines = tail(&content, TAIL_LINES);
        if !lines.is_empty() {
            // Writing to a String does not fail.
            let _ = writeln!(text, "-- {}", log.display());
        }
        for line in lines {
            let _ = writeln!(text, "   {line}");
        }
    }
    Ok(text)
}

/// The last `count` lines that hold something.
#[must_use]
pub fn tail(text: &str, count: usize) -> Vec<&str> {
    let lines: Vec<_> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(count)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_counts_and_shows_first_line_of_reason() {
        let pass = Outcome {
            scenario: "a".into(),
            verdict: Verdict::Pass,
            seconds: 1.0,
            reason: String::new(),
        };
        let fail = Outcome::failed("b", 2.0, "no login\nmore".into());
        let text = table(&[pass, fail]);
        assert!(
            text.contains("no login") && !text.contains("more"),
            "{text}"
        );
        assert!(text.ends_with("1 passed, 1 failed, 0 skipped\n"), "{text}");
    }

    #[test]
    fn tail_skips_blank_lines() {
        assert_eq!(tail("a\n\nb \r\n\nc\n\n", 2), ["b", "c"]);
        assert_eq!(tail("a\n", 5), ["a"]);
        assert!(tail("", 5).is_empty());
    }
}
