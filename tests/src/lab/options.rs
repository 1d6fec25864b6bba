//! The command line of the `lab` binary.

use std::path::PathBuf;

use anyhow::{Context, bail};

use super::scenario::{Group, Scenario, matches};
use super::shape::Shape;

/// What `--help` prints.
pub const USAGE: &str = "\
usage: lab [OPTIONS]

Runs scenarios in the nested lab (see docs/testing-lab.md).

  --list            list the scenarios and stop
  --only GLOB       run scenarios whose name matches (* and ?); may be repeated
  --group NAME      run only the scenarios of this group: lab or drover
  --timeout S       time limit of each scenario in seconds, instead of its own
  --moves N         moves of a guest in scenarios that go back and forth (migrate-assigned)
  --jobs N          L1 machines at a time (default: one a CPU, up to 4)
  --keep            keep each boot's share and scratch disk in target/lab
  --build-only      build and cache kernels and images, and stop
  --shell           boot L1 to a shell on this terminal
  --script FILE     boot L1 and run a shell script there, its output on this terminal
  --shape NAME      the L1 for --shell and --script: small (default), large, vfio, vfio-no-remap or vfio-no-iommu
";

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What to do.
    pub action: Action,
    /// Name patterns; none means every name.
    pub only: Vec<String>,
    /// The only group to run.
    pub group: Option<Group>,
    /// Time limits in seconds that replace the table's.
    pub limit_s: Option<u64>,
    /// How often a guest moves in scenarios that go back and forth, in place of theirs.
    pub moves: Option<u32>,
    /// L1 machines at a time.
    pub jobs: usize,
    /// Keep what a boot leaves.
    pub keep: bool,
    /// L1 for work by hand.
    pub shape: Shape,
}

/// What the `lab` binary does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Run scenarios.
    Run,
    /// List them.
    List,
    /// Print the usage.
    Help,
    /// Build artefacts only.
    Build,
    /// A shell in L1.
    Shell,
    /// A script in L1.
    Script(PathBuf),
}

/// An L1 has one CPU, and 1 to 4 GiB of its memory are touched.
fn default_jobs() -> usize {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4))
}

impl Options {
    /// Reads the command line, without the program's name.
    ///
    /// # Errors
    /// When it is not as [`USAGE`] says.
    pub fn parse(args: impl IntoIterator<Item = String>) -> anyhow::Result<Self> {
        let mut options = Self {
            action: Action::Run,
            only: Vec::new(),
            group: None,
            limit_s: None,
            moves: None,
            jobs: default_jobs(),
            keep: false,
            shape: Shape::Small,
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--list" => options.action = Action::List,
                "--help" | "-h" => options.action = Action::Help,
                "--build-only" => options.action = Action::Build,
                "--shell" => options.action = Action::Shell,
                "--script" => options.action = Action::Script(value()?.into()),
                "--keep" => options.keep = true,
                "--only" => options.only.push(value()?),
                "--group" => options.group = Some(group(&value()?)?),
                "--shape" => options.shape = shape(&value()?)?,
                "--timeout" => options.limit_s = Some(positive(&arg, &value()?)?),
                "--moves" => options.moves = Some(moves(&arg, &value()?)?),
                "--jobs" => options.jobs = usize::try_from(positive(&arg, &value()?)?)?,
                _ => bail!("unknown argument '{arg}'"),
            }
        }
        Ok(options)
    }

    /// The scenarios of `table` that were asked for, in its order.
    #[must_use]
    pub fn select<'a>(&self, table: &'a [Scenario]) -> Vec<&'a Scenario> {
        table
            .iter()
            .filter(|scenario| self.group.is_none_or(|group| scenario.group == group))
            .filter(|scenario| {
                self.only.is_empty() || self.only.iter().any(|glob| matches(glob, scenario.name))
            })
            .collect()
    }
}

fn group(name: &str) -> anyhow::Result<Group> {
    [Group::Lab, Group::Drover]
        .into_iter()
        .find(|group| group.name() == name)
        .with_context(|| format!("--group: '{name}' is neither lab nor drover"))
}

fn shape(name: &str) -> anyhow::Result<Shape> {
    Shape::from_name(name).with_context(|| format!("--shape: '{name}' is no shape of an L1"))
}

fn moves(option: &str, text: &str) -> anyhow::Result<u32> {
    let moves = u32::try_from(positive(option, text)?);
    moves.with_context(|| format!("{option}: '{text}' are too many"))
}

fn positive(option: &str, text: &str) -> anyhow::Result<u64> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => bail!("{option}: '{text}' is not a positive number"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::scenarios::TABLE;

    fn parse(line: &str) -> anyhow::Result<Options> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_are_read() {
        let options =
            parse("--only boot-* --only l1-* --timeout 9 --jobs 2 --moves 20 --keep --group lab")
                .unwrap();
        assert_eq!(options.only, ["boot-*", "l1-*"]);
        assert_eq!(
            (options.limit_s, options.moves, options.jobs, options.keep),
            (Some(9), Some(20), 2, true)
        );
        assert_eq!(options.group, Some(Group::Lab));
        assert_eq!(
            parse("--script a.sh").unwrap().action,
            Action::Script("a.sh".into())
        );
    }

    #[test]
    fn wrong_options_name_the_mistake() {
        for (line, word) in [
            ("--only", "--only needs a value"),
            ("--timeout 0", "'0'"),
            ("--moves 4294967296", "4294967296"),
            ("--jobs two", "'two'"),
            ("--group l1", "'l1'"),
            ("--shape tiny", "'tiny'"),
            ("boot", "'boot'"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }

    #[test]
    fn selection_is_by_group_and_name() {
        let names = |line: &str| -> Vec<_> {
            parse(line)
                .unwrap()
                .select(TABLE)
                .iter()
                .map(|scenario| scenario.name)
                .collect()
        };
        assert_eq!(names("--only l1-smoke --group lab"), ["l1-smoke"]);
        assert!(names("--only l1-smoke --group drover").is_empty());
        assert_eq!(names("").len(), TABLE.len());
    }
}
