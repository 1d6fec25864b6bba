//! `drover migrate` and `drover migration`.
//!
//! | module | what is in it |
//! |---|---|
//! | `check` | what was found out before, for people |
//! | `outcome` | what came of it, for people and for scripts |
//! | `page` | the file that `--report` names |
//! | `progress` | how far it is, while it runs |

mod check;
mod outcome;
mod page;
mod progress;

use std::cell::Cell;
use std::convert::Infallible;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use vmm::config::{ByteSize, VmName};
use vmm::control::{Client, ClientError};
use vmm::host::link::{LinkUrl, Security, TlsFiles};
use vmm::machine::EventKind;
use vmm::migrate::progress::Phase;
use vmm::migrate::{
    MigrationOutcome, MigrationReport, MigrationRequest, MigrationStatus, MigrationTuning,
};

use crate::args::{MigrateArgs, MigrationArgs, MigrationCommand, MigrationSetArgs, SecurityArgs};
use crate::control::{block_on, find, print_json};
use crate::ending::{Ending, follow};
use crate::report::render;
use crate::values::Usage;

pub(crate) use outcome::print_report;
use outcome::{final_object, without_report};
use page::Page;
use progress::{Bar, CUT, Display, bar_line};

const PATH: &str = "/v1/migration";

/// How often progress is asked for.
const REFRESH: Duration = Duration::from_millis(200);

/// `drover migrate` when nobody can tell where the VM runs.
const EXIT_IN_DOUBT: u8 = 7;

/// The outcome, for scripts, when the VM has ended meanwhile: no report has it.
const ENDED: &str = "ended";

/// `drover migrate` when the VM has moved and the page about it could not be written.
const EXIT_NO_PAGE: u8 = 8;

pub(crate) fn migrate(args: MigrateArgs) -> Result<ExitCode> {
    let (name, json, page) = (args.name.clone(), args.json, args.report.clone());
    let request = request(args)?;
    let client = find(&name)?;
    let page = page.map(|path| Page::open(&path)).transpose()?;
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
        Ending::Silent(why) => return in_doubt(&name, &why, json),
    };
    if json {
        print_json(&final_object(&report)?)?;
    } else {
        print_report(&report);
    }
    if let Some(check) = &report.check {
        return Ok(match check.would_move {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        });
    }
    let is_told = match page {
        Some(page) => tell(page, &report),
        None => true,
    };
    Ok(match report.outcome {
        MigrationOutcome::Migrated if !is_told => ExitCode::from(EXIT_NO_PAGE),
        MigrationOutcome::Migrated => ExitCode::SUCCESS,
        MigrationOutcome::Resumed => ExitCode::FAILURE,
        MigrationOutcome::InDoubt => ExitCode::from(EXIT_IN_DOUBT),
    })
}

/// The VM's process no longer answers.
fn in_doubt(name: &VmName, why: &str, json: bool) -> Result<ExitCode> {
    let error = format!(
        "VM {name} does not say what became of its migration ({why}): it may run at the \
         destination, look there"
    );
    if json {
        let outcome = serde_json::to_value(MigrationOutcome::InDoubt)?;
        print_json(&without_report(name, outcome, &error))?;
    }
    eprintln!("drover: {error}");
    Ok(ExitCode::from(EXIT_IN_DOUBT))
}

/// Writes the page; whether it worked. If not, nobody shall believe that it was the migration that
/// did not.
fn tell(page: Page, report: &MigrationReport) -> bool {
    let text = render(report, &host_name(), SystemTime::now());
    let Err(error) = page.write(&text) else {
        return true;
    };
    eprintln!("drover: {}", untold(report, &error));
    false
}

fn untold(report: &MigrationReport, error: &anyhow::Error) -> String {
    let name = &report.name;
    match report.outcome {
        MigrationOutcome::Migrated => format!("VM {name} HAS moved; only {error:#}"),
        MigrationOutcome::Resumed | MigrationOutcome::InDoubt => format!("{error:#}"),
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.unwrap_or_default().trim().to_owned()
}

fn request(args: MigrateArgs) -> Result<MigrationRequest> {
    let mut security = security(args.security, &args.urls)?;
    security.server_name = args.tls_server_name;
    let urls = args.urls.into_iter().map(absolute);
    Ok(MigrationRequest {
        urls: urls.collect::<Result<_>>()?,
        multipath: args.multipath,
        streams: args.streams.0,
        encoding: args.encoding,
        max_downtime_us: micros(args.max_downtime),
        bandwidth_bytes_per_s: args.bandwidth.bytes_per_s(),
        timeout_ms: u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX),
        on_timeout: args.on_timeout,
        cache_bytes: args.cache.map(ByteSize::bytes),
        security,
        check: args.check,
        detach: args.detach,
    })
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The VM's process may be in another directory.
fn absolute(url: LinkUrl) -> Result<LinkUrl> {
    Ok(match url {
        LinkUrl::Unix(path) => LinkUrl::Unix(std::path::absolute(path)?),
        other => other,
    })
}

/// What protects connections to, or at, `urls`.
pub(crate) fn security(args: SecurityArgs, urls: &[LinkUrl]) -> Result<Security> {
    if args.tls_cert.is_none()
        && let Some(url) = urls.iter().find(|url| url.is_encrypted())
    {
        bail!(Usage(format!(
            "{url} needs --tls-cert FILE, --tls-key FILE and --tls-ca FILE: our certificate, its key \
             and the authority that signs the peer's, all PEM"
        )));
    }
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
    // 0 is what the API takes for none.
    let bandwidth = args.bandwidth.map(|limit| limit.bytes_per_s().unwrap_or(0));
    let max_downtime_us = args.max_downtime.map(micros);
    if bandwidth.is_none() && max_downtime_us.is_none() {
        let nothing = "nothing is to be changed: give --bandwidth or --max-downtime";
        bail!(Usage(nothing.to_owned()));
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
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn asked(flags: &[&str]) -> Result<MigrationRequest> {
        let words = ["drover", "migrate", "web"].iter().chain(flags);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Migrate(args) => request(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_said_is_asked_for_exactly() {
        let defaults = asked(&["unix:/run/a"]).unwrap();
        let url = "unix:/run/a".parse().unwrap();
        assert_eq!(defaults, MigrationRequest::to(vec![url]));
        let flags = ["--timeout", "1500ms", "--max-downtime", "750us"];
        let more = ["--streams", "3", "--encoding", "delta"];
        let rest = ["--bandwidth", "100M", "--on-timeout", "postcopy"];
        let request = asked(&[&["unix:/run/a"], &flags[..], &more, &rest].concat()).unwrap();
        assert_eq!((request.timeout_ms, request.max_downtime_us), (1500, 750));
        assert_eq!(request.streams, Some(3));
        assert_eq!(request.encoding, vmm::migrate::EncodingChoice::Delta);
        assert_eq!(request.bandwidth_bytes_per_s, Some(100 << 20));
        assert_eq!(request.on_timeout, vmm::migrate::OnTimeout::Postcopy);
        let unlimited = asked(&["unix:/run/a", "--bandwidth", "none"]).unwrap();
        assert_eq!(unlimited.bandwidth_bytes_per_s, None);
        assert!(!unlimited.check && asked(&["unix:/run/a", "--check"]).unwrap().check);
    }

    #[test]
    fn tls_without_files_names_the_flags() {
        let error = asked(&["unix:/run/a", "tls://host:4444"]).unwrap_err();
        let text = error.to_string();
        let start = "tls://host:4444 needs --tls-cert FILE, --tls-key FILE and --tls-ca FILE";
        assert!(text.starts_with(start), "{text}");
        assert!(error.is::<Usage>());
        let files = "--tls-cert /a --tls-key /b --tls-ca /c".split(' ');
        let flags: Vec<_> = ["tls://host:4444"].into_iter().chain(files).collect();
        assert!(asked(&flags).unwrap().security.tls.is_some());
    }

    #[test]
    fn a_page_that_is_missing_does_not_hide_that_the_vm_has_moved() {
        let mut report = crate::report::tests::good();
        let error = || Page::open(Path::new("/dev/full"))?.write("page");
        let text = untold(&report, &error().unwrap_err());
        let expected = "VM web-1 HAS moved; only the report /dev/full could not be written: ";
        assert!(text.starts_with(expected), "{text}");
        report.outcome = MigrationOutcome::Resumed;
        let text = untold(&report, &error().unwrap_err());
        assert!(text.starts_with("the report /dev/full"), "{text}");
    }
}
