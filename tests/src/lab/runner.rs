//! Runs scenarios: as many as possible per L1, and an L1 that dies or hangs costs
//! one scenario, not the rest.

use std::collections::VecDeque;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context;

use super::artefacts::Artefacts;
use super::boot::{Boot, Ended};
use super::l1::{BootFolder, L1};
use super::options::Options;
use super::programs::Programs;
use super::protocol::{REQUEST_FILE, Request, Verdict};
use super::report::Outcome;
use super::scenario::Scenario;
use super::shape::Shape;

/// Everything that the boots of one run share.
#[derive(Debug)]
pub struct Runner {
    artefacts: Artefacts,
    programs: Programs,
    folder: PathBuf,
    limit_s: Option<u64>,
    moves: Option<u32>,
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
        Self {
            artefacts,
            programs,
            folder,
            limit_s: options.limit_s,
            moves: options.moves,
            keep: options.keep,
            boots: AtomicUsize::new(0),
        }
    }

    /// Runs `scenarios` on `jobs` L1 machines at a time; the outcomes come in the
    /// order of `scenarios`.
    pub fn run(&self, scenarios: &[&Scenario], jobs: usize) -> Vec<Outcome> {
        let queue = Mutex::new(batches(scenarios, jobs));
        let outcomes = Mutex::new(Vec::new());
        let work = || {
            while let Some((shape, waiting)) = take(&queue) {
                let ended = self.run_batch(shape, waiting);
                lock(&outcomes).extend(ended);
            }
        };
        // A QEMU dies with the thread that started it: each thread waits for its own.
        std::thread::scope(|scope| {
            for _ in 1..jobs {
                scope.spawn(work);
            }
            work();
        });
        let mut outcomes = outcomes
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        outcomes.sort_by_key(|outcome| scenarios.iter().position(|s| s.name == outcome.scenario));
        outcomes
    }

    /// Boots L1 as often as it takes to run all of `waiting`.
    fn run_batch(&self, shape: Shape, mut waiting: Vec<&Scenario>) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = Vec::new();
        while !waiting.is_empty() {
            match self.boot(shape, &waiting) {
                Ok(ended) => outcomes.extend(ended),
                Err(error) => {
                    let fail = |s: &&Scenario| Outcome::failed(s.name, 0.0, format!("{error:#}"));
                    outcomes.extend(waiting.iter().map(fail));
                }
            }
            waiting.retain(|scenario| outcomes.iter().all(|o| o.scenario != scenario.name));
        }
        outcomes
    }

    /// One L1; how the scenarios that it ran ended.
    fn boot(&self, shape: Shape, scenarios: &[&Scenario]) -> anyhow::Result<Vec<Outcome>> {
        let number = self.boots.fetch_add(1, Ordering::Relaxed);
        let folder = BootFolder::create(self.folder.join(format!("boot-{number}")), shape)?;
        self.programs.install(&folder.share().join("bin"))?;
        let request = Request {
            scenarios: scenarios.iter().map(|s| s.name.to_owned()).collect(),
            limit_s: self.limit_s,
            moves: self.moves,
            artefacts: self.artefacts.in_l1.clone(),
        };
        fs::write(
            folder.share().join(REQUEST_FILE),
            serde_json::to_vec_pretty(&request)?,
        )?;
        let boot = Boot::new(scenarios, self.limit_s, folder.console());
        let mut l1 = L1::start(&self.artefacts, shape, &folder)?;
        let ended = boot.follow(&mut l1)?;
        drop(l1);
        for ended in &ended {
            self.collect_logs(&folder, ended)?;
        }
        if !self.keep {
            fs::remove_dir_all(&folder.path)
                .with_context(|| format!("cannot remove {}", folder.path.display()))?;
        }
        Ok(ended.into_iter().map(|ended| ended.outcome).collect())
    }

    /// Moves a scenario's logs out of the boot's share, with L1's console beside
    /// them, and QEMU's messages where L1 itself may have failed.
    fn collect_logs(&self, folder: &BootFolder, ended: &Ended) -> anyhow::Result<()> {
        let name = &ended.outcome.scenario;
        let target = self.folder.join(name);
        let source = folder.share().join("logs").join(name);
        if target.exists() {
            fs::remove_dir_all(&target)?;
        }
        if source.exists() {
            fs::rename(&source, &target)?;
        } else {
            fs::create_dir_all(&target)?;
            fs::copy(folder.qemu_log(), target.join("qemu.log"))?;
        }
        fs::write(target.join("l1-console.log"), &ended.console)
            .context("cannot write L1's console")
    }
}

/// Groups scenarios by shape; each shape's are dealt to up to `jobs` batches.
fn batches<'a>(scenarios: &[&'a Scenario], jobs: usize) -> VecDeque<Batch<'a>> {
    let mut queue = VecDeque::new();
    for shape in Shape::ALL {
        let of_shape = || scenarios.iter().copied().filter(|s| s.shape == shape);
        for first in 0..jobs.min(of_shape().count()) {
            queue.push_back((shape, of_shape().skip(first).step_by(jobs).collect()));
        }
    }
    queue
}

fn take<'a>(queue: &Mutex<VecDeque<Batch<'a>>>) -> Option<Batch<'a>> {
    lock(queue).pop_front()
}

/// A panic elsewhere does not make the outcomes wrong.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether every scenario passed, or was skipped where that is allowed.
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
            let one_shape = |(shape, batch): &Batch<'_>| batch.iter().all(|s| s.shape == *shape);
            assert!(queue.iter().all(one_shape));
            let batches = queue.iter().flat_map(|(_, batch)| batch);
            let mut names: Vec<_> = batches.map(|s| s.name).collect();
            assert_eq!(names.len(), TABLE.len(), "{jobs} jobs");
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), TABLE.len(), "{jobs} jobs");
        }
    }

    #[test]
    fn a_skip_is_well_only_where_it_is_allowed() {
        let outcome = |verdict| Outcome {
            verdict,
            ..Outcome::failed("x", 0.0, String::new())
        };
        let (pass, skip) = (outcome(Verdict::Pass), outcome(Verdict::Skip));
        assert!(all_well(&[pass.clone(), skip.clone()], true));
        assert!(!all_well(&[pass, skip], false));
        assert!(!all_well(&[outcome(Verdict::Fail)], true));
    }
}
