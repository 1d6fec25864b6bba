//! Follows what a guest, or any program, writes, and waits for parts of it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::protocol::Report;
use super::report::tail;

/// Lines that a failed wait shows.
const SHOWN_LINES: usize = 8;

/// A stream that a thread reads; waits move a cursor forward through it, so that a
/// second wait for the same text means a second occurrence.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
    cursor: usize,
}

#[derive(Debug, Default)]
struct Shared {
    stream: Mutex<Stream>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Stream {
    bytes: Vec<u8>,
    ended: bool,
}

impl Console {
    /// Reads `source` to its end in the background, with a copy into `log`.
    ///
    /// # Errors
    /// When the log cannot be created.
    pub fn follow(source: impl Read + Send + 'static, log: &Path) -> anyhow::Result<Self> {
        let log = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let shared = Arc::new(Shared::default());
        let reader = Arc::clone(&shared);
        std::thread::spawn(move || {
            pump(source, log, &reader);
            reader.lock().ended = true;
            reader.changed.notify_all();
        });
        Ok(Self { shared, cursor: 0 })
    }

    /// Waits until `text` comes; what came before it since the last wait.
    ///
    /// # Errors
    /// When it has not come in time or cannot come any more.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> anyhow::Result<String> {
        let found = self.wait(limit, |new| {
            let at = find(new, text.as_bytes())?;
            Some((
                at + text.len(),
                String::from_utf8_lossy(&new[..at]).into_owned(),
            ))
        });
        found.with_context(|| format!("waited for '{text}'"))
    }

    /// Waits for the guest's next report of `task` that holds `key`
    /// (`result`, where any other report of the task is only progress).
    ///
    /// # Errors
    /// When none comes in time, or one comes that says `result=fail`.
    pub fn wait_report(
        &mut self,
        task: &str,
        key: &str,
        limit: Duration,
    ) -> anyhow::Result<Report> {
        let report = self
            .wait(limit, |new| {
                complete_lines(new).find_map(|(end, line)| {
                    let report = Report::from_line(&String::from_utf8_lossy(line))?;
                    let failed = report.get("result") == Some("fail");
                    let wanted =
                        report.get("task") == Some(task) && (failed || report.get(key).is_some());
                    wanted.then_some((end, report))
                })
            })
            .with_context(|| format!("waited for the guest's report of {task}"))?;
        if report.get("result") == Some("fail") {
            bail!("the guest reports that {task} failed: {report:?}");
        }
        Ok(report)
    }

    /// Waits for the end of the stream.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait_end(&mut self, limit: Duration) -> anyhow::Result<()> {
        let mut stream = self.shared.lock();
        let deadline = Instant::now() + limit;
        while !stream.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the console did not end within {} s", limit.as_secs());
            }
            stream = self.shared.wait(stream, left);
        }
        Ok(())
    }

    /// Everything so far, from the start.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    /// Moves the cursor to what comes from now on.
    pub fn forget(&mut self) {
        self.cursor = self.shared.lock().bytes.len();
    }

    /// Waits until `seek` finds something behind the cursor; it answers with the
    /// number of bytes to move the cursor by, and the result.
    fn wait<T>(
        &mut self,
        limit: Duration,
        seek: impl Fn(&[u8]) -> Option<(usize, T)>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + limit;
        let mut stream = self.shared.lock();
        loop {
            if let Some((used, found)) = seek(&stream.bytes[self.cursor..]) {
                self.cursor += used;
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if stream.ended || left.is_zero() {
                let why = if stream.ended {
                    "the console ended".to_owned()
                } else {
                    format!("nothing for {} s", limit.as_secs())
                };
                let text = String::from_utf8_lossy(&stream.bytes).into_owned();
                bail!(
                    "{why}; it last said: {}",
                    tail(&text, SHOWN_LINES).join(" | ")
                );
            }
            stream = self.shared.wait(stream, left);
        }
    }
}

impl Shared {
    /// A panicked reader leaves a stream that is short, not wrong.
    fn lock(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, stream: MutexGuard<'a, Stream>, limit: Duration) -> MutexGuard<'a, Stream> {
        self.changed
            .wait_timeout(stream, limit)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }
}

/// Copies `source` into the log and the stream until it ends or fails.
fn pump(mut source: impl Read, mut log: File, shared: &Shared) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = source.read(&mut buffer) {
        let new = &buffer[..count];
        // A full log disk costs the log, not the scenario.
        let _ = log.write_all(new);
        shared.lock().bytes.extend_from_slice(new);
        shared.changed.notify_all();
    }
}

/// The lines that have ended, each with the offset behind it.
fn complete_lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut end = 0;
    bytes
        .split_inclusive(|&byte| byte == b'\n')
        .filter(|line| line.ends_with(b"\n"))
        .map(move |line| {
            end += line.len();
            (end, line)
        })
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes
        .windows(wanted.len())
        .position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use std::io::pipe;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(10);

    fn console() -> (impl Write, Console) {
        let (reader, writer) = pipe().unwrap();
        (
            writer,
            Console::follow(reader, Path::new("/dev/null")).unwrap(),
        )
    }

    #[test]
    fn wait_moves_past_what_it_found() {
        let (mut writer, mut console) = console();
        writer.write_all(b"boot login: root\nlogin: ").unwrap();
        assert_eq!(console.wait_for("login:", LONG).unwrap(), "boot ");
        assert_eq!(console.wait_for("login:", LONG).unwrap(), " root\n");
        let error = format!("{:#}", console.wait_for("login:", SHORT).unwrap_err());
        assert!(
            error.contains("'login:'") && error.contains("boot login"),
            "{error}"
        );
    }

    #[test]
    fn wait_sees_text_that_comes_in_pieces() {
        let (mut writer, mut console) = console();
        let waiter = std::thread::spawn(move || console.wait_for("ready", LONG).is_ok());
        for piece in ["re", "ad", "y"] {
            writer.write_all(piece.as_bytes()).unwrap();
        }
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn wait_ends_early_when_the_console_ends() {
        let (mut writer, mut console) = console();
        writer.write_all(b"panic").unwrap();
        drop(writer);
        let started = Instant::now();
        let error = format!("{:#}", console.wait_for("login:", LONG).unwrap_err());
        assert!(
            error.contains("the console ended") && error.contains("panic"),
            "{error}"
        );
        assert!(started.elapsed() < LONG);
        console.wait_end(LONG).unwrap();
    }

    #[test]
    fn report_is_taken_whole_and_a_failed_one_is_an_error() {
        let (mut writer, mut console) = console();
        writer.write_all(b"\nL2 task=disk state=writing\nL2 task=disk sha256=12 result=ok\r\nL2 task=net res").unwrap();
        assert_eq!(
            console
                .wait_report("disk", "result", LONG)
                .unwrap()
                .get("sha256"),
            Some("12")
        );
        console.wait_report("net", "result", SHORT).unwrap_err();
        writer.write_all(b"ult=fail\n").unwrap();
        let error = format!(
            "{:#}",
            console.wait_report("net", "result", LONG).unwrap_err()
        );
        assert!(error.contains("net failed"), "{error}");
    }
}
