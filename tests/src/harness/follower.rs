//! Follows what a guest, or any program, writes, and waits for parts of it.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// Bytes of the stream that a failed wait shows.
const SHOWN: usize = 1000;

/// A stream that a thread reads; waits move a cursor forward through it, so that a second wait for
/// the same text means a second occurrence.
#[derive(Debug)]
pub struct Follower {
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

impl Follower {
    /// Reads `source` to its end in the background.
    #[must_use]
    pub fn follow(mut source: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let reader = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                let new = buffer.get(..count).unwrap_or_default();
                reader.lock().bytes.extend_from_slice(new);
                reader.changed.notify_all();
            }
            reader.lock().ended = true;
            reader.changed.notify_all();
        });
        Self { shared, cursor: 0 }
    }

    /// Waits until `text` comes; what came before it since the last wait.
    ///
    /// # Errors
    /// When it has not come in time or cannot come any more.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> anyhow::Result<String> {
        let found = self.wait(limit, |new| {
            let at = find(new, text.as_bytes())?;
            let before = String::from_utf8_lossy(new.get(..at)?).into_owned();
            Some((at + text.len(), before))
        });
        found.with_context(|| format!("waited for '{text}'"))
    }

    /// Waits for the next whole line of which `pick` makes something; lines before it are passed.
    ///
    /// # Errors
    /// When none comes in time or can come any more.
    pub fn wait_line<T>(
        &mut self,
        limit: Duration,
        pick: impl Fn(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        self.wait(limit, |new| {
            let mut end = 0;
            new.split_inclusive(|byte| *byte == b'\n')
                .filter(|line| line.ends_with(b"\n"))
                .find_map(|line| {
                    end += line.len();
                    let line = String::from_utf8_lossy(line);
                    Some((end, pick(line.trim_end())?))
                })
        })
    }

    /// Waits for the end of the stream.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait_end(&mut self, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        let mut stream = self.shared.lock();
        while !stream.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the stream did not end within {} s", limit.as_secs());
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

    /// Moves the cursor back to the start.
    pub fn rewind(&mut self) {
        self.cursor = 0;
    }

    /// Waits until `seek` finds something behind the cursor; it answers with the number of bytes
    /// to move the cursor by, and the result.
    fn wait<T>(
        &mut self,
        limit: Duration,
        seek: impl Fn(&[u8]) -> Option<(usize, T)>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + limit;
        let mut stream = self.shared.lock();
        loop {
            let new = stream.bytes.get(self.cursor..).unwrap_or_default();
            if let Some((used, found)) = seek(new) {
                self.cursor += used;
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if stream.ended || left.is_zero() {
                let why = if stream.ended {
                    "the stream ended".to_owned()
                } else {
                    format!("nothing for {} s", limit.as_secs())
                };
                bail!("{why}; it last said: {}", tail(&stream.bytes));
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

fn tail(bytes: &[u8]) -> String {
    let start = bytes.len().saturating_sub(SHOWN);
    let shown = bytes.get(start..).unwrap_or_default();
    String::from_utf8_lossy(shown).trim().replace('\n', " | ")
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes
        .windows(wanted.len())
        .position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use std::io::{Write, pipe};

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(10);

    fn follower() -> (impl Write, Follower) {
        let (reader, writer) = pipe().unwrap();
        (writer, Follower::follow(reader))
    }

    #[test]
    fn wait_moves_past_what_it_found() {
        let (mut writer, mut follower) = follower();
        writer.write_all(b"boot login: root\nlogin: ").unwrap();
        assert_eq!(follower.wait_for("login:", LONG).unwrap(), "boot ");
        assert_eq!(follower.wait_for("login:", LONG).unwrap(), " root\n");
        let error = format!("{:#}", follower.wait_for("login:", SHORT).unwrap_err());
        assert!(error.contains("'login:'"), "{error}");
        assert!(error.contains("boot login"), "{error}");
    }

    #[test]
    fn wait_sees_text_that_comes_in_pieces() {
        let (mut writer, mut follower) = follower();
        let waiter = std::thread::spawn(move || follower.wait_for("ready", LONG).is_ok());
        for piece in ["re", "ad", "y"] {
            writer.write_all(piece.as_bytes()).unwrap();
        }
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn wait_ends_early_when_the_stream_ends() {
        let (mut writer, mut follower) = follower();
        writer.write_all(b"panic").unwrap();
        drop(writer);
        let started = Instant::now();
        let error = format!("{:#}", follower.wait_for("login:", LONG).unwrap_err());
        assert!(error.contains("the stream ended"), "{error}");
        assert!(started.elapsed() < LONG);
        follower.wait_end(LONG).unwrap();
    }

    #[test]
    fn line_is_taken_whole_and_in_order() {
        let (mut writer, mut follower) = follower();
        writer.write_all(b"a=1\r\nb=2\na=").unwrap();
        let value = |line: &str| line.strip_prefix("a=").map(str::to_owned);
        assert_eq!(follower.wait_line(LONG, value).unwrap(), "1");
        follower.wait_line(SHORT, value).unwrap_err();
        writer.write_all(b"3\n").unwrap();
        assert_eq!(follower.wait_line(LONG, value).unwrap(), "3");
    }
}
