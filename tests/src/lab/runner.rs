//! Runs scenarios: as many as possible per L1, and an L1 that dies or hangs costs
//! one scenario, not the rest.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::artefacts::Artefacts;
use super::l1::{BootFolder, L1, Next};
use super::options::Options;
use super::process;
use super::programs::Programs;
use super::protocol::{Event, REQUEST_FILE, Request, Verdict};
use super::report::Outcome;
use super::scenario::Scenario;
use super::shape::Shape;

/// For L1 to start its agent; it takes 2 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// For the agent to go from one scenario to the next, or to power off.
const STEP_LIMIT: Duration = Duration::from_secs(45);

/// Everything that the boots of one run share.
#[derive(Debug)]
pub struct Runner {
    artefacts: Artefacts,
    programs: Programs,
    folder: PathBuf,
    limit_s: Option<u64>,
    keep: bool,
    boots: AtomicUsize,
}

/// Scenarios that one L1 after another runs until none is left.
type Batch<'a> = (Shape, Vec<&'a Scenario>);

impl Runner {
    /// A runner that keeps boots and logs in `folder`.
    #[must_use]
    pub fn new(
        artefacts: Artefacts,
        programs: Programs,
        folder: PathBuf,
        options: &Options,
    ) -> Self {
        let Options { limit_s, keep, .. } = *options;
        Self {
            artefacts,
            programs,
            folder,
            limit_s,
            keep,
            boots: AtomicUsize::new(0),
        }
    }

    /// Runs `scenarios` on `jobs` L1 machines at a time; the outcomes come in the
    /// order of `scenarios`.
    pub fn run(&self, scenarios: &[&Scenario], jobs: usize) -> Vec<Outcome> {
        let queue = Mutex::new(batches(scenarios, jobs));
        let outcomes = Mutex::new(Vec::new());
        let work = || {
            // QEMU dies with the thread that started it, and this one waits for it.
            while let Some((shape, mut waiting)) = take(&queue) {
                while !waiting.is_empty() {
                    let ended = self.boot(shape, &waiting).unwrap_or_else(|error| {
                        waiting
                            .iter()
                            .map(|scenario| {
                                Outcome::failed(scenario.name, 0.0, format!("{error:#}"))
                            })
                            .collect()
                    });
                    waiting.retain(|scenario| {
                        !ended
                            .iter()
                            .any(|outcome| outcome.scenario == scenario.name)
                    });
                    lock(&outcomes).extend(ended);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..jobs {
                scope.spawn(work);
            }
            work();
        });
        let mut outcomes = outcomes
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        outcomes.sort_by_key(|outcome| scenarios.iter().position(|s| s.name == outcome.scenario));
        outcomes
    }

    /// One L1. Answers with at least one outcome, so that a run ends.
    fn boot(&self, shape: Shape, scenarios: &[&Scenario]) -> anyhow::Result<Vec<Outcome>> {
        let number = self.boots.fetch_add(1, Ordering::Relaxed);
        let folder = BootFolder::create(self.folder.join(format!("boot-{number}")))?;
        self.programs.install(&folder.share().join("bin"))?;
        let request = Request {
            scenarios: scenarios
                .iter()
                .map(|scenario| scenario.name.to_owned())
                .collect(),
            limit_s: self.limit_s,
            artefacts: self.artefacts.in_l1.clone(),
        };
        fs::write(
            folder.share().join(REQUEST_FILE),
            serde_json::to_vec_pretty(&request)?,
        )?;
        let mut boot = Boot {
            runner: self,
            scenarios,
            running: None,
            outcomes: Vec::new(),
        };
        let mut l1 = L1::start(&self.artefacts, shape, &folder)?;
        let problem = boot.follow(&mut l1)?;
        drop(l1);
        if let Some(problem) = problem {
            boot.blame(&problem, &folder.console());
        }
        for outcome in &boot.outcomes {
            self.collect_logs(&folder, outcome)?;
        }
        if !self.keep {
            fs::remove_dir_all(&folder.path)
                .with_context(|| format!("cannot remove {}", folder.path.display()))?;
        }
        Ok(boot.outcomes)
    }

    /// Moves a scenario's logs out of the boot's share, with L1's console beside them.
    fn collect_logs(&self, folder: &BootFolder, outcome: &Outcome) -> anyhow::Result<()> {
        let target = self.folder.join(&outcome.scenario);
        let source = folder.share().join("logs").join(&outcome.scenario);
        if target.exists() {
            fs::remove_dir_all(&target)?;
        }
        if source.exists() {
            fs::rename(&source, &target)?;
        } else {
            fs::create_dir_all(&target)?;
        }
        fs::copy(folder.console(), target.join("l1-console.log"))
            .context("cannot copy L1's console")?;
        Ok(())
    }
}

/// One L1's progress.
struct Boot<'a> {
    runner: &'a Runner,
    scenarios: &'a [&'a Scenario],
    running: Option<(&'a Scenario, Instant)>,
    outcomes: Vec<Outcome>,
}

impl Boot<'_> {
    /// Reads events until L1 has ended; what went wrong with L1 itself, if anything.
    fn follow(&mut self, l1: &mut L1) -> anyhow::Result<Option<String>> {
        let mut deadline = Instant::now() + BOOT_LIMIT;
        let mut waiting_for = "its agent to start";
        let mut done = false;
        loop {
            match l1.next(deadline)? {
                Next::Ended(_) if done => return Ok(None),
                Next::Ended(status) => {
                    return Ok(Some(format!(
                        "L1 ended early ({})",
                        process::describe(status)
                    )));
                }
                // All verdicts are in; an L1 that cannot power off is killed.
                Next::Silence if done => return Ok(None),
                Next::Silence => {
                    return Ok(Some(format!(
                        "L1 was silent while the lab waited for {waiting_for}"
                    )));
                }
                Next::Event(event) => {
                    done |= event == Event::Done;
                    (deadline, waiting_for) = self.take(event);
                }
            }
        }
    }

    /// Notes an event; how long to wait for the next, and what for.
    fn take(&mut self, event: Event) -> (Instant, &'static str) {
        let mut limit = (STEP_LIMIT, "its next scenario");
        match event {
            Event::Boot { .. } | Event::Done => {}
            Event::Start { scenario } => {
                self.running = self
                    .scenarios
                    .iter()
                    .find(|s| s.name == scenario)
                    .map(|s| (*s, Instant::now()));
                if let Some((scenario, _)) = self.running {
                    // The agent ends a scenario at its limit; this is for a stuck L1.
                    limit = (
                        scenario.limit(self.runner.limit_s) + STEP_LIMIT,
                        "a scenario to end",
                    );
                }
            }
            Event::End {
                scenario,
                verdict,
                seconds,
                reason,
            } => {
                self.running = None;
                self.push(Outcome {
                    scenario,
                    verdict,
                    seconds,
                    reason,
                });
            }
        }
        (Instant::now() + limit.0, limit.1)
    }

    /// Puts a dead L1 on the scenario that ran, or, where none did, on the first
    /// that waits (and on all of them when nothing ran at all).
    fn blame(&mut self, problem: &str, console: &Path) {
        let reason = format!("{problem}; L1's console: {}", console.display());
        if let Some((scenario, started)) = self.running.take() {
            self.push(Outcome::failed(
                scenario.name,
                started.elapsed().as_secs_f64(),
                reason,
            ));
        } else if self.outcomes.is_empty() {
            for scenario in self.scenarios {
                self.push(Outcome::failed(scenario.name, 0.0, reason.clone()));
            }
        }
    }

    fn push(&mut self, outcome: Outcome) {
        println!("lab: {}", outcome.line());
        self.outcomes.push(outcome);
    }
}

/// Groups scenarios by shape; each shape's are dealt to up to `jobs` batches.
fn batches<'a>(scenarios: &[&'a Scenario], jobs: usize) -> VecDeque<Batch<'a>> {
    let mut queue = VecDeque::new();
    for shape in Shape::ALL {
        let of_shape: Vec<_> = scenarios
            .iter()
            .copied()
            .filter(|s| s.shape == shape)
            .collect();
        for first in 0..jobs.min(of_shape.len()) {
            queue.push_back((
                shape,
                of_shape.iter().copied().skip(first).step_by(jobs).collect(),
            ));
        }
    }
    queue
}

fn take<'a>(queue: &Mutex<VecDeque<Batch<'a>>>) -> Option<Batch<'a>> {
    lock(queue).pop_front()
}

/// A panic elsewhere does not make the outcomes wrong.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Whether every outcome is one that `make test-lab` may end well with.
#[must_use]
pub fn all_well(outcomes: &[Outcome], skips_allowed: bool) -> bool {
    outcomes.iter().all(|outcome| match outcome.verdict {
        Verdict::Pass => true,
        Verdict::Skip => skips_allowed,
        Verdict::Fail => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::scenarios::TABLE;

    #[test]
    fn batches_hold_every_scenario_once_and_one_shape_each() {
        let all: Vec<_> = TABLE.iter().collect();
        for jobs in [1, 2, 3, 100] {
            let queue = batches(&all, jobs);
            assert!(
                queue
                    .iter()
                    .all(|(shape, batch)| batch.iter().all(|s| s.shape == *shape))
            );
            let mut names: Vec<_> = queue
                .iter()
                .flat_map(|(_, batch)| batch)
                .map(|s| s.name)
                .collect();
            assert_eq!(names.len(), TABLE.len(), "{jobs} jobs");
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), TABLE.len(), "{jobs} jobs");
        }
    }

    #[test]
    fn a_skip_is_well_only_where_it_is_allowed() {
        let outcome = |verdict| Outcome {
            scenario: "x".into(),
            verdict,
            seconds: 0.0,
            reason: String::new(),
        };
        assert!(all_well(
            &[outcome(Verdict::Pass), outcome(Verdict::Skip)],
            true
        ));
        assert!(!all_well(
            &[outcome(Verdict::Pass), outcome(Verdict::Skip)],
            false
        ));
        assert!(!all_well(&[outcome(Verdict::Fail)], true));
    }
}
