//! `drover migrate` and `drover migration`.

use std::cell::Cell;
use std::convert::Infallible;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmm::config::{ByteSize, LinkRate};
use vmm::control::{Client, ClientError};
use vmm::host::link::{LinkUrl, Security, TlsFiles};
use vmm::machine::EventKind;
use vmm::migrate::progress::{Phase, Progress, RoundReport};
use vmm::migrate::{
    MigrationOutcome, MigrationReport, MigrationRequest, MigrationStatus, MigrationTuning,
};

use crate::args::{MigrateArgs, MigrationArgs, MigrationCommand, MigrationSetArgs, SecurityArgs};
use crate::control::{block_on, find, print_json};
use crate::ending::{Ending, follow};
use crate::report::render;
use crate::units::{rate, size, time};

const PATH: &str = "/v1/migration";

/// How often progress is asked for.
const REFRESH: Duration = Duration::from_millis(200);

/// `drover migrate` when nobody can tell where the VM runs.
const EXIT_IN_DOUBT: u8 = 7;

/// The outcome, for scripts, when the VM has ended meanwhile: no report has it.
const ENDED: &str = "ended";

pub(crate) fn migrate(args: MigrateArgs) -> Result<ExitCode> {
    let client = find(&args.name)?;
    let (name, json, page) = (args.name.clone(), args.json, args.report.clone());
    let request = request(args)?;
    let ending = block_on(async { watch(&client, &request, json).await })
        .with_context(|| format!("VM {name}"))?;
    let report = match ending {
        Ending::Told(report) => report,
        Ending::VmEnded(reason) => {
            let error = format!("VM {name} has ended before it has moved: {reason}");
            if json {
                print_json(&without_report(&name, ENDED, &error))?;
            }
            bail!(error);
        }
        Ending::Silent(why) => {
            let error = format!(
                "VM {name} does not say what became of its migration ({why}): it may run at the \
                 destination, look there"
            );
            if json {
                let outcome = serde_json::to_value(MigrationOutcome::InDoubt)?;
                print_json(&without_report(&name, outcome, &error))?;
            }
            eprintln!("drover: {error}");
            return Ok(ExitCode::from(EXIT_IN_DOUBT));
        }
    };
    if let Some(path) = page {
        let text = render(&report, &host_name(), SystemTime::now());
        // The VM has moved, or not: that is told all the same.
        if let Err(error) = std::fs::write(&path, text) {
            eprintln!("drover: {} cannot be written: {error}", path.display());
        }
    }
    if json {
        print_json(&final_object(&report)?)?;
    } else {
        print_report(&report);
    }
    Ok(match report.outcome {
        MigrationOutcome::Migrated => ExitCode::SUCCESS,
        MigrationOutcome::Resumed => ExitCode::FAILURE,
        MigrationOutcome::InDoubt => ExitCode::from(EXIT_IN_DOUBT),
    })
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.unwrap_or_default().trim().to_owned()
}

/// One of the words that a type has in JSON.
fn word<T: DeserializeOwned>(flag: &str, text: &str) -> Result<T> {
    let value = Value::String(text.to_owned());
    serde_json::from_value(value).with_context(|| format!("{flag} {text}"))
}

fn request(args: MigrateArgs) -> Result<MigrationRequest> {
    let streams = match args.streams.as_str() {
        "auto" => None,
        text => Some(text.parse().with_context(|| format!("--streams {text}"))?),
    };
    let micros = |time: humantime::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let mut security = security(args.security)?;
    security.server_name = args.tls_server_name;
    let urls = args.urls.into_iter().map(absolute);
    Ok(MigrationRequest {
        urls: urls.collect::<Result<_>>()?,
        multipath: args.multipath,
        streams,
        encoding: word("--encoding", &args.encoding)?,
        max_downtime_us: micros(args.max_downtime),
        bandwidth_bytes_per_s: args.bandwidth.map(LinkRate::bytes_per_s),
        timeout_s: seconds_up(*args.timeout),
        on_timeout: word("--on-timeout", &args.on_timeout)?,
        cache_bytes: args.cache.map(ByteSize::bytes),
        security,
    })
}

/// Whole seconds, the last one begun: who gives some time does not get none.
fn seconds_up(time: Duration) -> u64 {
    time.as_secs()
        .saturating_add(u64::from(time.subsec_nanos() > 0))
}

/// The VM's process may be in another directory.
fn absolute(url: LinkUrl) -> Result<LinkUrl> {
    Ok(match url {
        LinkUrl::Unix(path) => LinkUrl::Unix(std::path::absolute(path)?),
        other => other,
    })
}

pub(crate) fn security(args: SecurityArgs) -> Result<Security> {
    let tls = match (args.tls_cert, args.tls_key, args.tls_ca) {
        (Some(certificate), Some(key), Some(authority)) => {
            let absolute = |path: &Path| std::path::absolute(path);
            Some(TlsFiles {
                certificate: absolute(&certificate)?,
                key: absolute(&key)?,
                authority: absolute(&authority)?,
            })
        }
        _ => None,
    };
    Ok(Security {
        tls,
        plaintext: args.plaintext,
        server_name: None,
    })
}

/// Starts the migration and watches it to its end.
pub(crate) async fn watch(
    client: &Client,
    request: &MigrationRequest,
    quiet: bool,
) -> Result<Ending<MigrationReport>> {
    let mut display = Display::new(quiet);
    let last_word = |event| {
        match &event {
            EventKind::MigrationRound { round } => display.round(round),
            EventKind::PagesCut => display.say(CUT),
            EventKind::PagesLinked => display.say("connected again: the VM goes on"),
            _ => {}
        }
        match event {
            EventKind::MigrationEnded { report } => Some(*report),
            _ => None,
        }
    };
    let bar = Bar::new(quiet);
    let phase = Cell::new(Phase::Connecting);
    let ending = tokio::select! {
        ending = follow(client, PATH, request, last_word) => ending?,
        never = refresh(client, &bar, &phase) => match never {},
    };
    bar.clear();
    Ok(match ending {
        // Then it was, or may have been, the destination's.
        Ending::VmEnded(reason) if is_handed_over(phase.get()) => {
            Ending::Silent(format!("while it was handed over, {reason}"))
        }
        other => other,
    })
}

/// Whether the destination may run the VM.
fn is_handed_over(phase: Phase) -> bool {
    match phase {
        Phase::Connecting | Phase::Precopy => false,
        Phase::Switchover | Phase::Postcopy | Phase::Unlinked | Phase::Ended => true,
    }
}

/// Draws progress and notes the phase, until the VM no longer answers.
async fn refresh(client: &Client, bar: &Bar, phase: &Cell<Phase>) -> Infallible {
    loop {
        tokio::time::sleep(REFRESH).await;
        match client.get::<MigrationStatus>(PATH).await {
            Ok(status) if status.active => {
                phase.set(status.progress.phase);
                bar.draw(&status.progress);
            }
            // Not begun yet, or over: the last word comes with the events.
            Ok(_) | Err(ClientError::Refused { .. }) => {}
            Err(_) => std::future::pending().await,
        }
    }
}

/// One line per round, where there is no terminal to draw on.
struct Display {
    lines: bool,
}

impl Display {
    fn new(quiet: bool) -> Self {
        Self {
            lines: !quiet && !std::io::stderr().is_terminal(),
        }
    }

    fn round(&mut self, round: &RoundReport) {
        self.say(&describe_round(round));
    }

    fn say(&self, line: &str) {
        if self.lines {
            eprintln!("{line}");
        }
    }
}

fn describe_round(round: &RoundReport) -> String {
    let mix = round.pages;
    format!(
        "round {}: {} pages (zero {}, raw {}, lz4 {}, delta {}), {} in {}, {}; {} pages changed \
         meanwhile, {}",
        round.number,
        mix.total(),
        mix.zero,
        mix.raw,
        mix.lz4,
        mix.delta,
        size(round.wire_bytes),
        time(round.duration_us),
        rate(round.link_bytes_per_s()),
        round.dirty_pages,
        rate(round.dirty_bytes_per_s()),
    )
}

/// A line on the terminal that is drawn anew.
struct Bar {
    shown: bool,
}

impl Bar {
    fn new(quiet: bool) -> Self {
        Self {
            shown: !quiet && std::io::stderr().is_terminal(),
        }
    }

    fn draw(&self, progress: &Progress) {
        if self.shown {
            let mut err = std::io::stderr();
            let _ = write!(err, "\r\x1b[K{}", bar_line(progress));
            let _ = err.flush();
        }
    }

    fn clear(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}

/// Of a post-copy without a connection.
const CUT: &str = "the connection is cut: the VM stands still until it can be made again";

fn bar_line(progress: &Progress) -> String {
    const WIDTH: u64 = 24;
    let phase = match progress.phase {
        Phase::Connecting => return "connecting".to_owned(),
        Phase::Precopy => format!("round {}", progress.round),
        Phase::Switchover => "switchover".to_owned(),
        Phase::Postcopy => "post-copy".to_owned(),
        Phase::Unlinked => return CUT.to_owned(),
        Phase::Ended => "done".to_owned(),
    };
    let all = (progress.memory_bytes / 4096).max(1);
    let left = progress.remaining_pages.min(all);
    let full = usize::try_from((all - left) * WIDTH / all).unwrap_or(0);
    let bar = format!("{:<24}", "#".repeat(full));
    let mix = progress.pages;
    let percent = |part: u64| part * 100 / mix.total().max(1);
    let blackout = match progress.predicted_blackout_us {
        Some(micros) => format!(", blackout about {}", time(micros)),
        None => String::new(),
    };
    let throttle = match progress.cpu_percent {
        100 | 0 => String::new(),
        percent => format!(", guest at {percent} %"),
    };
    format!(
        "{phase} [{bar}] {} sent, {} left, {}; guest writes {}; zero {} raw {} lz4 {} delta {} %{blackout}{throttle}",
        size(progress.wire_bytes),
        size(left * 4096),
        rate(progress.link_bytes_per_s),
        rate(progress.dirty_bytes_per_s),
        percent(mix.zero),
        percent(mix.raw),
        percent(mix.lz4),
        percent(mix.delta),
    )
}

/// The report with what scripts ask for first, and what follows from its numbers.
fn final_object(report: &MigrationReport) -> Result<Value> {
    let mut value = serde_json::to_value(report)?;
    let fields = value.as_object_mut().context("a report is an object")?;
    let millis = |micros: u64| micros as f64 / 1000.0;
    let blackout = report.blackout.map(|blackout| millis(blackout.total_us));
    fields.insert("blackout_ms".to_owned(), serde_json::to_value(blackout)?);
    let predicted = report.predicted_blackout_us.map(millis);
    fields.insert(
        "predicted_blackout_ms".to_owned(),
        serde_json::to_value(predicted)?,
    );
    let rounds = fields.get_mut("rounds").and_then(Value::as_array_mut);
    let rounds = rounds.context("a report has rounds")?;
    for (fields, round) in rounds.iter_mut().zip(&report.rounds) {
        let fields = fields.as_object_mut().context("a round is an object")?;
        let rates = [
            ("link_bytes_per_s", round.link_bytes_per_s()),
            ("dirty_bytes_per_s", round.dirty_bytes_per_s()),
        ];
        for (name, rate) in rates {
            fields.insert(name.to_owned(), rate.into());
        }
    }
    Ok(value)
}

/// What scripts get when the VM has left no report: no other field is known.
fn without_report(name: &str, outcome: impl Into<Value>, error: &str) -> Value {
    serde_json::json!({ "name": name, "outcome": outcome.into(), "error": error })
}

pub(crate) fn print_report(report: &MigrationReport) {
    let name = &report.name;
    let total = format!("{} ms", report.total_ms);
    match (report.outcome, &report.error) {
        (MigrationOutcome::Migrated, _) => {
            let to = report.to.as_deref().unwrap_or("its destination");
            println!("{name} has moved to {to} in {total}");
        }
        (MigrationOutcome::Resumed, error) => {
            let why = error.as_deref().unwrap_or("for no reason given");
            println!("{name} has not moved and goes on here (after {total}): {why}");
        }
        (MigrationOutcome::InDoubt, error) => {
            println!(
                "{name} is paused here, in doubt: {}",
                error.as_deref().unwrap_or("")
            );
        }
    }
    if let Some(blackout) = report.blackout {
        println!(
            "blackout {}: stopping {}, last dirty log {}, last {} pages {}, restoring {}, handing over {}",
            time(blackout.total_us),
            time(blackout.pause_us),
            time(blackout.harvest_us),
            blackout.pages,
            time(blackout.pages_us),
            time(blackout.prepare_us),
            time(blackout.commit_us),
        );
    }
    if let Some(later) = report.postcopy {
        println!(
            "post-copy {}: {} pages came after the start; the guest waited for {}, {} on average, {} at most",
            time(later.total_us),
            later.pages,
            later.faults,
            time(later.mean_fault_us),
            time(later.longest_fault_us),
        );
        if later.reconnections > 0 {
            let times = later.reconnections;
            println!("the connection was cut meanwhile, and made again: {times} times");
        }
    }
    let mix = report.pages;
    println!(
        "{} sent in {} rounds over {} connections: {} zero pages, {} raw, {} lz4, {} delta",
        size(report.wire_bytes),
        report.rounds.len(),
        report.streams,
        mix.zero,
        mix.raw,
        mix.lz4,
        mix.delta,
    );
}

pub(crate) fn migration(args: MigrationArgs) -> Result<ExitCode> {
    match args.command {
        MigrationCommand::Status(args) => {
            let client = find(&args.name)?;
            let status: MigrationStatus = block_on(async { Ok(client.get(PATH).await?) })
                .with_context(|| format!("VM {}", args.name))?;
            if args.json {
                return print_json(&status);
            }
            match &status.report {
                Some(report) => print_report(report),
                None => println!("{}", bar_line(&status.progress)),
            }
        }
        MigrationCommand::Cancel(args) => {
            let client = find(&args.name)?;
            block_on(async { Ok(client.delete(PATH).await?) })
                .with_context(|| format!("VM {}", args.name))?;
            if args.json {
                return print_json(&serde_json::json!({ "name": args.name, "cancelled": true }));
            }
        }
        MigrationCommand::Set(args) => set(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn set(args: &MigrationSetArgs) -> Result<()> {
    let bandwidth = match args.bandwidth.as_deref() {
        Some("none") => Some(0),
        Some(text) => Some(text.parse::<LinkRate>()?.bytes_per_s()),
        None => None,
    };
    let max_downtime_us = args
        .max_downtime
        .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    if bandwidth.is_none() && max_downtime_us.is_none() {
        bail!("nothing is to be changed: give --bandwidth or --max-downtime");
    }
    let tuning = MigrationTuning {
        bandwidth_bytes_per_s: bandwidth,
        max_downtime_us,
    };
    let client = find(&args.name)?;
    block_on(async { Ok(client.put(PATH, &tuning).await?) })
        .with_context(|| format!("VM {}", args.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_for_scripts_has_times_in_milliseconds_and_rates_of_each_round() {
        let round = |number| RoundReport {
            number,
            wire_bytes: 3 << 20,
            duration_us: 500_000,
            dirty_pages: 1024,
            ..RoundReport::default()
        };
        let mut report = crate::report::tests::good();
        report.rounds = vec![round(1), round(2)];
        let object = final_object(&report).unwrap();
        assert_eq!(object["outcome"], "migrated");
        assert_eq!(object["blackout_ms"], 23.4);
        assert_eq!(object["predicted_blackout_ms"], 21.0);
        for (index, number) in [1, 2].into_iter().enumerate() {
            let round = &object["rounds"][index];
            assert_eq!(round["number"], number);
            assert_eq!(round["link_bytes_per_s"], 6 << 20);
            assert_eq!(round["dirty_bytes_per_s"], 8 << 20);
        }
        report.blackout = None;
        report.rounds.clear();
        let object = final_object(&report).unwrap();
        assert!(object["blackout_ms"].is_null() && object.get("blackout_ms").is_some());
        assert_eq!(object["rounds"], serde_json::json!([]));
    }

    #[test]
    fn seconds_are_rounded_up_and_none_stays_none() {
        let cases = [(0, 0), (1, 1), (900, 1), (1000, 1), (1001, 2)];
        for (millis, seconds) in cases {
            assert_eq!(seconds_up(Duration::from_millis(millis)), seconds);
        }
        assert_eq!(seconds_up(Duration::MAX), u64::MAX);
    }

    #[test]
    fn the_bar_fills_up_and_tells_of_throttling() {
        let mut progress = Progress {
            phase: Phase::Precopy,
            round: 2,
            memory_bytes: 4096 * 100,
            remaining_pages: 50,
            cpu_percent: 75,
            predicted_blackout_us: Some(12_345),
            ..Progress::default()
        };
        let line = bar_line(&progress);
        assert!(
            line.contains("round 2 [############            ]"),
            "{line}"
        );
        assert!(
            line.ends_with("blackout about 12.3 ms, guest at 75 %"),
            "{line}"
        );
        progress.remaining_pages = 5000;
        assert!(bar_line(&progress).contains("[                        ]"));
    }
}
