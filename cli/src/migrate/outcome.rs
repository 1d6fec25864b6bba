//! What came of a migration, for people and for scripts.

use anyhow::{Context, Result};
use serde_json::Value;
use vmm::config::VmName;
use vmm::migrate::progress::Postcopy;
use vmm::migrate::{MigrationOutcome, MigrationReport};

use crate::units::{count, several, size, time};

/// The report with what scripts ask for first, and what follows from its numbers.
pub(super) fn final_object(report: &MigrationReport) -> Result<Value> {
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
pub(super) fn without_report(name: &VmName, outcome: impl Into<Value>, error: &str) -> Value {
    serde_json::json!({ "name": name, "outcome": outcome.into(), "error": error })
}

pub(crate) fn print_report(report: &MigrationReport) {
    let lines = match &report.check {
        Some(check) => super::check::lines(report, check),
        None => lines(report),
    };
    for line in lines {
        println!("{line}");
    }
}

/// The report for people.
fn lines(report: &MigrationReport) -> Vec<String> {
    let mut lines = vec![verdict(report)];
    lines.extend(detached(report));
    if let Some(blackout) = report.blackout {
        let last = match blackout.device_bytes {
            0 => several(blackout.pages, "page"),
            bytes => format!(
                "{} and {} of devices",
                several(blackout.pages, "page"),
                size(bytes)
            ),
        };
        lines.push(format!(
            "blackout {}: stopping {}, last dirty log {}, last {} {}, restoring {}, handing over {}",
            time(blackout.total_us),
            time(blackout.pause_us.saturating_add(blackout.devices_us)),
            time(blackout.harvest_us),
            last,
            time(blackout.pages_us),
            time(blackout.prepare_us),
            time(blackout.commit_us),
        ));
    }
    if let Some(later) = &report.postcopy {
        lines.push(postcopy(later));
        if later.reconnections > 0 {
            let times = several(later.reconnections.into(), "time");
            lines.push(format!(
                "the connection was cut meanwhile, and made again: {times}"
            ));
        }
    }
    if report.wire_bytes > 0 {
        let mix = report.pages;
        let rounds = match report.rounds.len() as u64 {
            // The first was not finished.
            0 => String::new(),
            rounds => format!(" in {}", several(rounds, "round")),
        };
        lines.push(format!(
            "{} sent{rounds} over {}: {}, {} raw, {} lz4, {} delta",
            size(report.wire_bytes),
            several(report.streams.into(), "connection"),
            several(mix.zero, "zero page"),
            count(mix.raw),
            count(mix.lz4),
            count(mix.delta),
        ));
    }
    lines
}

fn verdict(report: &MigrationReport) -> String {
    let name = &report.name;
    let total = format!("{} ms", report.total_ms);
    let error = report.error.as_deref();
    match report.outcome {
        MigrationOutcome::Migrated => {
            let to = report.to.as_deref().unwrap_or("its destination");
            format!("{name} has moved to {to} in {total}")
        }
        MigrationOutcome::Resumed => {
            let why = error.unwrap_or("for no reason given");
            format!("{name} has not moved and goes on here (after {total}): {why}")
        }
        MigrationOutcome::InDoubt => {
            format!("{name} is paused here, in doubt: {}", error.unwrap_or(""))
        }
    }
}

/// What has become of devices that were taken out.
fn detached(report: &MigrationReport) -> Option<String> {
    let ids = report.detached.join(", ");
    let rest = match report.outcome {
        _ if ids.is_empty() => return None,
        MigrationOutcome::Migrated => {
            "the destination plugs in what its --device and --gpu say for that".to_owned()
        }
        MigrationOutcome::Resumed if report.put_back.is_empty() => "none is back".to_owned(),
        MigrationOutcome::Resumed => format!("back are {}", report.put_back.join(", ")),
        MigrationOutcome::InDoubt => "none was put back".to_owned(),
    };
    Some(format!("taken out of the guest for that: {ids}; {rest}"))
}

fn postcopy(later: &Postcopy) -> String {
    if later.pages == 0 {
        return "post-copy was not needed: no page was left for it".to_owned();
    }
    let waited = match later.faults {
        0 => "the guest waited for none".to_owned(),
        faults => format!(
            "the guest waited for {}, {} on average, {} at most",
            count(faults),
            time(later.mean_fault_us),
            time(later.longest_fault_us)
        ),
    };
    format!(
        "post-copy {}: {} came after the start; {waited}",
        time(later.total_us),
        several(later.pages, "page")
    )
}

#[cfg(test)]
mod tests {
    use vmm::migrate::progress::{PageMix, RoundReport};

    use super::*;

    /// It never connected.
    fn failed() -> MigrationReport {
        MigrationReport {
            to: None,
            outcome: MigrationOutcome::Resumed,
            error: Some("nobody listens".to_owned()),
            blackout: None,
            rounds: Vec::new(),
            pages: PageMix::default(),
            wire_bytes: 0,
            streams: 0,
            ..crate::report::tests::good()
        }
    }

    #[test]
    fn where_nothing_was_sent_nothing_is_said_of_it() {
        let why = "web-1 has not moved and goes on here (after 2140 ms): nobody listens";
        assert_eq!(lines(&failed()), [why]);
    }

    #[test]
    fn one_is_not_told_in_the_plural() {
        let report = MigrationReport {
            rounds: vec![RoundReport::default()],
            wire_bytes: 2048,
            streams: 1,
            pages: PageMix {
                zero: 1,
                raw: 2,
                ..PageMix::default()
            },
            ..crate::report::tests::good()
        };
        let last = lines(&report).pop().unwrap();
        assert_eq!(
            last,
            "2 KiB sent in 1 round over 1 connection: 1 zero page, 2 raw, 0 lz4, 0 delta"
        );
        let unfinished = MigrationReport {
            rounds: Vec::new(),
            ..report
        };
        let last = lines(&unfinished).pop().unwrap();
        assert!(last.starts_with("2 KiB sent over 1 connection: "), "{last}");
        let more = lines(&crate::report::tests::good()).pop().unwrap();
        assert!(more.contains(" in 7 rounds over 4 connections: "), "{more}");
    }

    #[test]
    fn a_post_copy_without_pages_is_told_as_such() {
        let mut report = crate::report::tests::good();
        let told = |report: &MigrationReport| lines(report).join("\n");
        assert!(!told(&report).contains("post-copy"));
        report.postcopy = Some(Postcopy::default());
        let text = told(&report);
        assert!(
            text.contains("\npost-copy was not needed: no page was left for it\n"),
            "{text}"
        );
        assert_eq!(final_object(&report).unwrap()["postcopy"]["pages"], 0);
        report.postcopy = Some(Postcopy {
            pages: 7,
            total_us: 2000,
            reconnections: 1,
            ..Postcopy::default()
        });
        let text = told(&report);
        for line in [
            "post-copy 2 ms: 7 pages came after the start; the guest waited for none\n",
            "the connection was cut meanwhile, and made again: 1 time\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

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
}
