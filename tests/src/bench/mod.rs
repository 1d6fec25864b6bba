//! Drover beside QEMU on the same machine, in the same run, with the same guest.
//!
//! Absolute numbers say as much about the machine as about the VMM; the ratios are what counts.
//! Rounds of the two alternate, so that both meet the same weather.

mod block;
mod figure;
pub mod gpu;
mod memory;
pub mod migrate;
mod net;
mod peer;
mod round;
mod startup;

use std::time::Duration;

pub use figure::{Figure, print_table};

use crate::harness::ground::Ground;
use peer::Peers;

/// How to use the program.
pub const USAGE: &str = "Compares Drover with QEMU.

Usage: bench [--only NAME]... [--rounds N] [--ms N] [--json FILE]

  --only NAME   startup, memory, block or net; may be repeated
  --rounds N    rounds of each measurement (default 5; 20 starts each)
  --ms N        how long each operation of a round runs (default 400)
  --json FILE   write the figures there, too

`bench migrate` compares live migration; see `bench migrate --help`. `bench gpu-migrate` moves VMs with model GPUs.
";

/// What to measure, and how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// Parts to measure; empty: all.
    pub only: Vec<String>,
    /// Rounds of each measurement.
    pub rounds: usize,
    /// How long each operation of a round runs.
    pub time: Duration,
    /// File for the figures.
    pub json: Option<std::path::PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            only: Vec::new(),
            rounds: 5,
            time: Duration::from_millis(400),
            json: None,
        }
    }
}

impl Options {
    /// Reads a command line; `None`: help is asked for.
    ///
    /// # Errors
    /// Says which word is wrong.
    pub fn parse(words: impl Iterator<Item = String>) -> anyhow::Result<Option<Self>> {
        let mut options = Self::default();
        let mut words = words;
        while let Some(word) = words.next() {
            let mut value = || {
                let value = words.next();
                value.ok_or_else(|| anyhow::anyhow!("{word} needs a value"))
            };
            match word.as_str() {
                "--help" | "-h" => return Ok(None),
                "--only" => options.only.push(value()?),
                "--rounds" => options.rounds = value()?.parse::<usize>()?.max(1),
                "--ms" => options.time = Duration::from_millis(value()?.parse()?),
                "--json" => options.json = Some(value()?.into()),
                other => anyhow::bail!("{other} is not an option"),
            }
        }
        Ok(Some(options))
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

type Measure = fn(&Peers<'_>, &Options) -> anyhow::Result<Vec<Figure>>;

/// Measures what `options` ask for; prints what it does as it goes. `None`: this machine cannot
/// run VMs.
///
/// # Errors
/// When a VMM does not do what it should.
pub fn run(options: &Options) -> anyhow::Result<Option<Vec<Figure>>> {
    let Some(ground) = Ground::kvm()? else {
        return Ok(None);
    };
    let peers = Peers::new(&ground)?;
    let parts: [(&str, Measure); 4] = [
        ("startup", startup::measure),
        ("memory", memory::measure),
        ("block", block::measure),
        ("net", net::measure),
    ];
    let mut figures = Vec::new();
    for (name, measure) in parts {
        if options.wants(name) {
            eprintln!("bench: {name}");
            figures.extend(measure(&peers, options)?);
        }
    }
    Ok(Some(figures))
}
