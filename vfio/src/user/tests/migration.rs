//! A server's migration interface.

use std::time::Instant;

use super::super::protocol::*;
use super::super::{Limits, UserFunction};
use super::hostile::{NAME, explain};
use super::script::*;
use super::{IMPATIENCE, PATIENCE, limits};
use crate::backend::{BackendError, VfioBackend};
use crate::migration::{MigrationFeatures, MigrationState, TransitionError, go_to};

fn script(flags: u64) -> Script {
    Script {
        migration: Some(Migration {
            flags,
            state: MigrationState::Running.number(),
            data: (0..100).collect(),
        }),
        ..Script::default()
    }
}

fn connect(script: Script) -> UserFunction {
    let (stream, _server) = script.start();
    UserFunction::from_stream(stream, NAME, limits(PATIENCE)).unwrap()
}

#[test]
fn states_are_taken_and_given() {
    let function = connect(script(MIGRATION_STOP_COPY | MIGRATION_PRE_COPY));
    let device = function.migration().unwrap();
    let features = MigrationFeatures {
        p2p: false,
        pre_copy: true,
    };
    assert_eq!(device.features(), features);
    assert_eq!(device.state().unwrap(), MigrationState::Running);
    go_to(device, MigrationState::PreCopy).unwrap();
    let read_all = || {
        let (mut state, mut part) = (Vec::<u8>::new(), [0; 7]);
        loop {
            match device.read_data(&mut part).unwrap() {
                0 => return state,
                count => state.extend(&part[..count]),
            }
        }
    };
    assert_eq!(read_all(), (0..100).collect::<Vec<u8>>());
    go_to(device, MigrationState::StopCopy).unwrap();
    assert_eq!(device.state().unwrap(), MigrationState::StopCopy);
    assert!(read_all().is_empty());
    go_to(device, MigrationState::Resuming).unwrap();
    // More than goes into one message.
    let state: Vec<u8> = (0..3 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
    device.write_data(&state).unwrap();
    let mut part = vec![0; state.len()];
    let mut read = 0;
    while read < state.len() {
        read += device.read_data(&mut part[read..]).unwrap();
    }
    assert!(part == state);
    let unknown = device.data_size().unwrap_err();
    assert!(matches!(unknown, BackendError::Refused { .. }), "{unknown}");
    assert_eq!(function.lost(), None);
}

#[test]
fn a_server_may_say_as_vfio_does_that_there_is_nothing_at_present() {
    let says = |errno| Script {
        fault: Some((Command::MigDataRead, 0, Fault::Refuse(errno))),
        ..script(MIGRATION_STOP_COPY | MIGRATION_PRE_COPY)
    };
    let read = |script| {
        let function = connect(script);
        let device = function.migration().unwrap();
        go_to(device, MigrationState::PreCopy).unwrap();
        let read = device.read_data(&mut [0; 7]);
        assert_eq!(function.lost(), None);
        read
    };
    const ENOMSG: u32 = 42;
    assert_eq!(read(says(ENOMSG)).unwrap(), 0);
    let error = read(says(5)).unwrap_err();
    assert!(matches!(error, BackendError::Refused { .. }), "{error}");
}

#[test]
fn functions_without_it_are_told_by_their_answer() {
    for script in [Script::default(), script(0), script(MIGRATION_PRE_COPY)] {
        let function = connect(script);
        assert!(function.migration().is_none());
        assert_eq!(function.lost(), None);
    }
}

/// Some servers end at a question that they do not know.
#[test]
fn servers_of_older_versions_are_not_asked() {
    let older = Version {
        minor: 0,
        ..Version::ours()
    };
    let script = Script {
        fault: Some((Command::Version, 0, Fault::Payload(older.encode()))),
        ..script(MIGRATION_STOP_COPY)
    };
    let (stream, server) = script.start();
    let function = UserFunction::from_stream(stream, NAME, limits(PATIENCE)).unwrap();
    assert!(function.migration().is_none());
    drop(function);
    let requests = server.join().unwrap().requests;
    assert!(!requests.contains(&Command::DeviceFeature), "{requests:?}");
}

#[test]
fn a_state_that_is_refused_is_told_with_where_the_device_is() {
    let refuse = Some((Command::DeviceFeature, 3, Fault::Refuse(5)));
    let function = connect(Script {
        fault: refuse,
        ..script(MIGRATION_STOP_COPY)
    });
    let error = go_to(function.migration().unwrap(), MigrationState::StopCopy).unwrap_err();
    // This server has gone there all the same.
    assert_eq!(
        error.to_string(),
        "the device does not go from RUNNING to STOP, and is in STOP"
    );
    assert!(matches!(error, TransitionError::Arc { .. }), "{error:?}");
    assert_eq!(function.lost(), None);
}

/// Takes and gives a state, as far as the server lets it.
fn use_all(function: &UserFunction) -> Result<(), BackendError> {
    let device = function.migration().unwrap();
    device.state()?;
    device.take_arc(MigrationState::Stop)?;
    device.take_arc(MigrationState::StopCopy)?;
    device.read_data(&mut [0; 16])?;
    device.write_data(&[0; 16])
}

#[test]
fn nonsense_ends_the_connection() {
    let value = |flags, value| {
        let argsz = 16;
        Fault::Payload(
            FeatureValue {
                argsz,
                flags,
                value,
            }
            .encode(&[]),
        )
    };
    let data = |size, bytes: usize| {
        let argsz = 8;
        Fault::Payload(MigData { argsz, size }.encode(&vec![0; bytes]))
    };
    let state = FEATURE_GET | FEATURE_MIG_DEVICE_STATE;
    // The first questions are what the device can do, and whether it logs its writes.
    for (command, at, fault, expected) in [
        (Command::DeviceFeature, 2, value(state, 8), "state is 0x8"),
        (Command::DeviceFeature, 2, value(state, 5), "state is 0x5"),
        (Command::DeviceFeature, 2, value(0, 2), "answers for is 0x0"),
        (
            Command::DeviceFeature,
            3,
            Fault::Payload(vec![0; 15]),
            "it has 15 bytes",
        ),
        (
            Command::MigDataRead,
            0,
            data(15, 16),
            "it has 24 bytes, not 23",
        ),
        (
            Command::MigDataRead,
            0,
            data(u32::MAX, 16),
            "it has 24 bytes",
        ),
        (Command::MigDataRead, 0, data(17, 17), "size is 0x29"),
        (
            Command::MigDataRead,
            0,
            Fault::Payload(vec![0; 7]),
            "it has 7 bytes",
        ),
        (
            Command::MigDataWrite,
            0,
            Fault::Payload(vec![0; 64]),
            "size is 0x50",
        ),
        (Command::MigDataWrite, 0, Fault::Close, ""),
    ] {
        let label = format!("{command:?} {fault:?}");
        let function = connect(Script {
            fault: Some((command, at, fault)),
            ..script(MIGRATION_STOP_COPY)
        });
        let error = use_all(&function).expect_err(&label);
        assert!(matches!(error, BackendError::Server(_)), "{label}: {error}");
        let message = explain(&error);
        assert!(message.contains(expected), "{label}: {message}");
        assert!(function.lost().is_some(), "{label}");
    }
    let (stream, _server) = Script {
        fault: Some((Command::DeviceFeature, 0, value(0, 1))),
        ..script(MIGRATION_STOP_COPY)
    }
    .start();
    let error = UserFunction::from_stream(stream, NAME, limits(PATIENCE)).err();
    let message = explain(&error.unwrap());
    assert!(
        message.contains("which feature it answers for"),
        "{message}"
    );
}

/// A question is answered at once; a device may take its time to stop.
#[test]
fn silent_servers_have_their_time_and_no_more() {
    let limits = Limits {
        reply: IMPATIENCE,
        ..limits(PATIENCE)
    };
    let silent_at = |at| Script {
        fault: Some((Command::DeviceFeature, at, Fault::Silence)),
        ..script(MIGRATION_STOP_COPY)
    };
    let begin = Instant::now();
    let (stream, _server) = silent_at(0).start();
    assert!(UserFunction::from_stream(stream, NAME, limits).is_err());
    assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
    let limits = Limits {
        reply: PATIENCE,
        reset: IMPATIENCE,
        ..limits
    };
    let (stream, _server) = silent_at(2).start();
    let function = UserFunction::from_stream(stream, NAME, limits).unwrap();
    let begin = Instant::now();
    let stopped = function.migration().unwrap().take_arc(MigrationState::Stop);
    assert!(
        matches!(stopped, Err(BackendError::Server(_))),
        "{stopped:?}"
    );
    assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
}
