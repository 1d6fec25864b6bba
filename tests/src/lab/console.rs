//! What a guest writes: kept in a log, followed, and its reports taken.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};

use super::protocol::Report;
use crate::harness::follower::Follower;

/// Follows `source` to its end in the background, with a copy into `log`.
///
/// # Errors
/// When the log cannot be created.
pub fn follow(source: impl Read + Send + 'static, log: &Path) -> anyhow::Result<Follower> {
    let log = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    Ok(Follower::follow(Logged { source, log }))
}

/// Copies what is read.
struct Logged<R> {
    source: R,
    log: File,
}

impl<R: Read> Read for Logged<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buf)?;
        // A full log disk costs the log, not the scenario.
        let _ = self.log.write_all(buf.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// Waits for the guest's next report of `task` that holds `key` (`result`, where any other report
/// of the task is only progress).
///
/// # Errors
/// When none comes in time, or one comes that says `result=fail`.
pub fn wait_report(
    console: &mut Follower,
    task: &str,
    key: &str,
    limit: Duration,
) -> anyhow::Result<Report> {
    let report = console
        .wait_line(limit, |line| {
            let report = Report::from_line(line)?;
            let failed = report.get("result") == Some("fail");
            let wanted = report.get("task") == Some(task) && (failed || report.get(key).is_some());
            wanted.then_some(report)
        })
        .with_context(|| format!("waited for the guest's report of {task}"))?;
    if report.get("result") == Some("fail") {
        bail!("the guest reports that {task} failed: {report:?}");
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use std::io::pipe;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn report_is_taken_whole_and_a_failed_one_is_an_error() {
        let (reader, mut writer) = pipe().unwrap();
        let mut console = follow(reader, Path::new("/dev/null")).unwrap();
        writer.write_all(b"\nL2 task=disk state=writing\nL2 task=disk sha256=12 result=ok\r\nL2 task=net res").unwrap();
        assert_eq!(
            wait_report(&mut console, "disk", "result", LONG)
                .unwrap()
                .get("sha256"),
            Some("12")
        );
        wait_report(&mut console, "net", "result", SHORT).unwrap_err();
        writer.write_all(b"ult=fail\n").unwrap();
        let error = format!(
            "{:#}",
            wait_report(&mut console, "net", "result", LONG).unwrap_err()
        );
        assert!(error.contains("net failed"), "{error}");
    }
}
