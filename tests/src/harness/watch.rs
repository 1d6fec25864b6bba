//! Where a VM that moves runs, seen from outside: the guest's heartbeat in the memory of both
//! processes.
//!
//! The destination's memory gets the heartbeat's page as part of the copy, so that a word that
//! changes there proves nothing. What proves that it runs is a count that the source has not
//! reached.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::ram::{GuestMemory, Heartbeat};

/// Between two looks.
const INTERVAL: Duration = Duration::from_micros(100);

/// Between two attempts to find the destination's memory.
const SEARCH: Duration = Duration::from_millis(2);

/// Two processes, watched in the background.
#[derive(Debug)]
pub struct Watch {
    over: Arc<AtomicBool>,
    still: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Seen>>,
}

/// A beat and when it was seen.
#[derive(Clone, Copy, Debug)]
pub struct Beat {
    /// When.
    pub at: Instant,
    /// The record.
    pub record: Heartbeat,
}

/// What was seen.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The source's last new beat.
    pub last: Beat,
    /// The first beat that only the destination has.
    pub first: Option<Beat>,
    /// Longest time between two looks at both around the change.
    pub blur: Duration,
}

impl Watch {
    /// Watches a running VM whose memory is `source`, and the process where it may go on.
    ///
    /// # Errors
    /// When the source's memory cannot be read.
    pub fn start(source: GuestMemory, destination: u32) -> anyhow::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let still = Arc::new(AtomicBool::new(false));
        let record = source.heartbeat()?;
        let last = Beat {
            at: Instant::now(),
            record,
        };
        let watcher = Watcher {
            source,
            destination,
            memory: None,
            searched: last.at,
            seen: Seen {
                last,
                first: None,
                blur: Duration::ZERO,
            },
        };
        let (end, stopped) = (Arc::clone(&over), Arc::clone(&still));
        let thread = std::thread::spawn(move || watcher.run(&end, &stopped));
        Ok(Self {
            over,
            still,
            thread,
        })
    }

    /// Waits until the source has not beaten for half a millisecond, or the limit has passed.
    pub fn wait_still(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while !self.still.load(Ordering::Relaxed) && Instant::now() < deadline {
            std::thread::sleep(INTERVAL);
        }
    }

    /// Stops to watch.
    ///
    /// # Errors
    /// When both ran, or memory cannot be read.
    pub fn finish(self) -> anyhow::Result<Seen> {
        self.over.store(true, Ordering::Release);
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Seen {
    /// How long the guest's heart stood still while it moved.
    ///
    /// # Errors
    /// When it does not beat at the destination.
    pub fn gap(&self) -> anyhow::Result<Duration> {
        let first = self.first.context("the destination never ran the VM")?;
        Ok(first.at - self.last.at)
    }

    /// How far the guest's time stamp counter went on meanwhile.
    ///
    /// # Errors
    /// When the guest does not run there, or its counter went back.
    pub fn guest_time(&self) -> anyhow::Result<Duration> {
        let first = self.first.context("the destination never ran the VM")?;
        let (before, after) = (self.last.record, first.record);
        ensure!(
            after.tsc >= before.tsc,
            "the guest's time stamp counter went back from {} to {}",
            before.tsc,
            after.tsc
        );
        ensure!(before.tsc_khz > 0, "the guest does not know its frequency");
        let micros = u128::from(after.tsc - before.tsc) * 1000 / u128::from(before.tsc_khz);
        Ok(Duration::from_micros(u64::try_from(micros)?))
    }
}

struct Watcher {
    source: GuestMemory,
    destination: u32,
    memory: Option<GuestMemory>,
    searched: Instant,
    seen: Seen,
}

impl Watcher {
    fn run(mut self, over: &AtomicBool, still: &AtomicBool) -> anyhow::Result<Seen> {
        let mut looked = Instant::now();
        loop {
            // Whoever stops to watch may have seen the destination's heart beat: a last look sees
            // it, too, however late this thread is.
            let is_last = over.load(Ordering::Acquire);
            self.look(is_last)?;
            let now = Instant::now();
            if self.seen.first.is_none() {
                let since_beat = now - self.seen.last.at;
                still.store(since_beat > Duration::from_micros(500), Ordering::Relaxed);
                self.seen.blur = match since_beat < Duration::from_secs(1) {
                    true => self.seen.blur.max(now - looked),
                    false => Duration::ZERO,
                };
            }
            if is_last {
                return Ok(self.seen);
            }
            looked = now;
            std::thread::sleep(INTERVAL);
        }
    }

    fn look(&mut self, is_last: bool) -> anyhow::Result<()> {
        if self.memory.is_none() && (is_last || self.searched.elapsed() > SEARCH) {
            self.memory = GuestMemory::of(self.destination).ok();
            self.searched = Instant::now();
        }
        // First the destination: what the source has reached by now, it had not reached before.
        let there = self.memory.as_ref().map(GuestMemory::heartbeat);
        let there = there.transpose()?;
        let here = self.source.heartbeat()?;
        let now = Instant::now();
        let last = self.seen.last.record;
        if here.counter != last.counter {
            if self.seen.first.is_some() {
                bail!("the source runs after the destination has: {last:?}, then {here:?}");
            }
            self.seen.last = Beat {
                at: now,
                record: here,
            };
        }
        if let (Some(there), None) = (there, self.seen.first)
            && there.counter > here.counter
        {
            self.seen.first = Some(Beat {
                at: now,
                record: there,
            });
        }
        Ok(())
    }
}
