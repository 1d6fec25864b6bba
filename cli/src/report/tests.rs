//! What every report must be, whatever happened.

use std::time::{Duration, UNIX_EPOCH};

use vmm::migrate::progress::{Blackout, PageMix, Postcopy, RoundReport};

use super::*;

fn round(number: u32) -> RoundReport {
    // Each a third of the one before.
    let pages = 524_288 / 3_u64.pow(number.min(12) - 1);
    RoundReport {
        number,
        pages: PageMix {
            zero: pages / 4,
            raw: pages / 8,
            lz4: pages / 2,
            delta: if number > 1 { pages / 8 } else { 0 },
        },
        wire_bytes: pages * 1900,
        device_bytes: 0,
        duration_us: pages * 1900 / 1100,
        dirty_pages: pages / 3,
        cpu_percent: 100,
    }
}

pub(crate) fn good() -> MigrationReport {
    let rounds: Vec<RoundReport> = (1..=7).map(round).collect();
    let mut pages = PageMix::default();
    for round in &rounds {
        pages.add(&round.pages);
    }
    MigrationReport {
        name: "web-1".to_owned(),
        to: Some("tls:beta.example:7000".to_owned()),
        outcome: MigrationOutcome::Migrated,
        error: None,
        total_ms: 2140,
        blackout: Some(Blackout {
            total_us: 23_400,
            pause_us: 1_900,
            devices_us: 0,
            harvest_us: 700,
            pages_us: 8_300,
            save_us: 2_100,
            prepare_us: 9_400,
            restore_us: 6_000,
            commit_us: 2_900,
            pages: 719,
            wire_bytes: 1_366_100,
            device_bytes: 0,
        }),
        postcopy: None,
        predicted_blackout_us: Some(21_000),
        wire_bytes: rounds.iter().map(|round| round.wire_bytes).sum(),
        rounds,
        pages,
        device_bytes: 0,
        check: None,
        detached: Vec::new(),
        put_back: Vec::new(),
        memory_bytes: 2 << 30,
        cache_bytes: 512 << 20,
        streams: 4,
        bottleneck: Some(Bottleneck::Link),
    }
}

/// It never connected.
fn failed() -> MigrationReport {
    MigrationReport {
        to: None,
        outcome: MigrationOutcome::Resumed,
        error: Some("the destination has no CPU feature \"avx512f\"".to_owned()),
        blackout: None,
        predicted_blackout_us: None,
        rounds: Vec::new(),
        pages: PageMix::default(),
        wire_bytes: 0,
        cache_bytes: 0,
        streams: 0,
        bottleneck: None,
        ..good()
    }
}

fn page(report: &MigrationReport) -> String {
    page_from("alpha", report)
}

fn page_from(host: &str, report: &MigrationReport) -> String {
    let page = render(
        report,
        host,
        UNIX_EPOCH + Duration::from_secs(1_800_000_000),
    );
    assert_well_formed(&page);
    assert_self_contained(&page);
    page
}

/// Elements nest and end, attributes are quoted, entities are the few that XML knows, names of
/// elements are not given twice.
fn assert_well_formed(page: &str) {
    let body = page.strip_prefix("<!DOCTYPE html>").unwrap();
    let mut open: Vec<&str> = Vec::new();
    let mut ids: Vec<&str> = Vec::new();
    for piece in body.split('<').skip(1) {
        let (tag, text) = piece.split_once('>').unwrap_or_else(|| panic!("{piece}"));
        for entity in text.split('&').skip(1).chain(tag.split('&').skip(1)) {
            let known = ["amp;", "lt;", "gt;", "quot;", "#39;"];
            assert!(
                known.iter().any(|known| entity.starts_with(known)),
                "{piece}"
            );
        }
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "{piece}");
            continue;
        }
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        for attribute in tag.split('"').step_by(2).filter(|word| word.contains('=')) {
            assert!(attribute.ends_with('='), "not quoted: {tag}");
        }
        ids.extend(
            tag.split(" id=\"")
                .nth(1)
                .and_then(|id| id.split('"').next()),
        );
        if !tag.ends_with('/') {
            open.push(tag.split([' ', '\n']).next().unwrap());
        }
    }
    assert!(open.is_empty(), "{open:?}");
    let given = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), given);
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
}

/// Nothing is fetched and nothing runs.
fn assert_self_contained(page: &str) {
    let fetching = ["://", "src=", "href", "url(", "@import", "<link"];
    let running = ["<script", "onload=", "onclick=", "javascript:"];
    for word in fetching.into_iter().chain(running) {
        assert!(!page.contains(word), "{word}");
    }
}

#[test]
fn report_tells_what_happened() {
    let page = page(&good());
    for text in [
        "Migration of <bdi>web-1</bdi>",
        "<bdi>alpha</bdi> → <bdi>tls:beta.example:7000</bdi>",
        "<span class=\"outcome\">migrated</span>",
        "2027-01-15 08:00:00 UTC",
        "2.14 s",
        "23.4 ms",
        "21 ms",
        "2 GiB",
        "4 connections",
        "<strong>link</strong>",
        "719 pages, 1.3 MiB were sent",
        "prefers-color-scheme: dark",
        "width=device-width",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert!(!page.contains("role=\"alert\"") && !page.contains("Post-copy"));
}

#[test]
fn every_round_is_drawn_in_every_chart() {
    for rounds in [1, 2, 7, 40, 300] {
        let mut report = good();
        report.rounds = (1..=rounds).map(round).collect();
        let page = page(&report);
        for number in 1..=rounds {
            let last = round(number);
            let sent = format!("<title>round {number}: {}</title>", size(last.wire_bytes));
            assert!(page.contains(&sent), "{sent}");
            for name in ["sent per second", "changed by the guest per second"] {
                assert!(
                    page.contains(&format!("<title>round {number}: {name}")),
                    "{number}"
                );
            }
            assert_eq!(
                page.contains(&format!("<title>round {number}: LZ4 ")),
                last.pages.lz4 > 0
            );
            assert!(page.contains(&format!("<th scope=\"row\">{number}</th>")));
        }
        let bars = page.matches("<rect class=\"blue\" x=").count();
        let raw = report
            .rounds
            .iter()
            .filter(|round| round.pages.raw > 0)
            .count();
        assert_eq!(bars, report.rounds.len() + raw);
    }
}

/// Numbers of an attribute, wherever it stands.
fn numbers(page: &str, attribute: &str) -> Vec<f64> {
    let before = format!(" {attribute}=\"");
    let pieces = page.split(&before).skip(1);
    let numbers = pieces.filter_map(|piece| piece.split('"').next()?.parse().ok());
    numbers.collect()
}

#[test]
fn drawings_stay_within_their_frames() {
    let mut wild = good();
    for (index, round) in wild.rounds.iter_mut().enumerate() {
        round.wire_bytes = u64::MAX >> (9 * index);
        round.duration_us = index as u64;
    }
    for report in [good(), wild, failed()] {
        let page = page(&report);
        for attribute in ["x", "x1", "x2", "cx", "width"] {
            for number in numbers(&page, attribute) {
                assert!((0.0..=440.0).contains(&number), "{attribute}={number}");
            }
        }
        for attribute in ["y", "y1", "y2", "cy", "height"] {
            for number in numbers(&page, attribute) {
                assert!((0.0..=220.0).contains(&number), "{attribute}={number}");
            }
        }
    }
}

#[test]
fn names_and_errors_cannot_become_markup() {
    let evil = "</title><script>alert('x')</script>&\"\0";
    let report = MigrationReport {
        name: evil.to_owned(),
        to: Some(evil.to_owned()),
        error: Some(evil.to_owned()),
        ..good()
    };
    let page = page_from(evil, &report);
    let escaped =
        "&lt;/title&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&quot;\u{fffd}";
    assert_eq!(page.matches(escaped).count(), 5);
}

#[test]
fn failure_before_the_first_round_is_a_sensible_page() {
    let page = page(&failed());
    for text in [
        "It did not succeed:",
        "no CPU feature &quot;avx512f&quot;",
        "No round was finished.",
        "The VM was never stopped.",
        "<bdi>alpha</bdi> → unknown",
        "failed, the VM goes on where it was",
        "<dd>0 B<span class=\"note\">0 % of memory",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert!(!page.contains("held it up"));
}

#[test]
fn zeroes_and_the_largest_numbers_are_borne() {
    let nothing = MigrationReport {
        total_ms: 0,
        memory_bytes: 0,
        blackout: Some(Blackout::default()),
        postcopy: Some(Postcopy::default()),
        rounds: vec![RoundReport::default(); 3],
        ..failed()
    };
    assert!(page(&nothing).contains("No part took measurable time."));
    let most = u64::MAX;
    let all = MigrationReport {
        total_ms: most,
        blackout: Some(Blackout {
            total_us: 1,
            pause_us: most / 8,
            harvest_us: most / 8,
            ..Blackout::default()
        }),
        rounds: vec![RoundReport {
            wire_bytes: most,
            duration_us: most,
            ..round(1)
        }],
        wire_bytes: most,
        memory_bytes: 1,
        ..good()
    };
    page(&all);
}

#[test]
fn every_bottleneck_has_its_advice() {
    for (bottleneck, words) in [
        (Bottleneck::Link, "<strong>link</strong> held it up"),
        (Bottleneck::SourceCpu, "CPU</strong> held it up"),
        (Bottleneck::DirtyRate, "writes</strong> held it up"),
    ] {
        let report = MigrationReport {
            bottleneck: Some(bottleneck),
            ..good()
        };
        let page = page(&report);
        assert!(page.contains(words), "{words}");
        assert_eq!(page.matches("held it up").count(), 1);
    }
}

fn postcopied() -> MigrationReport {
    MigrationReport {
        postcopy: Some(Postcopy {
            pages: 24_576,
            total_us: 1_250_000,
            faults: 1043,
            mean_fault_us: 870,
            longest_fault_us: 14_200,
            reconnections: 2,
        }),
        ..good()
    }
}

#[test]
fn postcopy_is_a_card_with_how_long_the_guest_waited() {
    let page = page(&postcopied());
    let text = "24,576 pages were missing when the VM started at the destination, and came within \
                1.25 s. The guest waited for 1,043 of them: 870 µs on average, 14.2 ms at most. The connection was cut meanwhile, and made \
                again: 2 times.";
    assert!(page.contains("<h2>Post-copy</h2>") && page.contains(text));
}

#[test]
fn a_post_copy_that_was_not_needed_is_told() {
    let report = MigrationReport {
        postcopy: Some(Postcopy::default()),
        ..good()
    };
    let page = page(&report);
    let text = "It was not needed: no page was left for it.";
    assert!(page.contains("<h2>Post-copy</h2>") && page.contains(text));
    assert!(!page.contains("missing when the VM started"));
}

/// For looking at: `DROVER_REPORT_DIR=/tmp cargo test -p drover report`.
#[test]
fn examples_can_be_looked_at() {
    let mut long = good();
    long.rounds = (1..=40).map(round).collect();
    let examples = [
        ("good", good()),
        ("failed", failed()),
        ("long", long),
        ("postcopy", postcopied()),
    ];
    for (name, report) in examples {
        let page = page(&report);
        if let Some(directory) = std::env::var_os("DROVER_REPORT_DIR") {
            let file = std::path::Path::new(&directory).join(format!("{name}.html"));
            std::fs::write(file, page).unwrap();
        }
    }
}
