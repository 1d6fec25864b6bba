//! What is seen of a migration from outside: when the guest stands still, what it costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::table::number;
use crate::harness::proc::{ProcessView, TICKS_PER_SECOND};
use crate::harness::ram::GuestMemory;

/// Between two looks at the heartbeats.
const INTERVAL: Duration = Duration::from_micros(150);
/// Looks between two looks at the processes.
const LOOKS_PER_SAMPLE: u32 = 40;
/// How threads of vCPUs are called: Drover's, QEMU's.
const VCPU_THREADS: [&str; 2] = ["vcpu", "CPU "];
/// How long the guest may take to go on after the migration is said to be over.
const RESUME_LIMIT: Duration = Duration::from_secs(10);

/// Finds the guest's memory in a process.
pub(in crate::bench) type Find = Box<dyn Fn(u32) -> anyhow::Result<GuestMemory> + Send>;

/// A thread that watches two processes until it is told that the migration is over.
pub(in crate::bench) struct Watch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Seen>>,
}

/// What it has seen.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::bench) struct Seen {
    /// From the last heartbeat on the source to the first one on the destination; `None`: the
    /// guest did not go on there.
    pub(in crate::bench) blackout: Option<Duration>,
    /// Most memory of the source that no file holds, over what it was before.
    pub(in crate::bench) source_growth_bytes: f64,
    /// The same of the destination, until the guest went on there.
    pub(in crate::bench) destination_growth_bytes: f64,
    /// Seconds of CPU on both sides, those of vCPUs excepted.
    pub(in crate::bench) cpu_seconds: f64,
}

impl Watch {
    /// Begins to watch. `find` finds the guest's memory in a process.
    ///
    /// # Errors
    /// When the source has no guest.
    pub(in crate::bench) fn start(
        source: u32,
        destination: u32,
        find: Find,
    ) -> anyhow::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let watcher = Watcher {
            over: Arc::clone(&over),
            memory: find(source)?,
            find,
            source: Cost::of(source)?,
            destination: Cost::of(destination)?,
        };
        let thread = std::thread::spawn(move || watcher.run());
        Ok(Self { over, thread })
    }

    /// Tells that the migration is over, and waits until the guest goes on.
    ///
    /// # Errors
    /// When the processes could not be watched.
    pub(in crate::bench) fn finish(self) -> anyhow::Result<Seen> {
        self.over.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(seen) => seen,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

struct Watcher {
    over: Arc<AtomicBool>,
    memory: GuestMemory,
    find: Find,
    source: Cost,
    destination: Cost,
}

impl Watcher {
    fn run(mut self) -> anyhow::Result<Seen> {
        let mut arrived: Option<GuestMemory> = None;
        let mut beats = Beats::default();
        let mut deadline = None;
        for look in 0_u32.. {
            // The destination first: what was copied is then never ahead of what is read next.
            let there = match &arrived {
                // A process that has ended has no heart.
                Some(memory) => memory.heartbeat().map_or(0, |beat| beat.counter),
                None => 0,
            };
            let here = self.memory.heartbeat()?.counter;
            beats.see(Instant::now(), here, there);
            if look % LOOKS_PER_SAMPLE == 0 {
                self.source.sample();
                self.destination.sample();
                if arrived.is_none() {
                    arrived = (self.find)(self.destination.pid).ok();
                }
            }
            if beats.blackout().is_some() {
                break;
            }
            if self.over.load(Ordering::Relaxed) {
                let now = Instant::now();
                if now > *deadline.get_or_insert(now + RESUME_LIMIT) {
                    break;
                }
            }
            std::thread::sleep(INTERVAL);
        }
        while !self.over.load(Ordering::Relaxed) {
            self.source.sample();
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Seen {
            blackout: beats.blackout(),
            source_growth_bytes: self.source.growth_bytes(),
            destination_growth_bytes: self.destination.growth_bytes(),
            cpu_seconds: self.source.cpu_seconds()? + self.destination.cpu_seconds()?,
        })
    }
}

/// The counters of both sides over time.
#[derive(Clone, Copy, Debug, Default)]
struct Beats {
    /// The source's highest, and when it was seen first.
    last: Option<(Instant, u64)>,
    /// When the destination's was higher for the first time.
    resumed: Option<Instant>,
}

impl Beats {
    fn see(&mut self, now: Instant, here: u64, there: u64) {
        // A source that gives its memory back reads as 0.
        if here > self.last.map_or(0, |(_, highest)| highest) {
            self.last = Some((now, here));
        }
        if there > self.last.map_or(0, |(_, highest)| highest) {
            self.resumed.get_or_insert(now);
        }
    }

    fn blackout(&self) -> Option<Duration> {
        Some(self.resumed?.duration_since(self.last?.0))
    }
}

/// What a process uses, since it was first looked at.
struct Cost {
    pid: u32,
    view: ProcessView,
    before_ticks: u64,
    vcpu_before_ticks: u64,
    vcpu_ticks: u64,
    before_bytes: u64,
    most_bytes: u64,
}

impl Cost {
    fn of(pid: u32) -> anyhow::Result<Self> {
        let view = ProcessView::of(pid);
        let bytes = view.anonymous_bytes()?;
        let vcpu = view.cpu_ticks_of(&VCPU_THREADS)?;
        Ok(Self {
            pid,
            before_ticks: view.cpu_ticks()?,
            view,
            vcpu_before_ticks: vcpu,
            vcpu_ticks: vcpu,
            before_bytes: bytes,
            most_bytes: bytes,
        })
    }

    /// Of a process that is ending nothing can be told; what was seen last stays.
    fn sample(&mut self) {
        if let Ok(bytes) = self.view.anonymous_bytes() {
            self.most_bytes = self.most_bytes.max(bytes);
        }
        if let Ok(ticks) = self.view.cpu_ticks_of(&VCPU_THREADS) {
            self.vcpu_ticks = self.vcpu_ticks.max(ticks);
        }
    }

    fn growth_bytes(&self) -> f64 {
        number(self.most_bytes - self.before_bytes)
    }

    /// Works for a process that has ended and was not waited for, too.
    fn cpu_seconds(&mut self) -> anyhow::Result<f64> {
        self.sample();
        let all = self.view.cpu_ticks()?.saturating_sub(self.before_ticks);
        let vcpus = self.vcpu_ticks - self.vcpu_before_ticks;
        Ok(number(all.saturating_sub(vcpus)) / number(TICKS_PER_SECOND))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_stands_still_between_the_last_beat_here_and_the_first_there() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut beats = Beats::default();
        beats.see(at(0), 5, 0);
        // A copy of the page is no beat, nor is a source that has given its memory back.
        beats.see(at(1), 9, 5);
        beats.see(at(2), 9, 9);
        beats.see(at(3), 0, 9);
        assert_eq!(beats.blackout(), None);
        beats.see(at(4), 0, 10);
        beats.see(at(5), 0, 12);
        assert_eq!(beats.blackout(), Some(Duration::from_millis(3)));
    }

    #[test]
    fn own_process_has_times_and_memory() {
        let pid = std::process::id();
        let mut cost = Cost::of(pid).unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(100) {
            std::hint::black_box(0);
        }
        let memory = std::hint::black_box(vec![1_u8; 64 << 20]);
        // On a busy machine not all of the time was ours.
        assert!(cost.cpu_seconds().unwrap() > 0.0);
        assert!(cost.growth_bytes() > 32e6);
        drop(memory);
    }
}
