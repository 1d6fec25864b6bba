//! The time that the VM stood still, in its parts.

use vmm::migrate::MigrationReport;
use vmm::migrate::progress::Blackout;

use super::chart::{Series, legend, strip};
use super::rounds::card;
use crate::units::{count, percent, size, time};

/// A part of the blackout and what happens in it.
struct Part {
    series: Series,
    micros: u64,
    what: &'static str,
}

/// Parts that follow each other. What the clocks saw between them is the last.
fn parts(blackout: &Blackout) -> Vec<Part> {
    let part = |name, class, micros, what| Part {
        series: Series { name, class },
        micros,
        what,
    };
    let mut parts = vec![
        part(
            "pause",
            "blue",
            blackout.pause_us.saturating_add(blackout.devices_us),
            "vCPUs and devices stop",
        ),
        part(
            "harvest",
            "yellow",
            blackout.harvest_us,
            "the last dirty log is read",
        ),
        part(
            "pages",
            "green",
            blackout.pages_us,
            "the last pages and the device states are sent",
        ),
        part(
            "prepare",
            "violet",
            blackout.prepare_us,
            "the destination makes the VM ready",
        ),
        part(
            "commit",
            "red",
            blackout.commit_us,
            "disks are let go, the VM is handed over",
        ),
    ];
    let known = parts
        .iter()
        .fold(0_u64, |sum, part| sum.saturating_add(part.micros));
    let rest = blackout.total_us.saturating_sub(known);
    parts.push(part("other", "grey", rest, "in between"));
    parts
}

/// A card with one bar.
pub(super) fn chart(report: &MigrationReport) -> String {
    let Some(blackout) = &report.blackout else {
        return card("Blackout", "<p>The VM was never stopped.</p>\n");
    };
    let parts = parts(blackout);
    let shown: Vec<(Series, u64, String)> = parts
        .iter()
        .map(|part| (part.series, part.micros, time(part.micros)))
        .collect();
    let named: Vec<String> = shown
        .iter()
        .filter(|(_, micros, _)| *micros > 0)
        .map(|(series, _, label)| format!("{} {label}", series.name))
        .collect();
    let total = time(blackout.total_us);
    let description = match named.as_slice() {
        [] => "No part took measurable time.".to_owned(),
        named => format!("{total} in all: {}.", named.join(", ")),
    };
    let drawing = strip("blackout", ("Parts of the blackout", &description), &shown);
    let used = parts.iter().filter(|part| part.micros > 0);
    let legend = legend(used.map(|part| part.series));
    card(
        "Blackout",
        &format!("{legend}{drawing}<p>{description}</p>\n"),
    )
}

/// The same in figures, with what runs beside and within the parts.
pub(super) fn table(report: &MigrationReport) -> String {
    let Some(blackout) = &report.blackout else {
        return String::new();
    };
    let row = |name: &str, micros: u64, what: &str| {
        let share = percent(micros.min(blackout.total_us), blackout.total_us);
        let took = time(micros);
        format!(
            "<tr><th scope=\"row\">{name}</th><td>{took}</td><td>{share}</td><td class=\"words\">{what}</td></tr>\n"
        )
    };
    let mut rows = String::new();
    for part in parts(blackout) {
        rows += &row(part.series.name, part.micros, part.what);
        match part.series.name {
            "pages" => {
                rows += &row(
                    "– save",
                    blackout.save_us,
                    "of that: device states are saved",
                )
            }
            "prepare" => {
                rows += &row(
                    "– restore",
                    blackout.restore_us,
                    "of that: device states are restored",
                );
            }
            _ => {}
        }
    }
    let sent = format!(
        "{} pages, {} were sent",
        count(blackout.pages),
        size(blackout.wire_bytes)
    );
    rows += &row("total", blackout.total_us, &sent);
    let table = format!(
        "<div class=\"wide\">\n<table>\n<thead><tr><th scope=\"col\">Part</th><th scope=\"col\">Time</th>\
         <th scope=\"col\">Share</th><td></td></tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    );
    card("Blackout in figures", &table)
}
