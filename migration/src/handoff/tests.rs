//! Paths by hand. `tests/handoff_model.rs` takes all of them.

use super::*;
use crate::ports::Reclaim;

use DestinationEvent as D;
use SourceEvent as S;

const MARK: Mark = Mark(7);

/// The last action after these events.
fn source(mode: Mode, events: &[SourceEvent]) -> SourceAction {
    let (mut handoff, mut action) = SourceHandoff::begin(mode);
    for event in events {
        action = handoff.step(*event).unwrap();
    }
    action
}

fn destination(mode: Mode, events: &[DestinationEvent]) -> DestinationAction {
    let (mut handoff, mut action) = DestinationHandoff::begin(mode);
    for event in events {
        action = handoff.step(*event).unwrap();
    }
    action
}

const COMMITTED: [SourceEvent; 4] = [
    S::Sent,
    S::Received(Message::Prepared),
    S::Released(MARK),
    S::Sent,
];

fn after_commit(mode: Mode, events: &[SourceEvent]) -> SourceAction {
    source(mode, &[&COMMITTED[..], events].concat())
}

fn resumed(reason: Reason) -> SourceAction {
    SourceAction::Finish(Outcome::Resumed(reason))
}

#[test]
fn an_undisturbed_hand_off_surrenders_and_starts() {
    assert_eq!(
        after_commit(Mode::Precopy, &[S::Received(Message::Committed)]),
        SourceAction::Finish(Outcome::Surrendered)
    );
    let events = [
        D::Restored,
        D::Sent,
        D::Received(Message::Commit(MARK)),
        D::Claimed,
        D::Sent,
    ];
    assert_eq!(
        destination(Mode::Precopy, &events),
        DestinationAction::Start
    );
    let events = [&events[..], &[D::Started]].concat();
    assert_eq!(
        destination(Mode::Precopy, &events),
        DestinationAction::Finish(DestinationOutcome::Started)
    );
}

#[test]
fn source_resumes_first_and_tells_then() {
    let events = [S::Sent, S::Cancel, S::Resumed];
    assert_eq!(source(Mode::Precopy, &events[..2]), SourceAction::Resume);
    assert_eq!(
        source(Mode::Precopy, &events),
        SourceAction::Send(Message::Abort(Cause::Cancelled))
    );
    let events = [&events[..], &[S::LinkLost]].concat();
    assert_eq!(
        source(Mode::Precopy, &events),
        resumed(Reason::Here(Cause::Cancelled))
    );
}

#[test]
fn silence_after_commit_is_settled_by_the_locks() {
    let lost = |reclaim| after_commit(Mode::Precopy, &[S::LinkLost, S::Reclaim(reclaim)]);
    assert_eq!(lost(Reclaim::Reclaimed), SourceAction::Resume);
    assert_eq!(
        lost(Reclaim::HeldByPeer),
        SourceAction::Finish(Outcome::Surrendered)
    );
    assert_eq!(
        lost(Reclaim::Unknown),
        SourceAction::Finish(Outcome::InDoubt(Doubt::PeerMayRun(Reason::LinkLost)))
    );
}

#[test]
fn a_destination_that_declines_is_believed_where_nothing_can_be_locked() {
    for message in [
        Message::Declined(Cause::ClaimFailed),
        Message::Abort(Cause::ClaimFailed),
    ] {
        let events = [
            S::Received(message),
            S::Reclaim(Reclaim::Unknown),
            S::Resumed,
        ];
        assert_eq!(
            after_commit(Mode::Precopy, &events),
            resumed(Reason::Peer(Cause::ClaimFailed))
        );
    }
    // But not against a lock.
    let events = [
        S::Received(Message::Declined(Cause::ClaimFailed)),
        S::Reclaim(Reclaim::HeldByPeer),
    ];
    assert_eq!(
        after_commit(Mode::Precopy, &events),
        SourceAction::Finish(Outcome::InDoubt(Doubt::DisksMissing(Reason::Peer(
            Cause::ClaimFailed
        ))))
    );
}

#[test]
fn a_commit_that_was_not_begun_can_be_cancelled() {
    let events = [
        &COMMITTED[..3],
        &[S::Cancel, S::Reclaim(Reclaim::Unknown), S::Resumed, S::Sent],
    ]
    .concat();
    assert_eq!(
        source(Mode::Precopy, &events),
        resumed(Reason::Here(Cause::Cancelled))
    );
    // Once sent, cancelling changes nothing.
    assert_eq!(
        after_commit(Mode::Precopy, &[S::Cancel]),
        SourceAction::Wait(Awaited::Committed)
    );
}

#[test]
fn a_link_that_breaks_under_the_commit_is_read_to_its_end() {
    let events = [&COMMITTED[..3], &[S::LinkLost]].concat();
    assert_eq!(
        source(Mode::Precopy, &events),
        SourceAction::Wait(Awaited::Committed)
    );
    let abort = S::Received(Message::Abort(Cause::Deadline));
    let events = [&events[..], &[abort, S::Reclaim(Reclaim::Unknown)]].concat();
    assert_eq!(source(Mode::Precopy, &events), SourceAction::Resume);
}

#[test]
fn messages_out_of_place_never_run_two_copies() {
    for message in [
        Message::Prepare,
        Message::Commit(MARK),
        Message::Committed,
        Message::Complete,
    ] {
        assert_eq!(
            source(Mode::Precopy, &[S::Sent, S::Received(message)]),
            SourceAction::Resume
        );
    }
    for message in [Message::Prepare, Message::Prepared, Message::Complete] {
        assert_eq!(
            after_commit(Mode::Precopy, &[S::Received(message)]),
            SourceAction::Reclaim
        );
    }
    assert_eq!(
        destination(
            Mode::Precopy,
            &[D::Restored, D::Sent, D::Received(Message::Committed)]
        ),
        DestinationAction::Send(Message::Abort(Cause::Protocol))
    );
}

#[test]
fn an_event_that_answers_nothing_is_refused_and_changes_nothing() {
    let (mut handoff, _) = SourceHandoff::begin(Mode::Precopy);
    let before = handoff;
    assert!(handoff.step(S::Resumed).is_err());
    assert!(handoff.step(S::Reclaim(Reclaim::Reclaimed)).is_err());
    assert_eq!(handoff, before);
    assert!(handoff.may_give_up());
    let (mut handoff, _) = DestinationHandoff::begin(Mode::Precopy);
    let error = handoff.step(D::Claimed).unwrap_err();
    assert_eq!(
        error.to_string(),
        "event Claimed cannot come in hand-off state Restoring"
    );
}

#[test]
fn post_copy_survives_a_cut_link() {
    let mode = Mode::Postcopy;
    let events = [S::Received(Message::Committed), S::LinkLost, S::Linked];
    assert_eq!(
        after_commit(mode, &events[..2]),
        SourceAction::Wait(Awaited::Link)
    );
    assert_eq!(after_commit(mode, &events), SourceAction::Serve);
    let pulling = [
        D::Restored,
        D::Sent,
        D::Received(Message::Commit(MARK)),
        D::Claimed,
        D::Sent,
        D::Started,
        D::LinkLost,
    ];
    assert_eq!(destination(mode, &pulling), DestinationAction::Pause);
    let events = [&pulling[..], &[D::Paused, D::Linked, D::Started]].concat();
    assert_eq!(destination(mode, &events), DestinationAction::Pull);
    let events = [&events[..], &[D::PagesComplete, D::Sent]].concat();
    assert_eq!(
        destination(mode, &events),
        DestinationAction::Finish(DestinationOutcome::Started)
    );
}
