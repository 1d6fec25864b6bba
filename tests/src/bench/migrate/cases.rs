//! The cases: what the guest does, over which link, and what is to come of it.

use std::time::Duration;

use anyhow::Context;

use super::link::Link;
use super::moves::{
    AUTO_CONVERGE, How, Move, Moves, Scenario, measure, qemu_ways, share_of_plain, with_downtime,
};
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
/// Drover slows down a guest that writes too fast.
const SLOWEST: (&str, &str) = ("vCPUs' speed, slowest round", "%");
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

/// The rows of a case.
struct Results<'a> {
    case: &'a str,
    /// Drover as it is by default.
    own: &'a Moves,
    all: &'a [Moves],
    rows: Vec<Row>,
}

impl<'a> Results<'a> {
    fn new(case: &'a str, all: &'a [Moves]) -> anyhow::Result<Self> {
        let own = all.iter().find(|moves| moves.how == AUTO);
        Ok(Self {
            case,
            own: own.context("Drover's default was not measured")?,
            all,
            rows: Vec::new(),
        })
    }

    /// Drover's default against the best of the ways that are `wanted`.
    fn against(
        &mut self,
        (what, unit): (&str, &'static str),
        wanted: impl Fn(How) -> bool,
        value: impl Fn(&Move) -> Option<f64>,
        bar: Bar,
    ) {
        let others = self.all.iter().filter(|moves| wanted(moves.how));
        let others: Vec<Series> = others.map(|moves| moves.series(&value)).collect();
        let own = self.own.series(&value);
        let row = Row::against((self.case, what, unit), &own, &others, bar);
        self.rows.push(row);
    }

    /// Drover's default against the best of QEMU's ways.
    fn compare(
        &mut self,
        names: (&str, &'static str),
        value: impl Fn(&Move) -> Option<f64>,
        bar: Bar,
    ) {
        self.against(names, |how| matches!(how, How::Qemu(_)), value, bar);
    }

    /// Drover's default alone.
    fn alone(
        &mut self,
        names: (&str, &'static str),
        value: impl Fn(&Move) -> Option<f64>,
        bar: Bar,
    ) {
        self.against(names, |_| false, value, bar);
    }
}

fn untouched(bench: &Bench<'_>) -> anyhow::Result<Vec<Row>> {
    let link = Link::loopback()?;
    let scenario = Scenario {
        started: ("ready", "version"),
        ..bench.scenario(&link, MEMORY_MIB, IDLE.to_owned())
    };
    let moves = bench.measure(&drover_and_qemu(), &scenario)?;
    let mut results = Results::new("untouched memory, idle", &moves)?;
    results.compare(("total", "ms"), Move::total_ms, Bar::RatioAtMost(0.25));
    results.compare(("on the wire", "MiB"), Move::wire_mib, Bar::AtMost(1.0));
    results.compare(("blackout", "ms"), Move::blackout_ms, Bar::AtMost(5.0));
    Ok(results.rows)
}

fn incompressible(bench: &Bench<'_>) -> anyhow::Result<Vec<Row>> {
    let link = Link::loopback()?;
    let scenario = Scenario {
        plain_time: Some(Duration::from_millis(500)),
        ..bench.scenario(&link, MEMORY_MIB, filled("incompressible"))
    };
    let moves = bench.measure(&drover_and_qemu(), &scenario)?;
    let mib = scenario.memory_mib;
    let share = |moved: &Move| share_of_plain(moved, mib);
    let plain = |moved: &Move| Some(moved.plain_rate? / 1e9);
    let per_gib = |moved: &Move| Some(moved.cpu_seconds()? / (number(mib) / 1024.0));
    let growth = "source's memory besides the guest's, growth";
    let cpu = "CPU of both sides, without vCPUs";
    let mut results = Results::new("incompressible memory", &moves)?;
    results.compare(("total", "ms"), Move::total_ms, Bar::RatioAtMost(0.45));
    results.alone(
        ("rate over that of plain sockets", ""),
        share,
        Bar::AtLeast(0.8),
    );
    results.alone(("plain sockets", "GB/s"), plain, Bar::None);
    results.compare(("blackout", "ms"), Move::blackout_ms, Bar::None);
    results.compare((growth, "MiB"), Move::growth_mib, Bar::None);
    results.compare((cpu, "s/GiB"), per_gib, Bar::RatioAtMost(1.0));
    Ok(results.rows)
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
    ways.push(AUTO_CONVERGE);
    let moves = bench.measure(&ways, &scenario)?;
    let mut results = Results::new(case, &moves)?;
    results.compare(("total", "ms"), Move::total_ms, Bar::RatioAtMost(0.3));
    results.compare(("blackout", "ms"), Move::blackout_ms, Bar::AtMost(20.0));
    results.compare(("on the wire", "MiB"), Move::wire_mib, Bar::None);
    results.alone(SLOWEST, |moved| moved.slowest_percent, Bar::None);
    Ok(results.rows)
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
        let total = ("total, auto and fixed encodings", "ms");
        let plain = |moved: &Move| Some(moved.plain_rate? * 8.0 / 1e9);
        let mut results = Results::new(&case, &moves)?;
        results.against(
            total,
            |how| fixed.contains(&how),
            Move::total_ms,
            Bar::RatioAtMost(1.05),
        );
        results.compare(("total", "ms"), Move::total_ms, Bar::RatioAtMost(1.0));
        results.compare(("on the wire", "MiB"), Move::wire_mib, Bar::None);
        results.alone(("plain sockets", "Gbit/s"), plain, Bar::None);
        rows.extend(results.rows);
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
    ways.push(How::Qemu(Way {
        xbzrle: true,
        ..Way::PLAIN
    }));
    ways.push(AUTO_CONVERGE);
    let moves = bench.measure(&ways, &scenario)?;
    let per_page = |moved: &Move| moved.bytes_per_resent_page.filter(|_| moved.completed);
    let again = ("a page that is sent again", "bytes");
    let mut results = Results::new(case, &moves)?;
    results.alone(again, per_page, Bar::AtMost(400.0));
    // QEMU does not converge, or takes twice as long.
    results.compare(("total", "ms"), Move::total_ms, Bar::RatioAtMost(0.5));
    results.compare(("blackout", "ms"), Move::blackout_ms, Bar::None);
    results.compare(("on the wire", "MiB"), Move::wire_mib, Bar::None);
    results.alone(SLOWEST, |moved| moved.slowest_percent, Bar::None);
    Ok(results.rows)
}
