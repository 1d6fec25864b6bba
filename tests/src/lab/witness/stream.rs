//! A TCP connection on which no byte may be lost, doubled or out of order: numbers that count up,
//! there and back.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// Numbers in one write.
const CHUNK: u64 = 128;
/// Between two writes.
const PAUSE: Duration = Duration::from_millis(5);
/// A connection that is silent for so long is dead.
const PATIENCE: Duration = Duration::from_secs(30);

/// Numbers that were received, which must be 0, 1, 2...
#[derive(Debug, Default)]
struct Counting {
    next: u64,
    part: Vec<u8>,
}

impl Counting {
    fn take(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.part.extend_from_slice(bytes);
        let whole = self.part.len() / 8 * 8;
        for bytes in self.part.get(..whole).unwrap_or_default().chunks_exact(8) {
            let number = bytes.try_into().map_or(0, u64::from_le_bytes);
            ensure!(
                number == self.next,
                "number {number} came where {} was due",
                self.next
            );
            self.next += 1;
        }
        self.part.drain(..whole);
        Ok(())
    }

    fn finish(&self) -> anyhow::Result<u64> {
        ensure!(self.part.is_empty(), "the stream ended within a number");
        Ok(self.next)
    }
}

/// The guest's half: sends until `stop`, then waits until all has come back; `returned` counts.
///
/// # Errors
/// When the connection breaks, or a number does not come back in its place.
pub fn call(peer: &str, returned: &AtomicU64, stop: &AtomicBool) -> anyhow::Result<()> {
    let mut sender = TcpStream::connect(peer).with_context(|| format!("cannot reach {peer}"))?;
    sender.set_write_timeout(Some(PATIENCE))?;
    let receiver = sender.try_clone()?;
    receiver.set_read_timeout(Some(PATIENCE))?;
    std::thread::scope(|scope| {
        let echo = scope.spawn(move || count(receiver, returned));
        let mut sent = 0;
        while !stop.load(Ordering::SeqCst) && !echo.is_finished() {
            let chunk: Vec<u8> = (sent..sent + CHUNK).flat_map(u64::to_le_bytes).collect();
            sender.write_all(&chunk).context("the guest cannot send")?;
            sent += CHUNK;
            std::thread::sleep(PAUSE);
        }
        sender.shutdown(Shutdown::Write)?;
        let echoed = echo.join().expect("it does not panic")?;
        ensure!(
            echoed == sent,
            "{sent} numbers were sent, {echoed} came back"
        );
        Ok(())
    })
}

fn count(mut receiver: TcpStream, returned: &AtomicU64) -> anyhow::Result<u64> {
    let mut counting = Counting::default();
    let mut buffer = [0; 8192];
    loop {
        match receiver.read(&mut buffer) {
            Ok(0) => return counting.finish(),
            Ok(read) => counting.take(buffer.get(..read).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("the guest cannot receive"),
        }
        returned.store(counting.next, Ordering::SeqCst);
    }
}

/// What the peer saw.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Numbers, all in order.
    pub numbers: u64,
    /// The longest time in which none came.
    pub longest_silence: Duration,
}

/// The peer's half: takes one connection, checks and sends back what comes.
///
/// # Errors
/// When the connection breaks or a number is out of place.
pub fn answer(listener: &TcpListener) -> anyhow::Result<Seen> {
    let (mut stream, _) = listener.accept().context("no guest calls")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let mut counting = Counting::default();
    let mut buffer = [0; 8192];
    let mut last = Instant::now();
    let mut longest_silence = Duration::ZERO;
    loop {
        let read = stream
            .read(&mut buffer)
            .context("the peer cannot receive")?;
        longest_silence = longest_silence.max(last.elapsed());
        last = Instant::now();
        if read == 0 {
            let numbers = counting.finish()?;
            return Ok(Seen {
                numbers,
                longest_silence,
            });
        }
        let bytes = buffer.get(..read).unwrap_or_default();
        counting.take(bytes)?;
        stream.write_all(bytes).context("the peer cannot send")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_there_and_back_and_a_lost_one_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (returned, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| call(&address, &returned, &stop));
            let peer = scope.spawn(|| answer(&listener));
            while returned.load(Ordering::SeqCst) < 5 * CHUNK {
                std::thread::yield_now();
            }
            stop.store(true, Ordering::SeqCst);
            guest.join().unwrap().unwrap();
            let seen = peer.join().unwrap().unwrap();
            assert_eq!(seen.numbers, returned.load(Ordering::SeqCst));
        });
        let mut counting = Counting::default();
        let numbers = |range: [u64; 2]| range.map(u64::to_le_bytes).concat();
        counting.take(&numbers([0, 1])[..13]).unwrap();
        counting.finish().unwrap_err();
        counting.take(&numbers([0, 1])[13..]).unwrap();
        counting.take(&numbers([3, 4])).unwrap_err();
    }
}
