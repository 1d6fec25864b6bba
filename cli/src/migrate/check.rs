//! What was found out about a migration before it, for people.

use vmm::migrate::{MigrationCheck, MigrationReport};

use crate::units::{rate, several, size, time};

/// The report of a check.
pub(super) fn lines(report: &MigrationReport, check: &MigrationCheck) -> Vec<String> {
    let mut lines = vec![verdict(report, check)];
    let groups = [
        ("here: ", &check.blockers),
        ("there: ", &check.refusals),
        ("", &check.objections),
    ];
    for (whose, reasons) in groups {
        let reasons = reasons.iter();
        lines.extend(reasons.map(|reason| format!("- {whose}{reason}")));
    }
    let unknown = check.unknown.iter();
    lines.extend(unknown.map(|why| format!("- not all could be found out: {why}")));
    lines.extend(prediction(check).filter(|_| !check.would_move));
    lines.extend(figures(check));
    lines
}

fn verdict(report: &MigrationReport, check: &MigrationCheck) -> String {
    let name = &report.name;
    let to = report.to.as_deref().unwrap_or("its destination");
    if !check.would_move {
        return format!("{name} would not move to {to} as it was asked for, and goes on here:");
    }
    let how = prediction(check).unwrap_or_default();
    format!("{name} would move to {to}: {how}; nothing has moved")
}

fn prediction(check: &MigrationCheck) -> Option<String> {
    let (total, blackout) = (check.predicted_total_ms?, check.predicted_blackout_us?);
    let total = time(total.saturating_mul(1000));
    let blackout = time(blackout);
    Some(match check.converges {
        Some(false) => format!(
            "after {total} it would not be done; stopped then, the VM would stand still for about {blackout}"
        ),
        _ => format!("in about {total}, standing still for about {blackout}"),
    })
}

fn figures(check: &MigrationCheck) -> Option<String> {
    let mut parts = vec![format!("{} of memory in use", size(check.used_bytes?))];
    parts.push(match check.link_bytes_per_s {
        Some(found) => format!("{} over the connections", rate(found)),
        None => "too little of it to tell how fast the connections are".to_owned(),
    });
    let dirty = check.dirty_bytes_per_s.unwrap_or_default();
    parts.push(format!("the guest writes {}", rate(dirty)));
    if let Some(bytes @ 1..) = check.device_bytes {
        parts.push(format!("{} of devices' states", size(bytes)));
    }
    let round_trip = check.round_trip_us.map(time);
    parts.extend(round_trip.map(|time| format!("an answer takes {time}")));
    let rounds = check.rounds.map(|rounds| several(rounds.into(), "round"));
    parts.extend(rounds.map(|rounds| format!("about {rounds} of copying")));
    if let Some(percent @ 0..100) = check.cpu_percent {
        parts.push(format!("vCPUs that write slowed down to {percent} %"));
    }
    Some(parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> MigrationCheck {
        MigrationCheck {
            would_move: true,
            converges: Some(true),
            predicted_total_ms: Some(3200),
            predicted_blackout_us: Some(4100),
            rounds: Some(4),
            cpu_percent: Some(100),
            used_bytes: Some(2 << 30),
            link_bytes_per_s: Some(1 << 30),
            dirty_bytes_per_s: Some(3 << 20),
            device_bytes: Some(0),
            round_trip_us: Some(200),
            ..MigrationCheck::default()
        }
    }

    fn told(check: &MigrationCheck) -> Vec<String> {
        lines(&crate::report::tests::good(), check)
    }

    #[test]
    fn what_would_move_is_told_with_its_figures() {
        assert_eq!(
            told(&known()),
            [
                "web-1 would move to tls:beta.example:7000: in about 3.2 s, standing still for \
                 about 4.1 ms; nothing has moved",
                "2 GiB of memory in use, 1 GiB/s over the connections, the guest writes 3 MiB/s, \
                 an answer takes 200 µs, about 4 rounds of copying",
            ]
        );
    }

    #[test]
    fn every_reason_is_told_with_its_side() {
        let check = MigrationCheck {
            blockers: vec!["device0: no state".to_owned()],
            refusals: vec!["no disk0".to_owned(), "no avx512".to_owned()],
            ..MigrationCheck::default()
        };
        assert_eq!(
            told(&check),
            [
                "web-1 would not move to tls:beta.example:7000 as it was asked for, and goes on \
                 here:",
                "- here: device0: no state",
                "- there: no disk0",
                "- there: no avx512",
            ]
        );
        let late = MigrationCheck {
            would_move: false,
            converges: Some(false),
            objections: vec!["it would not converge".to_owned()],
            ..known()
        };
        let lines = told(&late);
        assert_eq!(lines[1], "- it would not converge");
        assert!(lines[2].starts_with("after 3.2 s it would not be done; "));
        assert!(lines[3].starts_with("2 GiB of memory in use"), "{lines:?}");
    }
}
