//! One L1's progress, from its events: which scenario runs, how the others ended,
//! and whom to blame when L1 dies.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::l1::{L1, Next};
use super::protocol::Event;
use super::report::Outcome;
use super::scenario::Scenario;
use crate::harness::process;

/// For L1 to start its agent; it takes 2 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// For the agent to go from one scenario to the next, or to power off.
const STEP_LIMIT: Duration = Duration::from_secs(45);

/// A scenario that ended, with the part of L1's console that was written meanwhile.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub outcome: Outcome,
    /// What L1's kernel said while it ran.
    pub console: Vec<u8>,
}

/// The progress.
pub struct Boot<'a> {
    scenarios: &'a [&'a Scenario],
    limit_s: Option<u64>,
    console: PathBuf,
    running: Option<Running<'a>>,
    ended: Vec<Ended>,
}

struct Running<'a> {
    scenario: &'a Scenario,
    since: Instant,
    console_offset: u64,
}

impl<'a> Boot<'a> {
    /// The progress of an L1 that has just been started to run `scenarios`.
    #[must_use]
    pub fn new(scenarios: &'a [&'a Scenario], limit_s: Option<u64>, console: PathBuf) -> Self {
        Self {
            scenarios,
            limit_s,
            console,
            running: None,
            ended: Vec::new(),
        }
    }

    /// Follows L1 until it has ended or must be killed. What ended is not empty,
    /// so that whoever boots again for the rest comes to an end.
    ///
    /// # Errors
    /// When L1 cannot be followed.
    pub fn follow(mut self, l1: &mut L1) -> anyhow::Result<Vec<Ended>> {
        let mut deadline = Instant::now() + BOOT_LIMIT;
        let mut waiting_for = "its agent to start";
        let mut done = false;
        loop {
            match l1.next(deadline)? {
                Next::Event(event) => {
                    done |= event == Event::Done;
                    (deadline, waiting_for) = self.take(event);
                    continue;
                }
                // All verdicts are in; an L1 that cannot power off is killed.
                Next::Ended(_) | Next::Silence if done => {}
                Next::Ended(status) => {
                    self.blame(&format!("L1 ended early ({})", process::describe(status)));
                }
                Next::Silence => {
                    self.blame(&format!(
                        "L1 was silent while the lab waited for {waiting_for}"
                    ));
                }
            }
            return Ok(self.ended);
        }
    }

    /// Notes an event; until when to wait for the next, and what for.
    fn take(&mut self, event: Event) -> (Instant, &'static str) {
        let mut limit = (STEP_LIMIT, "its next scenario");
        match event {
            Event::Boot { .. } | Event::Done => {}
            Event::Start { scenario } => {
                let known = self.scenarios.iter().find(|s| s.name == scenario);
                self.running = known.map(|scenario| Running {
                    scenario,
                    since: Instant::now(),
                    console_offset: length(&self.console),
                });
                if let Some(scenario) = known {
                    // The agent ends a scenario at its limit; this is for a stuck L1.
                    let patience = scenario.limit(self.limit_s) + STEP_LIMIT;
                    limit = (patience, "a scenario to end");
                }
            }
            Event::End {
                scenario,
                verdict,
                seconds,
                reason,
            } => {
                let offset = self.running.take().map_or(0, |r| r.console_offset);
                let outcome = Outcome {
                    scenario,
                    verdict,
                    seconds,
                    reason,
                };
                self.push(outcome, offset);
            }
        }
        (Instant::now() + limit.0, limit.1)
    }

    /// Blames a dead L1 on the scenario that ran. Where none ran and some had
    /// ended, nobody is to blame: the rest gets another L1. Where nothing ran at
    /// all, another L1 would do no better, and every scenario has failed.
    fn blame(&mut self, problem: &str) {
        if let Some(running) = self.running.take() {
            let seconds = running.since.elapsed().as_secs_f64();
            let outcome = Outcome::failed(running.scenario.name, seconds, problem.to_owned());
            self.push(outcome, running.console_offset);
        } else if self.ended.is_empty() {
            for scenario in self.scenarios {
                self.push(Outcome::failed(scenario.name, 0.0, problem.to_owned()), 0);
            }
        }
    }

    fn push(&mut self, outcome: Outcome, console_offset: u64) {
        println!("lab: {}", outcome.line());
        let console = read_from(&self.console, console_offset).unwrap_or_default();
        self.ended.push(Ended { outcome, console });
    }
}

/// The length of a file; 0 when it is not there yet.
fn length(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.len())
}

fn read_from(path: &Path, offset: u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::protocol::Verdict;
    use crate::lab::scenarios::TABLE;

    fn ended(boot: &Boot<'_>) -> Vec<(String, Verdict)> {
        let outcome = |ended: &Ended| (ended.outcome.scenario.clone(), ended.outcome.verdict);
        boot.ended.iter().map(outcome).collect()
    }

    fn pass(boot: &mut Boot<'_>, name: &str) {
        boot.take(Event::Start {
            scenario: name.into(),
        });
        boot.take(Event::End {
            scenario: name.into(),
            verdict: Verdict::Pass,
            seconds: 1.0,
            reason: String::new(),
        });
    }

    #[test]
    fn dead_l1_fails_the_running_scenario_only() {
        let scenarios = [&TABLE[0], &TABLE[1], &TABLE[2]];
        let mut boot = Boot::new(&scenarios, None, "/nonexistent".into());
        pass(&mut boot, TABLE[0].name);
        boot.take(Event::Start {
            scenario: TABLE[1].name.into(),
        });
        boot.blame("gone");
        let names = [TABLE[0].name.to_owned(), TABLE[1].name.to_owned()];
        let [first, second] = names;
        assert_eq!(
            ended(&boot),
            [(first, Verdict::Pass), (second, Verdict::Fail)]
        );
    }

    #[test]
    fn l1_that_dies_between_scenarios_fails_none() {
        let scenarios = [&TABLE[0], &TABLE[1]];
        let mut boot = Boot::new(&scenarios, None, "/nonexistent".into());
        pass(&mut boot, TABLE[0].name);
        boot.blame("gone");
        assert_eq!(ended(&boot).len(), 1);
    }

    #[test]
    fn l1_that_never_starts_fails_all() {
        let scenarios = [&TABLE[0], &TABLE[1]];
        let mut boot = Boot::new(&scenarios, None, "/nonexistent".into());
        boot.blame("gone");
        let verdicts: Vec<_> = ended(&boot)
            .into_iter()
            .map(|(_, verdict)| verdict)
            .collect();
        assert_eq!(verdicts, [Verdict::Fail, Verdict::Fail]);
    }
}
