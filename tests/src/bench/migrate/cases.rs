//! The cases: what the guest does, over which link, and what is to come of it.

use std::time::Duration;

use super::link::Link;
use super::moves::{How, Move, Moves, Scenario, measure, qemu_ways, share_of_plain, with_downtime};
use super::qemu::Way;
use super::table::{Bar, Row, Series, number};
use crate::harness::ground::Ground;

/// All cases by name.
pub(super) const CASES: [(&str, Measure); 5] = [
    ("untouched", untouched),
    ("incompressible", incompressible),
    ("dirty", dirty),
    ("text", text),
    ("rewritten", rewritten),
];

type Measure = fn(&Bench<'_>) -> anyhow::Result<Vec<Row>>;

/// A guest of 4 GiB, unless said otherwise.
const MEMORY_MIB: u64 = 4096;
/// Over a slow link.
const LINK_MEMORY_MIB: u64 = 1024;
const LINKS_GBIT: [u64; 3] = [1, 10, 25];
/// 500 MB/s.
const DIRTY_MIB_S: u64 = 477;
/// More than what the guest keeps for itself before its free memory.
const GUEST_HEAP_MIB: u64 = 128;
/// What is rewritten over a link of 1 Gbit/s, and faster than that link.
const REWRITTEN_MIB: u64 = 256;
const REWRITTEN_MIB_S: u64 = 200;
/// Drover's default.
const STRICT_DOWNTIME_MS: u64 = 20;
const AUTO: How = How::Drover("auto");
const IDLE: &str = "run=heartbeat";

/// What all cases need.
pub(super) struct Bench<'a> {
    pub(super) ground: &'a Ground,
    pub(super) rounds: usize,
    pub(super) quick: bool,
}

impl Bench<'_> {
    fn mib(&self, full: u64) -> u64 {
        if self.quick { full / 4 } else { full }
    }

    fn scenario<'a>(&self, link: &'a Link, memory_mib: u64, cmdline: String) -> Scenario<'a> {
        Scenario {
            link,
            memory_mib: self.mib(memory_mib),
            cmdline,
            started: ("command=mem", "result"),
            limit: Duration::from_secs(if self.quick { 20 } else { 60 }),
            plain_time: None,
        }
    }

    fn measure(&self, ways: &[How], scenario: &Scenario<'_>) -> anyhow::Result<Vec<Moves>> {
        measure(self.ground, self.rounds, ways, scenario)
    }
}

/// The guest fills its memory, waits to be moved and then checks it.
fn filled(mode: &str) -> String {
    format!("run=mem,heartbeat,mem mode={mode} 1.op=fill 3.op=verify")
}

/// Drover as it is by default, and QEMU in all ways.
fn drover_and_qemu() -> Vec<How> {
    let mut ways = vec![AUTO];
    ways.extend(qemu_ways());
    ways
}

/// Drover's default against the best of QEMU's ways.
fn compare(
    names: (&str, &str, &'static str),
    moves: &[Moves],
    value: fn(&Move) -> Option<f64>,
    bar: Bar,
) -> Option<Row> {
    let own = moves.iter().find(|moves| moves.how == AUTO)?;
    let others = moves
        .iter()
        .filter(|moves| matches!(moves.how, How::Qemu(_)));
    let others: Vec<Series> = others.map(|moves| moves.series(value)).collect();
    Some(Row::against(names, &own.series(value), &others, bar))
}

/// Drover's default alone.
fn alone(
    names: (&str, &str, &'static str),
    moves: &[Moves],
    value: impl Fn(&Move) -> Option<f64>,
    bar: Bar,
) -> Option<Row> {
    let own = moves.iter().find(|moves| moves.how == AUTO)?;
    Some(Row::alone(names, &own.series(value), bar))
}

fn untouched(bench: &Bench<'_>) -> anyhow::Result<Vec<Row>> {
    let case = "untouched memory, idle";
    let link = Link::loopback()?;
    let scenario = Scenario {
        started: ("ready", "version"),
        ..bench.scenario(&link, MEMORY_MIB, IDLE.to_owned())
    };
    let moves = bench.measure(&drover_and_qemu(), &scenario)?;
    let rows = [
        compare(
            (case, "total", "ms"),
            &moves,
            Move::total_ms,
            Bar::RatioAtMost(0.25),
        ),
        compare(
            (case, "on the wire", "MiB"),
            &moves,
            Move::wire_mib,
            Bar::AtMost(1.0),
        ),
        compare(
            (case, "blackout", "ms"),
            &moves,
            Move::blackout_ms,
            Bar::AtMost(5.0),
        ),
    ];
    Ok(rows.into_iter().flatten().collect())
}

fn incompressible(bench: &Bench<'_>) -> anyhow::Result<Vec<Row>> {
    let case = "incompressible memory";
    let link = Link::loopback()?;
    let scenario = Scenario {
        plain_time: Some(Duration::from_millis(500)),
        ..bench.scenario(&link, MEMORY_MIB, filled("incompressible"))
    };
    let moves = bench.measure(&drover_and_qemu(), &scenario)?;
    let mib = scenario.memory_mib;
    let gib = number(mib) / 1024.0;
    let per_gib = |moves: &Moves| moves.series(|moved| Some(moved.cpu_seconds()? / gib));
    let cpu: Vec<Series> = moves.iter().map(per_gib).collect();
    let mut rows = vec![
        compare(
            (case, "total", "ms"),
            &moves,
            Move::total_ms,
            Bar::RatioAtMost(0.45),
        ),
        alone(
            (case, "rate over that of plain sockets", ""),
            &moves,
            |moved| share_of_plain(moved, mib),
            Bar::AtLeast(0.8),
        ),
        alone(
            (case, "plain sockets", "GB/s"),
            &moves,
            |m| Some(m.plain_rate? / 1e9),
            Bar::None,
        ),
        compare(
            (case, "blackout", "ms"),
            &moves,
            Move::blackout_ms,
            Bar::None,
        ),
        compare(
            (case, "source's memory besides the guest's, growth", "MiB"),
            &moves,
            Move::growth_mib,
            Bar::None,
        ),
    ];
    if let Some((own, others)) = cpu.split_first() {
        let names = (case, "CPU of both sides, without vCPUs", "s/GiB");
        let bar = Bar::RatioAtMost(1.0);
        rows.push(Some(Row::against(names, own, others, bar)));
    }
    Ok(rows.into_iter().flatten().collect())
}

fn dirty(bench: &Bench<'_>) -> anyhow::Result<Vec<Row>> {
    let case = "incompressible memory, a quarter dirtied at 500 MB/s";
    let link = Link::loopback()?;
    let part = bench.mib(MEMORY_MIB) / 4;
    // The guest checks what it has dirtied, then as much behind it.
    let cmdline = format!(
        "run=mem,dirty,mem mode=incompressible 1.op=fill 2.dirty_len={part}M \
         2.prefill=incompressible 2.rate_mib_s={DIRTY_MIB_S} 2.progress_ms=0 \
         3.op=verify 3.base={}M 3.len={part}M",
        part + GUEST_HEAP_MIB
    );
    let scenario = Scenario {
        started: ("command=dirty", "event"),
        ..bench.scenario(&link, MEMORY_MIB, cmdline)
    };
    let mut ways = drover_and_qemu();
    let qemu = qemu_ways();
    // Compressed it does not get under 300 ms before long, and under 20 ms never.
    ways.extend(with_downtime(&qemu[..2], STRICT_DOWNTIME_MS));
    let moves = bench.measure(&ways, &scenario)?;
    let rows = [
        compare(
            (case, "total", "ms"),
            &moves,
            Move::total_ms,
            Bar::RatioAtMost(0.3),
        ),
        compare(
            (case, "blackout", "ms"),
            &moves,
            Move::blackout_ms,
            Bar::AtMost(20.0),
        ),
        compare(
            (case, "on the wire", "MiB"),
            &moves,
            Move::wire_mib,
            Bar::None,
        ),
    ];
    Ok(rows.into_iter().flatten().collect())
}

fn text(bench: &Bench<'_>) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for gbit in LINKS_GBIT {
        let case = format!("text over {gbit} Gbit/s");
        let link = Link::limited(gbit)?;
        let scenario = Scenario {
            plain_time: Some(Duration::from_millis(500)),
            ..bench.scenario(&link, LINK_MEMORY_MIB, filled("text"))
        };
        let fixed = ["raw", "lz4", "delta"].map(How::Drover);
        let mut ways = drover_and_qemu();
        ways.extend(fixed);
        let moves = bench.measure(&ways, &scenario)?;
        let names = |what, unit| (case.as_str(), what, unit);
        let auto = moves.iter().find(|moves| moves.how == AUTO);
        let series = |moves: &Moves| moves.series(Move::total_ms);
        let fixed = moves.iter().filter(|moves| fixed.contains(&moves.how));
        let fixed: Vec<Series> = fixed.map(series).collect();
        let bar = Bar::RatioAtMost(1.05);
        rows.extend(auto.map(|auto| {
            Row::against(
                names("total, auto and fixed encodings", "ms"),
                &series(auto),
                &fixed,
                bar,
            )
        }));
        rows.extend(compare(
            names("total", "ms"),
            &moves,
            Move::total_ms,
            Bar::RatioAtMost(1.0),
        ));
        rows.extend(compare(
            names("on the wire", "MiB"),
            &moves,
            Move::wire_mib,
            Bar::None,
        ));
        rows.extend(alone(
            names("plain sockets", "Gbit/s"),
            &moves,
            |moved| Some(moved.plain_rate? * 8.0 / 1e9),
            Bar::None,
        ));
    }
    Ok(rows)
}

fn rewritten(bench: &Bench<'_>) -> anyhow::Result<Vec<Row>> {
    let case = "a few bytes of each page rewritten faster than 1 Gbit/s";
    let link = Link::limited(1)?;
    let (part, rate) = (bench.mib(REWRITTEN_MIB), REWRITTEN_MIB_S);
    let cmdline = format!(
        "run=dirty dirty_len={part}M prefill=incompressible rate_mib_s={rate} progress_ms=0"
    );
    let scenario = Scenario {
        started: ("command=dirty", "event"),
        ..bench.scenario(&link, MEMORY_MIB, cmdline)
    };
    let mut ways = drover_and_qemu();
    ways.extend(qemu_ways().first().map(|how| match how {
        How::Qemu(way) => How::Qemu(Way {
            xbzrle: true,
            ..*way
        }),
        drover @ How::Drover(_) => *drover,
    }));
    let moves = bench.measure(&ways, &scenario)?;
    let per_page = |moved: &Move| moved.bytes_per_resent_page.filter(|_| moved.completed);
    let rows = [
        alone(
            (case, "a page that is sent again", "bytes"),
            &moves,
            per_page,
            Bar::AtMost(400.0),
        ),
        // QEMU does not converge, or takes twice as long.
        compare(
            (case, "total", "ms"),
            &moves,
            Move::total_ms,
            Bar::RatioAtMost(0.5),
        ),
        compare(
            (case, "blackout", "ms"),
            &moves,
            Move::blackout_ms,
            Bar::None,
        ),
        compare(
            (case, "on the wire", "MiB"),
            &moves,
            Move::wire_mib,
            Bar::None,
        ),
    ];
    Ok(rows.into_iter().flatten().collect())
}
