//! Drover's migration, by its command line as users have it.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use super::guest::Guest;
use super::link::End;
use super::moves::{Move, Scenario};
use super::table::number;
use super::watch::Watch;
use crate::harness::ground::Ground;
use crate::harness::process;
use crate::harness::ram::GuestMemory;

/// Beyond the time that the migration itself may take.
const GRACE: Duration = Duration::from_secs(60);

/// What `drover migrate --json` says, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Report {
    outcome: String,
    error: Option<String>,
    blackout: Option<Part>,
    rounds: Vec<Round>,
    streams: usize,
}

#[derive(Debug, Deserialize)]
struct Part {
    pages: u64,
    wire_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Round {
    pages: Mix,
    wire_bytes: u64,
    duration_us: u64,
    dirty_pages: u64,
    cpu_percent: u8,
}

#[derive(Debug, Deserialize)]
struct Mix {
    zero: u64,
    raw: u64,
    lz4: u64,
    delta: u64,
}

impl Report {
    /// Whether the VM has moved; not: it did not converge.
    fn completed(&self) -> anyhow::Result<bool> {
        match (self.outcome.as_str(), &self.error) {
            ("migrated", _) => return Ok(true),
            ("resumed", Some(error)) if error.contains("did not converge") => {}
            _ => bail!("drover migrate: {self:?}"),
        }
        if let Some(last) = self.rounds.last() {
            eprintln!(
                "bench:   no end after {} rounds; in the last one, of {} ms, {} pages changed, with vCPUs at {} %",
                self.rounds.len(),
                last.duration_us / 1000,
                last.dirty_pages,
                last.cpu_percent
            );
        }
        Ok(false)
    }

    /// Speed of the vCPUs in the round in which they were slowest.
    fn slowest_percent(&self) -> Option<f64> {
        let percents = self.rounds.iter().map(|round| round.cpu_percent);
        percents.min().map(f64::from)
    }

    /// Wire bytes of a page that was sent before; `None`: there was none.
    fn bytes_per_resent_page(&self) -> Option<f64> {
        let again = self.rounds.iter().skip(1);
        let (mut pages, mut bytes) = self
            .blackout
            .as_ref()
            .map_or((0, 0), |part| (part.pages, part.wire_bytes));
        for round in again {
            let mix = &round.pages;
            pages += mix.zero + mix.raw + mix.lz4 + mix.delta;
            bytes += round.wire_bytes;
        }
        (pages > 0).then(|| number(bytes) / number(pages))
    }
}

fn command(ground: &Ground, scenario: &Scenario<'_>, end: End) -> Command {
    let wrapper = scenario.link.wrapper(end);
    let mut command = ground.wrapped(&wrapper);
    command.stdin(std::process::Stdio::null());
    command
}

/// The machine, running.
pub(super) fn source(ground: &Ground, scenario: &Scenario<'_>) -> anyhow::Result<Guest> {
    let mut command = command(ground, scenario, End::Source);
    command
        .args(["run", "--name", "source", "--serial", "stdio"])
        .args(["--memory", &format!("{}M", scenario.memory_mib)])
        .args(["--cmdline", &scenario.cmdline])
        .arg("--kernel")
        .arg(ground.guest());
    Guest::start(command)
}

/// Who waits for it, and where.
pub(super) fn destination(
    ground: &Ground,
    scenario: &Scenario<'_>,
) -> anyhow::Result<(Guest, String)> {
    let mut command = command(ground, scenario, End::Destination);
    let listen = format!("tcp://{}:0", scenario.link.address());
    command
        .args(["receive", "--name", "destination", "--plaintext"])
        .args(["--listen", &listen])
        // For the guest's kernel, which a reset needs.
        .args(["--allow-path", "/"]);
    let mut guest = Guest::start(command)?;
    let url = guest.wait_line(|line| {
        let (_, url) = line.rsplit_once(" at ")?;
        url.starts_with("tcp://").then(|| url.to_owned())
    })?;
    Ok((guest, url))
}

/// Moves the guest and watches it.
pub(super) fn migrate(
    ground: &Ground,
    scenario: &Scenario<'_>,
    encoding: &str,
) -> anyhow::Result<Move> {
    let mut source = source(ground, scenario)?;
    let (mut destination, url) = destination(ground, scenario)?;
    scenario.prepare(&mut source)?;
    let mut command = command(ground, scenario, End::Source);
    command
        .args(["migrate", "source", &url, "--json", "--plaintext"])
        .args(["--encoding", encoding])
        .args(["--timeout", &format!("{}s", scenario.limit.as_secs())]);
    let sent = scenario.link.sent_bytes()?;
    let watch = Watch::start(source.pid(), destination.pid(), Box::new(GuestMemory::of))?;
    let start = Instant::now();
    let finished = process::run(&mut command, scenario.limit + GRACE);
    let total = start.elapsed();
    let seen = watch.finish()?;
    let finished = finished?;
    let report: Report = serde_json::from_str(&finished.stdout).with_context(|| {
        let (source, destination) = (source.said(), destination.said());
        format!(
            "drover migrate: {}; source: {source}; destination: {destination}",
            finished.stderr
        )
    })?;
    let completed = report.completed();
    let completed = completed.with_context(|| format!("destination: {}", destination.said()))?;
    let wire_bytes = number(scenario.link.sent_bytes()? - sent);
    let mut plain_rate = None;
    if completed {
        ensure!(
            seen.blackout.is_some(),
            "the guest does not go on at the destination"
        );
        if let Some(time) = scenario.plain_time {
            plain_rate = Some(scenario.link.plain_rate(report.streams, time)?);
        }
        destination.check_memory()?;
    }
    Ok(Move {
        completed,
        total,
        wire_bytes,
        seen,
        plain_rate,
        bytes_per_resent_page: report.bytes_per_resent_page(),
        slowest_percent: report.slowest_percent(),
    })
}
