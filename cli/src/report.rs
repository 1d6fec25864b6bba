//! A migration as a page that one can look at and send to others: one HTML file without scripts
//! and without anything from elsewhere.
//!
//! | module | what is in it |
//! |---|---|
//! | `blackout` | the time that the VM stood still, in its parts |
//! | `chart` | SVG charts |
//! | `rounds` | the rounds in charts and as a table |
//! | `units` | amounts as people write them |

mod blackout;
mod chart;
mod rounds;
mod units;

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use vmm::migrate::progress::{Blackout, PageMix, RoundReport};
use vmm::migrate::{MigrationOutcome, MigrationReport};

use units::{count, escape, percent, rate, size, time};

/// What is known of a migration that is over.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Page {
    /// The VM.
    pub(crate) name: String,
    /// The host that it left, and the one that it went to.
    pub(crate) from: String,
    pub(crate) to: String,
    /// How it ended, in a word.
    pub(crate) outcome: String,
    /// Why it did not succeed.
    pub(crate) error: Option<String>,
    pub(crate) total_ms: u64,
    /// `None`: the VM never stood still.
    pub(crate) blackout: Option<Blackout>,
    /// What was expected when the VM was stopped.
    pub(crate) predicted_blackout_us: Option<u64>,
    pub(crate) rounds: Vec<RoundReport>,
    /// Of all rounds.
    pub(crate) pages: PageMix,
    pub(crate) wire_bytes: u64,
    /// The guest's memory.
    pub(crate) memory_bytes: u64,
    /// Connections that carried pages.
    pub(crate) streams: u16,
    /// What held it up: `link`, `source-cpu`, `destination`, `dirty-rate`; anything else is shown
    /// as it is.
    pub(crate) bottleneck: String,
}

impl Page {
    /// The page of `report`.
    pub(crate) fn of(report: &MigrationReport) -> Self {
        let word = |value: serde_json::Result<serde_json::Value>| {
            let value = value.unwrap_or_default();
            value.as_str().unwrap_or_default().to_owned()
        };
        let outcome = match report.outcome {
            MigrationOutcome::Migrated => "migrated",
            MigrationOutcome::Resumed => "failed, the VM goes on where it was",
            MigrationOutcome::InDoubt => "in doubt",
        };
        Self {
            name: report.name.clone(),
            from: host_name(),
            to: report.to.clone().unwrap_or_default(),
            outcome: outcome.to_owned(),
            error: report.error.clone(),
            total_ms: report.total_ms,
            blackout: report.blackout,
            predicted_blackout_us: report.predicted_blackout_us,
            rounds: report.rounds.clone(),
            pages: report.pages,
            wire_bytes: report.wire_bytes,
            memory_bytes: report.memory_bytes,
            streams: report.streams,
            bottleneck: word(serde_json::to_value(report.bottleneck)),
        }
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.unwrap_or_default().trim().to_owned()
}

const STYLE: &str = include_str!("report/style.css");

/// The page. `written` is the time that it shows.
pub(crate) fn render(report: &Page, written: SystemTime) -> String {
    let parts = [
        head(report, written),
        error(report),
        figures(report),
        advice(report),
        "<div class=\"charts\">\n".to_owned(),
        rounds::charts(report),
        blackout::chart(report),
        "</div>\n".to_owned(),
        blackout::table(report),
        rounds::table(report),
        foot(),
    ];
    parts.concat()
}

/// A name in text of any direction.
fn name(text: &str) -> String {
    match text.trim() {
        "" => "unknown".to_owned(),
        text => format!("<bdi>{}</bdi>", escape(text)),
    }
}

fn head(report: &Page, written: SystemTime) -> String {
    let date = humantime::format_rfc3339_seconds(written).to_string();
    // As in RFC 3339, but for people.
    let date = date.replace('T', " ").replace('Z', " UTC");
    let title = escape(&report.name);
    let [vm, from, to] = [&report.name, &report.from, &report.to].map(|text| name(text));
    let outcome = match report.outcome.trim() {
        "" => "outcome unknown".to_owned(),
        outcome => escape(outcome),
    };
    format!(
        r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>Migration of {title}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>Migration of {vm}</h1>
<p>{from} → {to}</p>
<p><span class="outcome">{outcome}</span> {date}</p>
</header>
<main>
"#
    )
}

fn error(report: &Page) -> String {
    let Some(error) = &report.error else {
        return String::new();
    };
    let error = escape(error);
    format!("<p class=\"error\" role=\"alert\"><strong>It did not succeed:</strong> {error}</p>\n")
}

fn figures(report: &Page) -> String {
    let unknown = || "–".to_owned();
    let blackout = report.blackout.map(|blackout| time(blackout.total_us));
    let predicted = report.predicted_blackout_us.map(time);
    let micros = report.total_ms.saturating_mul(1000);
    let mut sent = format!(
        "{} of memory",
        percent(report.wire_bytes, report.memory_bytes)
    );
    if micros > 0 {
        sent += &format!(", {}", rate(per_second(report.wire_bytes, micros)));
    }
    let stood = match report.blackout {
        Some(_) => "the VM stood still",
        None => "the VM was never stopped",
    };
    let streams = format!("over {}", several(report.streams.into(), "connection"));
    let figures = [
        (
            "Total time",
            time(micros),
            several(report.rounds.len(), "round"),
        ),
        (
            "Blackout",
            blackout.unwrap_or_else(unknown),
            stood.to_owned(),
        ),
        (
            "Predicted",
            predicted.unwrap_or_else(unknown),
            "for the blackout".to_owned(),
        ),
        ("Sent", size(report.wire_bytes), sent),
        (
            "Memory",
            size(report.memory_bytes),
            "of the guest".to_owned(),
        ),
        ("Pages sent", count(report.pages.total()), streams),
    ];
    let items = figures.map(|(title, value, note)| {
        format!("<div><dt>{title}</dt><dd>{value}<span class=\"note\">{note}</span></dd></div>\n")
    });
    format!("<dl class=\"figures\">\n{}</dl>\n", items.concat())
}

fn several(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

fn per_second(amount: u64, micros: u64) -> u64 {
    let rate = u128::from(amount) * 1_000_000 / u128::from(micros.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// What held it up and what helps, in a sentence or two.
fn advice(report: &Page) -> String {
    let last = report.rounds.last().copied().unwrap_or_default();
    let link = rate(last.link_bytes_per_s());
    let dirty = rate(last.dirty_bytes_per_s());
    let streams = report.streams;
    let text = match report.bottleneck.as_str() {
        // What ended it is said above.
        "" if report.error.is_some() => return String::new(),
        "" => "Nothing held it up that could be measured.".to_owned(),
        "link" => format!(
            "The <strong>link</strong> held it up: it carried {link} in the last round. A faster \
             link helps, or one without other traffic; more connections (this used {streams}) \
             help where a single one does not fill it."
        ),
        "source-cpu" => format!(
            "The <strong>source's CPU</strong> held it up: pages were not read and compressed as \
             fast as the link would have taken them. More connections (this used {streams}) help \
             where cores are idle, else fewer busy neighbours."
        ),
        "destination" => {
            "The <strong>destination</strong> held it up: it stored pages more slowly \
             than they came. Idle cores and free memory there help."
                .to_owned()
        }
        "dirty-rate" => format!(
            "The <strong>guest's own writes</strong> held it up: it changed {dirty} in the last \
             round, and {link} were sent. A quieter hour helps, or a longer permitted downtime, \
             or slowing the guest down."
        ),
        other => escape(other),
    };
    format!("<p class=\"advice\">{text}</p>\n")
}

fn foot() -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!("</main>\n<footer>Written by Drover {version}.</footer>\n</body>\n</html>\n")
}

#[cfg(test)]
mod tests;
