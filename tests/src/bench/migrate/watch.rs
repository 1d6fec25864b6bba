//! What is seen of a migration from outside: when the guest stands still, what it costs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use drover_guest::heartbeat;

use super::table::number;

/// Between two looks at the heartbeats.
const INTERVAL: Duration = Duration::from_micros(150);
/// Looks between two looks at the processes.
const LOOKS_PER_SAMPLE: u32 = 40;
/// How memory files of guests are called: Drover's, QEMU's.
const MEMORY_FILES: [&str; 2] = ["/memfd:guest-ram", "/memfd:memory-backend-memfd"];
/// How threads of vCPUs are called: Drover's, QEMU's.
const VCPU_THREADS: [&str; 2] = ["vcpu", "CPU "];
/// How long the guest may take to go on after the migration is said to be over.
const RESUME_LIMIT: Duration = Duration::from_secs(10);
/// `USER_HZ`, the unit of times in proc(5), is 100 on x86-64.
const TICKS_PER_SECOND: f64 = 100.0;

/// A thread that watches two processes until it is told that the migration is over.
pub(super) struct Watch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Seen>>,
}

/// What it has seen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// From the last heartbeat on the source to the first one on the destination; `None`: the
    /// guest did not go on there.
    pub(super) blackout: Option<Duration>,
    /// Most memory of the source that no file holds, over what it was before.
    pub(super) source_growth_bytes: f64,
    /// Seconds of CPU on both sides, those of vCPUs excepted.
    pub(super) cpu_seconds: f64,
}

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// When the source has no guest.
    pub(super) fn start(source: u32, destination: u32) -> anyhow::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let watcher = Watcher {
            over: Arc::clone(&over),
            memory: memory_of(source)?.context("the source has no guest memory")?,
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
    pub(super) fn finish(self) -> anyhow::Result<Seen> {
        self.over.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(seen) => seen,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

struct Watcher {
    over: Arc<AtomicBool>,
    memory: File,
    source: Cost,
    destination: Cost,
}

impl Watcher {
    fn run(mut self) -> anyhow::Result<Seen> {
        let mut arrived = None;
        let mut beats = Beats::default();
        let mut deadline = None;
        for look in 0_u32.. {
            // The destination first: what was copied is then never ahead of what is read next.
            let there = arrived.as_ref().map(counter).transpose()?.unwrap_or(0);
            let here = counter(&self.memory)?;
            beats.see(Instant::now(), here, there);
            if look % LOOKS_PER_SAMPLE == 0 {
                self.source.sample();
                if arrived.is_none() {
                    arrived = memory_of(self.destination.pid).unwrap_or_default();
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

fn counter(memory: &File) -> anyhow::Result<u64> {
    let mut word = [0; 8];
    let offset = heartbeat::GPA + heartbeat::COUNTER_OFFSET as u64;
    memory.read_exact_at(&mut word, offset)?;
    Ok(u64::from_le_bytes(word))
}

/// The guest's memory in process `pid`; `None`: there is none yet.
fn memory_of(pid: u32) -> anyhow::Result<Option<File>> {
    let folder = format!("/proc/{pid}/fd");
    for entry in std::fs::read_dir(&folder).with_context(|| folder.clone())? {
        let path = entry?.path();
        let target = std::fs::read_link(&path).unwrap_or_default();
        let target = target.to_string_lossy();
        if MEMORY_FILES.iter().any(|name| target.starts_with(name)) {
            let memory = File::open(&path)?;
            // Made, but not sized yet.
            if memory.metadata()?.len() > heartbeat::GPA + heartbeat::SIZE as u64 {
                return Ok(Some(memory));
            }
        }
    }
    Ok(None)
}

/// What a process uses, since it was first looked at.
struct Cost {
    pid: u32,
    before_ticks: f64,
    vcpu_before_ticks: f64,
    vcpu_ticks: f64,
    before_bytes: f64,
    most_bytes: f64,
}

impl Cost {
    fn of(pid: u32) -> anyhow::Result<Self> {
        let bytes = anonymous_bytes(pid).context("the process has no memory")?;
        let vcpu = vcpu_ticks(pid).context("the process has no threads")?;
        Ok(Self {
            pid,
            before_ticks: ticks(&format!("/proc/{pid}/stat"))?,
            vcpu_before_ticks: vcpu,
            vcpu_ticks: vcpu,
            before_bytes: bytes,
            most_bytes: bytes,
        })
    }

    /// Of a process that is ending nothing can be told; what was seen last stays.
    fn sample(&mut self) {
        if let Some(bytes) = anonymous_bytes(self.pid) {
            self.most_bytes = self.most_bytes.max(bytes);
        }
        if let Some(ticks) = vcpu_ticks(self.pid) {
            self.vcpu_ticks = self.vcpu_ticks.max(ticks);
        }
    }

    fn growth_bytes(&self) -> f64 {
        self.most_bytes - self.before_bytes
    }

    /// Works for a process that has ended and was not waited for, too.
    fn cpu_seconds(&mut self) -> anyhow::Result<f64> {
        self.sample();
        let all = ticks(&format!("/proc/{}/stat", self.pid))? - self.before_ticks;
        let vcpus = self.vcpu_ticks - self.vcpu_before_ticks;
        Ok((all - vcpus).max(0.0) / TICKS_PER_SECOND)
    }
}

/// User and system time of a process or thread.
fn ticks(path: &str) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(path).with_context(|| path.to_owned())?;
    // The name is in parentheses and may have any character; state is the first field behind it.
    let rest = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let mut fields = rest.split(' ').skip(11).map(str::parse::<u64>);
    let (Some(Ok(user)), Some(Ok(system))) = (fields.next(), fields.next()) else {
        bail!("{path} has no times: {text}");
    };
    Ok(number(user + system))
}

fn vcpu_ticks(pid: u32) -> Option<f64> {
    let mut sum = 0.0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let folder = entry.ok()?.path();
        // A thread may end between being listed and being looked at.
        let name = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
        if VCPU_THREADS.iter().any(|prefix| name.starts_with(prefix)) {
            sum += ticks(&folder.join("stat").display().to_string()).unwrap_or(0.0);
        }
    }
    Some(sum)
}

/// Memory that no file holds: not the guest's.
fn anonymous_bytes(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = text
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = field.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(number(kib << 10))
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
