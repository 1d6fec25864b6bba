//! Drover's live migration beside QEMU's: the same guest, over the same links, in the same run.
//!
//! Both VMMs are watched from outside, in the same way: by the guest's heartbeat in both processes'
//! memory, by the counters of the link's interface, by what the kernel says of the processes. Every
//! guest checks at the destination what it wrote at the source.

mod cases;
mod drover;
mod guest;
pub(super) mod link;
pub(super) mod machine;
mod moves;
mod qemu;
mod qmp;
pub(super) mod table;
pub(super) mod watch;

use std::path::PathBuf;

use anyhow::{Context, ensure};

use super::peer::Peers;
use crate::harness::ground::Ground;
pub use table::Row;

/// How to use the program.
pub const USAGE: &str = "Compares Drover's live migration with QEMU's.

Usage: bench migrate [--cases LIST] [--rounds N] [--quick] [--json FILE] [--docs FILE]

  --cases LIST  untouched, incompressible, dirty, text or rewritten, separated by commas (all)
  --rounds N    rounds of each measurement (default 5)
  --quick       one round with a quarter of the memory: whether it works, not how fast
  --json FILE   write the results there, too
  --docs FILE   put them into this document, where it has marks for them
";

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    cases: Vec<String>,
    rounds: usize,
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
            cases: Vec::new(),
            rounds: 5,
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
                "--cases" => options.cases = value()?.split(',').map(str::to_owned).collect(),
                "--rounds" => options.rounds = value()?.parse::<usize>()?.max(1),
                "--quick" => options.quick = true,
                "--json" => options.json = Some(value()?.into()),
                "--docs" => options.docs = Some(value()?.into()),
                other => anyhow::bail!("{other} is not an option"),
            }
        }
        for case in &options.cases {
            let known = cases::CASES.iter().any(|(name, _)| name == case);
            ensure!(known, "{case} is not a case");
        }
        if options.quick {
            options.rounds = 1;
        }
        Ok(Some(options))
    }

    fn wants(&self, name: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|case| case == name)
    }
}

/// Measures what `options` ask for, prints it and writes it. A machine that cannot is told so.
///
/// # Errors
/// When a VMM does not do what it should, or memory does not arrive intact; not for a bar that is
/// missed.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let Some(ground) = Ground::kvm_and_net()? else {
        return Ok(());
    };
    Peers::new(&ground)?;
    let bench = cases::Bench {
        ground: &ground,
        rounds: options.rounds,
        quick: options.quick,
    };
    let mut rows = Vec::new();
    for (name, measure) in cases::CASES {
        if options.wants(name) {
            eprintln!("bench: {name}");
            rows.extend(measure(&bench).with_context(|| format!("case {name}"))?);
        }
    }
    table::print(&rows);
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&rows)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &options.docs {
        let rounds = options.rounds;
        let quick = if options.quick {
            " **A quick run with a quarter of the memory: it shows that things work, not how fast.**"
        } else {
            ""
        };
        let head = format!(
            "{} Medians of {rounds} rounds.{quick}",
            machine::describe()?
        );
        table::write_document(("bench-migrate", path), &head, &rows)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> anyhow::Result<Option<Options>> {
        Options::parse(words.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn command_line_names_cases_or_takes_all() {
        let all = parse("").unwrap().unwrap();
        assert!(all.wants("text") && all.rounds == 5);
        let some = parse("--cases dirty,text --quick").unwrap().unwrap();
        assert!(some.wants("text") && some.wants("dirty") && !some.wants("untouched"));
        assert_eq!(some.rounds, 1);
        assert!(parse("--help").unwrap().is_none());
        for wrong in ["--cases", "--cases all", "--rounds x", "quick"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
