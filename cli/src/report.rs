//! A migration as a page that one can look at and send to others: one HTML file without scripts
//! and without anything from elsewhere.
//!
//! | module | what is in it |
//! |---|---|
//! | `blackout` | the time that the VM stood still, in its parts |
//! | `chart` | SVG charts |
//! | `rounds` | the rounds in charts and as a table |

mod blackout;
mod chart;
mod rounds;

use std::time::SystemTime;

use vmm::migrate::{Bottleneck, MigrationOutcome, MigrationReport};

use crate::units::{count, escape, percent, rate, several, size, time};

const STYLE: &str = include_str!("report/style.css");

/// The page of a migration from host `from`. `written` is the time that it shows.
pub(crate) fn render(report: &MigrationReport, from: &str, written: SystemTime) -> String {
    let parts = [
        head(report, from, written),
        error(report),
        figures(report),
        advice(report),
        "<div class=\"charts\">\n".to_owned(),
        rounds::charts(report),
        blackout::chart(report),
        postcopy(report),
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

fn head(report: &MigrationReport, from: &str, written: SystemTime) -> String {
    let date = humantime::format_rfc3339_seconds(written).to_string();
    // As in RFC 3339, but for people.
    let date = date.replace('T', " ").replace('Z', " UTC");
    let title = escape(&report.name);
    let to = report.to.as_deref().unwrap_or_default();
    let [vm, from, to] = [&report.name, from, to].map(name);
    let outcome = match report.outcome {
        MigrationOutcome::Migrated => "migrated",
        MigrationOutcome::Resumed => "failed, the VM goes on where it was",
        MigrationOutcome::InDoubt => "in doubt",
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

fn error(report: &MigrationReport) -> String {
    let Some(error) = &report.error else {
        return String::new();
    };
    let error = escape(error);
    format!("<p class=\"error\" role=\"alert\"><strong>It did not succeed:</strong> {error}</p>\n")
}

fn figures(report: &MigrationReport) -> String {
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
            several(report.rounds.len() as u64, "round"),
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

fn per_second(amount: u64, micros: u64) -> u64 {
    let rate = u128::from(amount) * 1_000_000 / u128::from(micros.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// What held it up and what helps, in a sentence or two. Without a round nobody can tell.
fn advice(report: &MigrationReport) -> String {
    let (Some(last), Some(bottleneck)) = (report.rounds.last(), report.bottleneck) else {
        return String::new();
    };
    let link = rate(last.link_bytes_per_s());
    let dirty = rate(last.dirty_bytes_per_s());
    let streams = report.streams;
    let text = match bottleneck {
        Bottleneck::Link => format!(
            "The <strong>link</strong> held it up, or the destination behind it: it carried {link} \
             in the last round. A faster link helps, or one without other traffic; more \
             connections (this used {streams}) help where a single one does not fill it."
        ),
        Bottleneck::SourceCpu => format!(
            "The <strong>source's CPU</strong> held it up: pages were not read and compressed as \
             fast as the link would have taken them. More connections (this used {streams}) help \
             where cores are idle, else fewer busy neighbours."
        ),
        Bottleneck::DirtyRate => format!(
            "The <strong>guest's own writes</strong> held it up: it changed {dirty} in the last \
             round, and {link} were sent. A quieter hour helps, or a longer permitted downtime, \
             or slowing the guest down."
        ),
    };
    format!("<p class=\"advice\">{text}</p>\n")
}

/// What came after the VM had started at the destination.
fn postcopy(report: &MigrationReport) -> String {
    let Some(later) = report.postcopy else {
        return String::new();
    };
    if later.pages == 0 {
        let body = "<p>It was not needed: no page was left for it.</p>\n";
        return rounds::card("Post-copy", body);
    }
    let waited = match later.faults {
        0 => "The guest waited for none of them.".to_owned(),
        faults => format!(
            "The guest waited for {} of them: {} on average, {} at most.",
            count(faults),
            time(later.mean_fault_us),
            time(later.longest_fault_us)
        ),
    };
    let cut = match later.reconnections {
        0 => String::new(),
        times => format!(
            " The connection was cut meanwhile, and made again: {}.",
            several(times.into(), "time")
        ),
    };
    let body = format!(
        "<p>{} {} missing when the VM started at the destination, and came within {}. \
         {waited}{cut}</p>\n",
        several(later.pages, "page"),
        if later.pages == 1 { "was" } else { "were" },
        time(later.total_us)
    );
    rounds::card("Post-copy", &body)
}

fn foot() -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!("</main>\n<footer>Written by Drover {version}.</footer>\n</body>\n</html>\n")
}

#[cfg(test)]
pub(crate) mod tests;
