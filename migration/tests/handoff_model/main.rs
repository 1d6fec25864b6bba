//! Every interleaving of a hand-off, over the state machines that the engine drives.
//!
//! The model adds what they cannot know: processes that are killed, a link that loses everything
//! from some point on, deadlines at any time, failing hosts, and a disk whose lock vanishes with
//! its holder. `docs/handoff.md` tells what is covered and what is not.

mod moves;
mod world;

use std::collections::HashSet;

use migration::handoff::{
    Awaited, DestinationAction, DestinationOutcome, Doubt, Mode, Outcome, SourceAction,
};
use stateright::{Checker, Model, Property};

use moves::{Move, Moves};
use world::{Stage, Who, World};

/// What may go wrong in a model.
#[derive(Clone, Copy, Debug)]
struct Hazards {
    crashes: bool,
    cuts: bool,
    deadlines: bool,
    failures: bool,
    stranger: bool,
    /// A fault put in on purpose.
    bug: Option<Bug>,
}

/// Faults that the model must notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    /// The source takes silence for a refusal.
    ResumesOnSilence,
    /// The destination does not take the disk.
    StartsUnclaimed,
    /// The destination locks the disk and does not look whether it was used since.
    ClaimsUnseen,
    /// The destination leaves no trace of having taken the disk.
    ClaimsUnmarked,
    /// The source takes a lock for a takeover.
    LockMeansTaken,
    /// The destination drops a VM that it owns because nobody heard its answer.
    DropsUnheard,
    /// The destination waits for Commit without end.
    WaitsForever,
}

const ALL: Hazards = Hazards {
    crashes: true,
    cuts: true,
    deadlines: true,
    failures: true,
    stranger: true,
    bug: None,
};

/// Only what has an answer in the protocol itself.
const CALM: Hazards = Hazards {
    crashes: false,
    cuts: false,
    deadlines: false,
    stranger: false,
    ..ALL
};

struct Handoff {
    mode: Mode,
    lockable: bool,
    hazards: Hazards,
}

const ONE_RUNS: &str = "at most one copy runs";
const ONE_EVER: &str = "only one side ever runs it";
const HOLDS: &str = "who runs holds the disk";
const SURRENDER: &str = "what is surrendered was taken over";
const POSSIBLE: &str = "no machine is told what it cannot take";
const ENDS: &str = "no side waits for ever";
const CALM_RUNS: &str = "undisturbed, exactly one runs";
const EARLY_CRASH: &str = "a destination that crashes before Commit costs nothing";
const REPORTED: &str = "no VM is lost unreported";

impl Handoff {
    fn at_rest(&self, world: &World) -> bool {
        Moves::of_sides(self.hazards, world).is_empty()
    }
}

fn outcome(world: &World) -> Option<Outcome> {
    match world.source.action {
        SourceAction::Finish(outcome) if world.source.alive => Some(outcome),
        _ => None,
    }
}

fn doubt(world: &World) -> Option<Doubt> {
    match outcome(world) {
        Some(Outcome::InDoubt(doubt)) => Some(doubt),
        Some(Outcome::Surrendered | Outcome::Resumed(_)) | None => None,
    }
}

/// A surviving process holds the VM paused and says so.
fn is_reported(world: &World) -> bool {
    let source = doubt(world).is_some() || world.source.action == SourceAction::Wait(Awaited::Link);
    let destination = matches!(
        world.destination.stage,
        Stage::Handoff(
            _,
            DestinationAction::Finish(DestinationOutcome::StartFailed)
                | DestinationAction::Wait(Awaited::Link)
        )
    );
    world.source.alive && source || world.destination.alive && destination
}

fn owner_crashed(world: &World) -> bool {
    if world.past.claimed {
        // Post-copy: it takes both.
        !world.destination.alive || world.mode == Mode::Postcopy && !world.source.alive
    } else {
        !world.source.alive
    }
}

fn runs(world: &World) -> bool {
    world.source.running || world.destination.running
}

impl Model for Handoff {
    type State = World;
    type Action = Move;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.mode, self.lockable)]
    }

    fn actions(&self, world: &World, moves: &mut Vec<Move>) {
        moves.extend(Moves::all(self.hazards, world));
    }

    fn next_state(&self, _: &World, action: Move) -> Option<World> {
        Some(action.world)
    }

    fn format_action(&self, action: &Move) -> String {
        action.name.to_owned()
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = Self::always();
        properties.extend(Self::at_rest_always());
        properties.extend(self.reachable());
        properties
    }
}

impl Handoff {
    /// What holds in every world.
    fn always() -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_RUNS, |_, w: &World| {
                !(w.source.running && w.destination.running)
            }),
            Property::always(ONE_EVER, |_, w: &World| !(w.past.resumed && w.past.ran)),
            Property::always(HOLDS, |_, w: &World| {
                let held = |who| !w.disk.lockable || w.disk.holder == Some(who) && !w.disk.taking;
                (!w.source.running || held(Who::Source))
                    && (!w.destination.running || held(Who::Destination))
            }),
            Property::always(SURRENDER, |_, w: &World| {
                outcome(w) != Some(Outcome::Surrendered) || w.past.claimed
            }),
            Property::always(POSSIBLE, |_, w: &World| !w.past.impossible),
        ]
    }

    /// What holds in every world in which neither side does anything more by itself.
    fn at_rest_always() -> Vec<Property<Self>> {
        vec![
            Property::always(ENDS, |model: &Self, w: &World| {
                let source = !w.source.alive
                    || matches!(
                        w.source.action,
                        // Paused without a link, and reported.
                        SourceAction::Finish(_) | SourceAction::Wait(Awaited::Link)
                    );
                let destination = !w.destination.alive
                    || match w.destination.stage {
                        Stage::Dropped => true,
                        Stage::Receiving => false,
                        Stage::Handoff(_, action) => matches!(
                            action,
                            DestinationAction::Finish(_) | DestinationAction::Wait(Awaited::Link)
                        ),
                    };
                source && destination || !model.at_rest(w)
            }),
            Property::always(CALM_RUNS, |model: &Self, w: &World| {
                let past = &w.past;
                let crashed = !w.source.alive || !w.destination.alive;
                let disturbed = crashed || past.cut || past.deadline || past.stuck || past.given_up;
                disturbed || runs(w) || !model.at_rest(w)
            }),
            Property::always(EARLY_CRASH, |model: &Self, w: &World| {
                let disturbed = w.past.stuck || w.past.given_up;
                let concerned = w.past.crashed_early && w.source.alive && !disturbed;
                // Without a lock it cannot be told from one that crashed after it.
                let doubt = !w.disk.lockable && is_reported(w);
                !concerned || w.source.running || doubt || !model.at_rest(w)
            }),
            Property::always(REPORTED, |model: &Self, w: &World| {
                let explained = owner_crashed(w) || w.past.given_up;
                runs(w) || is_reported(w) || explained || !model.at_rest(w)
            }),
        ]
    }

    /// The outcomes that there are.
    fn reachable(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::sometimes("surrendered", |_, w: &World| {
                outcome(w) == Some(Outcome::Surrendered) && w.destination.running
            }),
            Property::sometimes("resumed", |_, w: &World| {
                matches!(outcome(w), Some(Outcome::Resumed(_))) && w.source.running
            }),
            Property::sometimes("not started", |_, w: &World| {
                w.destination_outcome() == Some(DestinationOutcome::StartFailed)
            }),
            Property::sometimes("not resumed", |_, w: &World| {
                matches!(doubt(w), Some(Doubt::ResumeFailed(_)))
            }),
        ];
        if self.hazards.cuts {
            properties.push(Property::sometimes("in doubt", |_, w: &World| {
                matches!(doubt(w), Some(Doubt::PeerMayRun(_)))
            }));
        }
        if self.hazards.stranger && self.lockable {
            properties.push(Property::sometimes("disks missing", |_, w: &World| {
                matches!(doubt(w), Some(Doubt::DisksMissing(_)))
            }));
        }
        properties
    }
}

fn check(mode: Mode, lockable: bool, hazards: Hazards) {
    let model = Handoff {
        mode,
        lockable,
        hazards,
    };
    let checker = model.checker().threads(2).spawn_bfs().join();
    println!(
        "{mode:?}, lockable={lockable}: {} states, depth {}",
        checker.unique_state_count(),
        checker.max_depth()
    );
    checker.assert_properties();
}

#[test]
fn precopy_with_locks_keeps_one_copy() {
    check(Mode::Precopy, true, ALL);
}

#[test]
fn precopy_without_locks_keeps_one_copy() {
    check(Mode::Precopy, false, ALL);
}

#[test]
fn postcopy_with_locks_keeps_one_copy() {
    check(Mode::Postcopy, true, ALL);
}

#[test]
fn postcopy_without_locks_keeps_one_copy() {
    check(Mode::Postcopy, false, ALL);
}

#[test]
fn calm_hand_offs_need_no_deadline() {
    for mode in [Mode::Precopy, Mode::Postcopy] {
        for lockable in [true, false] {
            check(mode, lockable, CALM);
        }
    }
}

/// With "no side waits for ever", which looks at worlds at rest: nothing goes round in circles.
#[test]
fn every_path_ends() {
    for mode in [Mode::Precopy, Mode::Postcopy] {
        for lockable in [true, false] {
            let start = World::new(mode, lockable);
            let successors = |world: &World| {
                let moves = Moves::all(ALL, world).into_iter();
                moves.map(|step| step.world).collect::<Vec<_>>()
            };
            // Worlds on the present path, and worlds from which every path is known to end.
            let mut open = HashSet::from([start.clone()]);
            let mut done = HashSet::new();
            let mut path = vec![(successors(&start), start)];
            while let Some((todo, world)) = path.last_mut() {
                let Some(next) = todo.pop() else {
                    open.remove(world);
                    done.insert(world.clone());
                    path.pop();
                    continue;
                };
                assert!(!open.contains(&next), "comes back: {next:?}");
                if !done.contains(&next) {
                    open.insert(next.clone());
                    path.push((successors(&next), next));
                }
            }
        }
    }
}

/// Whether a model with this fault breaks this property.
fn is_noticed(bug: Bug, property: &'static str) -> bool {
    let model = Handoff {
        mode: Mode::Precopy,
        lockable: true,
        hazards: Hazards {
            bug: Some(bug),
            // No third process shall take the blame.
            stranger: false,
            ..ALL
        },
    };
    let checker = model.checker().spawn_bfs().join();
    let path = checker.discovery(property).map(|path| path.into_actions());
    println!("{bug:?} breaks \"{property}\": {path:?}");
    path.is_some()
}

#[test]
fn model_notices_a_source_that_resumes_on_silence() {
    assert!(is_noticed(Bug::ResumesOnSilence, ONE_RUNS));
}

#[test]
fn model_notices_a_destination_that_starts_without_the_disk() {
    assert!(is_noticed(Bug::StartsUnclaimed, ONE_RUNS));
}

#[test]
fn model_notices_a_destination_that_does_not_look_at_the_mark() {
    assert!(is_noticed(Bug::ClaimsUnseen, ONE_EVER));
}

#[test]
fn model_notices_a_destination_that_leaves_no_mark() {
    assert!(is_noticed(Bug::ClaimsUnmarked, ONE_EVER));
}

#[test]
fn model_notices_a_source_that_takes_a_lock_for_a_takeover() {
    assert!(is_noticed(Bug::LockMeansTaken, SURRENDER));
    assert!(is_noticed(Bug::LockMeansTaken, REPORTED));
}

#[test]
fn model_notices_a_destination_that_drops_what_it_owns() {
    assert!(is_noticed(Bug::DropsUnheard, REPORTED));
}

#[test]
fn model_notices_a_destination_that_waits_for_ever() {
    assert!(is_noticed(Bug::WaitsForever, ENDS));
}
