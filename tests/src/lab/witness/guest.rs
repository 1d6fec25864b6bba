//! `lab_agent witness`: what is typed in the guest, and started in L1.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};

use super::blocks::{self, WRITERS};
use super::clocks::Watch;
use super::stream;
use crate::harness::process::wait_until;
use crate::lab::tsc;

const FOLDER: &str = "/tmp/witness";
/// Between two looks at whether it is to stop, each with a new `progress`.
const LOOK: Duration = Duration::from_millis(100);
/// For something that the background does at once.
const SOON: Duration = Duration::from_secs(40);
/// Watchers of the clocks.
const WATCHERS: usize = 2;

/// What a guest's kernel says when it was not well.
const COMPLAINTS: [&str; 12] = [
    "soft lockup",
    "hard LOCKUP",
    "rcu: INFO",
    "stalls on CPU",
    "blocked for more than",
    "marking unstable",
    "timekeeping watchdog",
    "I/O error",
    "WARNING: CPU",
    "BUG:",
    "Oops",
    "NETDEV WATCHDOG",
];

/// `lab_agent witness ...`.
///
/// # Errors
/// When the arguments are wrong. What a guest is asked for is an error in its report as well.
pub fn main(args: &[&str]) -> anyhow::Result<ExitCode> {
    let (task, report) = match args {
        ["background", disk, peer] => return background(disk, peer).map(|()| ExitCode::SUCCESS),
        ["answer", port, file] => return peer(port, Path::new(file)).map(|()| ExitCode::SUCCESS),
        ["watch", disk, peer] => ("watch", watch(disk, peer)),
        ["progress"] => ("progress", progress()),
        ["hold"] => ("hold", hold()),
        ["go"] => ("go", go()),
        ["verdict"] => ("verdict", verdict()),
        ["dmesg"] => ("dmesg", dmesg()),
        _ => bail!(
            "usage: lab_agent witness watch DISK PEER | progress | hold | go | verdict | dmesg | answer PORT FILE"
        ),
    };
    // As `say` of the guest's tasks does it.
    match report {
        Ok(report) => println!("\nL2 task={task} {report} result=ok"),
        Err(error) => {
            let reason = format!("{error:#}").replace([' ', '\n'], "_");
            println!("\nL2 task={task} reason={reason} result=fail");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts the background and waits until it is at work.
fn watch(disk: &str, peer: &str) -> anyhow::Result<String> {
    fs::create_dir(FOLDER).context("is it watched already?")?;
    let log = fs::File::create(file("log"))?;
    Command::new(std::env::current_exe()?)
        .args(["witness", "background", disk, peer])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    progress()
}

fn file(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// How far it all is, at some moment after this was asked.
fn progress() -> anyhow::Result<String> {
    // The one that is there may be from before a move.
    let _ = fs::remove_file(file("progress"));
    read_when_there("progress")
}

/// Leaves the disk alone, with everything written, until `go`; what was written then.
fn hold() -> anyhow::Result<String> {
    fs::write(file("hold"), "")?;
    read_when_there("held")
}

fn go() -> anyhow::Result<String> {
    fs::remove_file(file("hold")).context("is it held?")?;
    let let_go = wait_until(Instant::now() + SOON, || {
        (!file("held").exists()).then_some(())
    });
    let_go.context("the witness still holds its writers")?;
    progress()
}

fn verdict() -> anyhow::Result<String> {
    fs::write(file("stop"), "")?;
    let report = read_when_there("report")?;
    let (_, reason) = report.split_once("failed: ").unwrap_or_default();
    ensure!(reason.is_empty(), "{reason}");
    Ok(report)
}

fn read_when_there(name: &str) -> anyhow::Result<String> {
    let path = file(name);
    let text = wait_until(Instant::now() + SOON, || fs::read_to_string(&path).ok());
    text.with_context(|| {
        let said = ["log", "report"].map(|name| fs::read_to_string(file(name)).unwrap_or_default());
        format!("the witness writes no {name}; it said: {}", said.concat())
    })
}

/// The kernel's complaints.
fn dmesg() -> anyhow::Result<String> {
    let log = Command::new("dmesg").output().context("cannot run dmesg")?;
    ensure!(log.status.success(), "dmesg ended with {}", log.status);
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    let complaint = |line: &&str| COMPLAINTS.iter().any(|text| line.contains(text));
    let complaints: Vec<_> = log.lines().filter(complaint).collect();
    ensure!(complaints.is_empty(), "{}", complaints.join(" | "));
    ensure!(
        log.contains("Linux version"),
        "dmesg does not reach back to the start"
    );
    Ok(format!("lines={}", log.lines().count()))
}

/// What the threads count.
#[derive(Default)]
struct Counts {
    written: [AtomicU64; WRITERS],
    returned: AtomicU64,
    ticks: [AtomicU64; WATCHERS],
}

impl Counts {
    fn written(&self) -> [u64; WRITERS] {
        [0, 1].map(|writer: usize| self.written[writer].load(Ordering::SeqCst))
    }

    fn line(&self) -> String {
        let [first, second] = self.written();
        let [ticks, more] = [0, 1].map(|watcher: usize| self.ticks[watcher].load(Ordering::SeqCst));
        let numbers = self.returned.load(Ordering::SeqCst);
        format!("written0={first} written1={second} numbers={numbers} ticks0={ticks} ticks1={more}")
    }
}

/// Works until it is told to stop.
fn background(disk: &str, peer: &str) -> anyhow::Result<()> {
    let counts = Counts::default();
    let (clocks, stop) = (Watch::new(tsc::khz()), AtomicBool::new(false));
    let (counts, clocks, stop) = (&counts, &clocks, &stop);
    let gate = &RwLock::new(());
    let disk = Path::new(disk);
    let mut errors = Vec::new();
    std::thread::scope(|scope| {
        for ticks in &counts.ticks {
            scope.spawn(move || clocks.run(ticks, stop));
        }
        let mut work = Vec::new();
        for (written, writer) in counts.written.iter().zip(0..) {
            work.push(scope.spawn(move || blocks::write(disk, writer, written, (gate, stop))));
        }
        if peer != "none" {
            work.push(scope.spawn(move || stream::call(peer, &counts.returned, stop)));
        }
        attend(counts, gate, || {
            work.iter().any(|thread| thread.is_finished())
        })?;
        stop.store(true, Ordering::SeqCst);
        let ended = work
            .into_iter()
            .map(|thread| thread.join().expect("it does not panic"));
        errors.extend(ended.filter_map(Result::err));
        anyhow::Ok(())
    })?;
    if let Err(error) = blocks::verify(disk, &counts.written(), true) {
        errors.push(error);
    }
    let steps = clocks.steps();
    let [monotonic, realtime, tsc] = steps.backward;
    let mut report = format!(
        "{} realtime_ms={} step_ms={} realtime_step_ms={} apart_ms={} back={monotonic} realtime_back={realtime} tsc_back={tsc}",
        counts.line(),
        UNIX_EPOCH.elapsed().map_or(0, |time| time.as_millis()),
        steps.monotonic.as_millis(),
        steps.realtime.as_millis(),
        steps.apart.as_millis(),
    );
    for error in &errors {
        report.push_str(&format!(" failed: {error:#};"));
    }
    put("report", &report)
}

/// Does what is asked for in files, until that is to stop, or `is_over`.
fn attend(counts: &Counts, gate: &RwLock<()>, is_over: impl Fn() -> bool) -> anyhow::Result<()> {
    let mut held = None;
    while !file("stop").exists() && !is_over() {
        put("progress", &counts.line())?;
        match (file("hold").exists(), &held) {
            (true, None) => {
                held = Some(gate.write().unwrap_or_else(PoisonError::into_inner));
                put("held", &counts.line())?;
            }
            (false, Some(_)) => {
                held = None;
                fs::remove_file(file("held"))?;
            }
            (true, Some(_)) | (false, None) => {}
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Writes a file at once or not at all.
fn put(name: &str, text: &str) -> anyhow::Result<()> {
    let new = file("new");
    fs::write(&new, text)?;
    Ok(fs::rename(new, file(name))?)
}

/// The peer: what it saw goes to `file`.
fn peer(port: &str, file: &Path) -> anyhow::Result<()> {
    let listener = TcpListener::bind(format!("0.0.0.0:{port}"))?;
    let text = match stream::answer(&listener) {
        Ok(seen) => {
            let silence = seen.longest_silence.as_millis();
            format!("numbers={} silence_ms={silence}", seen.numbers)
        }
        Err(error) => format!("failed: {error:#}"),
    };
    Ok(fs::write(file, text)?)
}
