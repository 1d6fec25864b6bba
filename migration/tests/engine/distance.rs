//! A destination that is far away, and a state that takes its time.

use std::time::Duration;

use migration::handoff::Outcome;
use migration::source::{OnTimeout, SourceError};
use migration::testing::Wire;

use crate::good::write_at_every_harvest;
use crate::world::{Wiring, World, new_handle};

const ONE_WAY: Duration = Duration::from_millis(20);
const ROUND_TRIP: Duration = Duration::from_millis(40);

/// Each way takes its time; a connection is there after one there and back.
fn far() -> Wiring {
    let mut wiring = Wiring::clean();
    let wire = || Wire {
        latency: ONE_WAY,
        ..Wire::default()
    };
    wiring.control = (wire(), wire());
    wiring.pause = ROUND_TRIP;
    wiring
}

#[test]
fn the_predicted_blackout_counts_the_answers() {
    let mut world = World::small(true);
    world.write_at_first_harvest();
    let end = world.migrate(&far());
    world.check(&end, "far away");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    let predicted = end.report.predicted_blackout.expect("a prediction");
    let blackout = Duration::from_micros(end.report.blackout.expect("it stood still").total_us);
    assert!(blackout >= 2 * ROUND_TRIP, "{blackout:?}");
    assert!(predicted >= 2 * ROUND_TRIP, "{predicted:?}");
    // Other work on this machine makes an answer late, but not each of them.
    assert!(predicted < 4 * ROUND_TRIP, "{predicted:?}");
}

#[test]
fn a_downtime_below_the_answers_time_is_refused_with_that_reason() {
    let mut world = World::small(true);
    world.handle = new_handle(ROUND_TRIP);
    write_at_every_harvest(world.guest());
    let end = world.migrate(&far());
    world.check(&end, "too far away");
    let error = end.report.error.unwrap();
    assert!(matches!(error, SourceError::Distance { .. }), "{error}");
    let words = error.to_string();
    assert!(
        words.starts_with("a downtime of 40 ms cannot be kept"),
        "{words}"
    );
    // It does not come nearer when the guest is slow, nor with time.
    assert!(world.machine.throttled.is_empty());
    assert!(end.took < Duration::from_secs(5), "{:?}", end.took);
    world.retry("too far away");
}

#[test]
fn a_forced_switchover_takes_place_however_far_it_is() {
    let mut world = World::small(true);
    world.handle = new_handle(ROUND_TRIP);
    world.options.on_timeout = OnTimeout::Force;
    world.options.timeout = Duration::from_millis(300);
    write_at_every_harvest(world.guest());
    let end = world.migrate(&far());
    world.check(&end, "forced, far away");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert!(world.machine.throttled.is_empty());
}

#[test]
fn the_predicted_blackout_counts_the_state() {
    for state_time in [Duration::ZERO, Duration::from_millis(150)] {
        let mut world = World::small(true);
        world.machine.state_time = state_time;
        let end = world.migrate(&Wiring::clean());
        world.check(&end, "a large state");
        assert_eq!(end.report.outcome, Outcome::Surrendered);
        let predicted = end.report.predicted_blackout.expect("a prediction");
        let beyond = predicted.checked_sub(state_time).expect("it is counted");
        assert!(beyond < Duration::from_millis(100), "{predicted:?}");
    }
}

#[test]
fn a_downtime_below_the_states_time_is_refused_with_that_reason() {
    let mut world = World::small(true);
    world.machine.state_time = Duration::from_millis(40);
    world.handle = new_handle(Duration::from_millis(20));
    write_at_every_harvest(world.guest());
    let end = world.migrate(&Wiring::clean());
    world.check(&end, "a large state");
    let error = end.report.error.unwrap();
    assert!(matches!(error, SourceError::State { .. }), "{error}");
    let words = error.to_string();
    assert!(
        words.starts_with("a downtime of 20 ms cannot be kept: stopping the VM, and saving"),
        "{words}"
    );
    assert!(world.machine.throttled.is_empty());
    world.machine.state_time = Duration::ZERO;
    world.retry("a large state");
}
