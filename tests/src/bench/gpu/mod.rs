//! Live migration of VMs with model GPUs, beside plain sockets that carry as many bytes.
//!
//! What is measured is Drover, its connections and the model's own server, all on one machine: with few CPUs
//! they take them from each other. Nothing of it says how fast a real GPU gives and takes its state.

mod moves;

use std::path::PathBuf;

use anyhow::Context;

use super::migrate::machine;
use super::migrate::table::{self, Bar, Row, Series};
use crate::harness::ground::Ground;
use moves::{Case, Move};

/// How to use the program.
pub const USAGE: &str = "Moves VMs with model GPUs, and compares with plain sockets.

Usage: bench gpu-migrate [--moves N] [--quick] [--json FILE] [--docs FILE]

  --moves N     moves of each case (default 5)
  --quick       two moves with an eighth of the video memory: whether it works, not how fast
  --json FILE   write the results there, too
  --docs FILE   put them into this document, where it has marks for them
";

/// Video memory of the two sizes, in MiB.
const SIZES_MIB: [u64; 2] = [256, 2048];
/// What the machine may stand still beyond the time that its device's bytes take, and in all.
const BEYOND_MS: f64 = 10.0;
const PRE_COPY_MS: f64 = 20.0;
/// What a VMM may take more for the larger size.
const GROWTH_MIB: f64 = 8.0;
const MIB: f64 = 1024.0 * 1024.0;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    moves: usize,
    quick: bool,
    json: Option<PathBuf>,
    docs: Option<PathBuf>,
}

impl Options {
    /// Reads a command line; `None`: help is asked for.
    ///
    /// # Errors
    /// Says which word is wrong.
    pub fn parse(mut words: impl Iterator<Item = String>) -> anyhow::Result<Option<Self>> {
        let mut options = Self {
            moves: 5,
            quick: false,
            json: None,
            docs: None,
        };
        while let Some(word) = words.next() {
            let mut value = || {
                let value = words.next();
                value.with_context(|| format!("{word} needs a value"))
            };
            match word.as_str() {
                "--help" | "-h" => return Ok(None),
                "--moves" => options.moves = value()?.parse::<usize>()?.max(1),
                "--quick" => options.quick = true,
                "--json" => options.json = Some(value()?.into()),
                "--docs" => options.docs = Some(value()?.into()),
                other => anyhow::bail!("{other} is not an option"),
            }
        }
        if options.quick {
            options.moves = 2;
        }
        Ok(Some(options))
    }
}

/// Measures, prints and writes what came out. A machine that cannot is told so.
///
/// # Errors
/// When a VM does not move, or does not compute on; not for a bar that is missed.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    let mut rows = Vec::new();
    let mut growths = Vec::new();
    for pre_copy in [false, true] {
        for size in SIZES_MIB {
            let vram_mib = if options.quick { size / 8 } else { size };
            let case = Case { vram_mib, pre_copy };
            eprintln!("bench: {case}");
            let moves = moves::measure(&ground, case, options.moves);
            let moves = moves.with_context(|| case.to_string())?;
            rows.extend(rows_of(case, &moves));
            growths.push(moves);
        }
    }
    for (pre_copy, pair) in ["off", "on"].into_iter().zip(growths.chunks_exact(2)) {
        let [small, large] = pair else {
            continue;
        };
        rows.extend(growth_rows(pre_copy, small, large));
    }
    table::print(&rows);
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&rows)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &options.docs {
        let quick = if options.quick {
            " **A quick run with an eighth of the video memory: it shows that things work, not how fast.**"
        } else {
            ""
        };
        let (host, moves) = (machine::describe_host()?, options.moves);
        let head = format!("{host}. Medians of {moves} moves.{quick}");
        table::write_document(("bench-gpu-migrate", path), &head, &rows)?;
    }
    Ok(())
}

fn series(name: &str, moves: &[Move], value: impl Fn(&Move) -> f64) -> Series {
    Series {
        name: name.to_owned(),
        values: moves.iter().map(|moved| Some(value(moved))).collect(),
    }
}

fn rows_of(case: Case, moves: &[Move]) -> Vec<Row> {
    let name = case.to_string();
    let own = |value: &dyn Fn(&Move) -> f64| series("drover", moves, value);
    let alone = |what: &str, unit, value: &dyn Fn(&Move) -> f64, bar| {
        Row::against((&name, what, unit), &own(value), &[], bar)
    };
    let bound = series("as many bytes by plain sockets", moves, Move::bound_ms);
    let (whole, beyond) = match case.pre_copy {
        true => (Bar::AtMost(PRE_COPY_MS), Bar::None),
        false => (Bar::None, Bar::AtMost(BEYOND_MS)),
    };
    vec![
        Row::against(
            (&name, "blackout", "ms"),
            &own(&|moved| moved.blackout_ms),
            &[bound],
            whole,
        ),
        alone(
            "blackout beyond that",
            "ms",
            &|moved| moved.blackout_ms - moved.bound_ms(),
            beyond,
        ),
        alone(
            "left of the device when it was stopped",
            "MiB",
            &|moved| moved.last_bytes / MIB,
            Bar::None,
        ),
        alone(
            "plain sockets",
            "GB/s",
            &|moved| moved.plain_rate / 1e9,
            Bar::None,
        ),
        alone("total", "ms", &|moved| moved.total_ms, Bar::None),
        alone(
            "CPU of both sides and of the GPUs' servers, without vCPUs and computations",
            "s/GiB",
            &|moved| moved.cpu_seconds / (moved.device_bytes / MIB / 1024.0),
            Bar::None,
        ),
    ]
}

/// Something of a move.
type Value = fn(&Move) -> f64;

fn growth_rows(pre_copy: &str, small: &[Move], large: &[Move]) -> Vec<Row> {
    let name = format!("pre-copy {pre_copy}");
    let sides: [(&str, Value); 2] = [
        ("source's", |moved| moved.source_growth_bytes),
        ("destination's", |moved| moved.destination_growth_bytes),
    ];
    let row = |(side, growth): (&str, Value)| {
        let what = format!("{side} memory besides the guest's, more for the larger video memory");
        let of_pairs = small.iter().zip(large);
        let values = of_pairs.map(|(small, large)| Some((growth(large) - growth(small)) / MIB));
        let series = Series {
            name: "drover".to_owned(),
            values: values.collect(),
        };
        Row::against((&name, &what, "MiB"), &series, &[], Bar::AtMost(GROWTH_MIB))
    };
    sides.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> anyhow::Result<Option<Options>> {
        Options::parse(words.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn command_line_says_how_often() {
        assert_eq!(parse("--moves 9").unwrap().unwrap().moves, 9);
        assert_eq!(parse("--quick").unwrap().unwrap().moves, 2);
        assert!(parse("--help").unwrap().is_none());
        for wrong in ["--moves", "--moves x", "quick"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_beyond_the_bound_is_judged_without_pre_copy_and_all_of_it_with() {
        let moved = Move {
            blackout_ms: 30.0,
            last_bytes: 10e6,
            plain_rate: 1e9,
            device_bytes: 10e6,
            ..Move::default()
        };
        let judged = |pre_copy| {
            let vram_mib = 256;
            let rows = rows_of(Case { vram_mib, pre_copy }, &[moved]);
            rows.iter().map(|row| row.met).collect::<Vec<_>>()
        };
        assert_eq!(judged(false)[..2], [None, Some(false)]);
        assert_eq!(judged(true)[..2], [Some(false), None]);
        let small = Move {
            source_growth_bytes: -9.0 * MIB,
            ..moved
        };
        let rows = growth_rows("off", &[small], &[moved]);
        let met: Vec<_> = rows.iter().map(|row| row.met).collect();
        assert_eq!(met, [Some(false), Some(true)]);
    }
}
