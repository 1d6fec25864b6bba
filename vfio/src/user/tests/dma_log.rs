//! A server's log of what it writes to guest memory.

use std::time::Instant;

use super::super::protocol::*;
use super::super::{Limits, UserFunction};
use super::hostile::{NAME, explain};
use super::script::*;
use super::{IMPATIENCE, PATIENCE, limits};
use crate::backend::{BackendError, RegionIndex, VfioBackend};
use crate::dma_log::DmaLog;
use crate::migration::MigrationState;

const K: u64 = 4096;

/// A device that logs, and has written these pages.
fn script(written: &[u64]) -> Script {
    Script {
        migration: Some(Migration {
            flags: MIGRATION_STOP_COPY,
            state: MigrationState::Running.number(),
            data: Vec::new(),
        }),
        dma_log: Some(DmaLogging {
            page_size: K,
            ranges_max: usize::MAX,
            written: written.iter().copied().collect(),
        }),
        ..Script::default()
    }
}

fn connect(script: Script) -> UserFunction {
    let (stream, _server) = script.start();
    UserFunction::from_stream(stream, NAME, limits(PATIENCE)).unwrap()
}

/// Of a function that has one.
fn log(function: &UserFunction) -> &dyn DmaLog {
    function.dma_log().expect("it logs")
}

#[test]
fn writes_are_reported_once() {
    let (stream, server) = script(&[0, 5 * K, 64 * K, 80 * K]).start();
    let function = UserFunction::from_stream(stream, NAME, limits(PATIENCE)).unwrap();
    assert!(log(&function).report(0, K, &mut [0]).is_err(), "it is off");
    let ranges = [(64 * K, 16 * K), (0, 16 * K), (16 * K, 16 * K)];
    log(&function).start(&ranges).unwrap();
    let mut bitmap = [0, 2, 4];
    log(&function).report(0, 80 * K, &mut bitmap).unwrap();
    assert_eq!(bitmap, [1 | (1 << 5), 2 | 1, 4]);
    let mut bitmap = [0; 2];
    log(&function).report(0, 80 * K, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0, 0]);
    log(&function).stop().unwrap();
    assert!(log(&function).report(0, K, &mut [0]).is_err(), "it is off");
    assert_eq!(function.lost(), None);
    drop(function);
    let seen = server.join().unwrap();
    assert_eq!(seen.logged, [[(0, 32 * K), (64 * K, 16 * K)]]);
    let reported = [(0, 32 * K), (64 * K, 16 * K)];
    assert_eq!(seen.reported, [reported, reported].concat());
}

#[test]
fn functions_without_it_are_told_by_their_answer() {
    let without_log = Script {
        dma_log: None,
        ..script(&[])
    };
    let without_migration = Script {
        migration: None,
        ..script(&[])
    };
    for script in [without_log, without_migration] {
        let function = connect(script);
        assert!(function.dma_log().is_none());
        assert_eq!(function.lost(), None);
    }
}

#[test]
fn servers_that_take_few_ranges_log_one() {
    let mut script = script(&[3 * K]);
    script.dma_log.as_mut().unwrap().ranges_max = 2;
    let (stream, server) = script.start();
    let function = UserFunction::from_stream(stream, NAME, limits(PATIENCE)).unwrap();
    log(&function)
        .start(&[(0, K), (2 * K, 2 * K), (8 * K, K)])
        .unwrap();
    let mut bitmap = [0];
    log(&function).report(0, 9 * K, &mut bitmap).unwrap();
    assert_eq!(bitmap, [1 << 3]);
    assert_eq!(function.lost(), None);
    drop(function);
    let seen = server.join().unwrap();
    let first = vec![(0, K), (2 * K, 2 * K), (8 * K, K)];
    assert_eq!(seen.logged, [first, vec![(0, 9 * K)]]);
}

/// Of a page of theirs all is asked for at once, lest the rest is forgotten.
#[test]
fn servers_choose_larger_pages() {
    let mut script = script(&[16 * K, 17 * K, 31 * K]);
    script.dma_log.as_mut().unwrap().page_size = 16 * K;
    let (stream, server) = script.start();
    let function = UserFunction::from_stream(stream, NAME, limits(PATIENCE)).unwrap();
    log(&function).start(&[(0, 64 * K)]).unwrap();
    let mut bitmaps = [[0], [0]];
    log(&function).report(17 * K, K, &mut bitmaps[0]).unwrap();
    log(&function).report(0, 64 * K, &mut bitmaps[1]).unwrap();
    assert_eq!(bitmaps, [[1], [(1 << 16) | (1 << 31)]]);
    drop(function);
    let seen = server.join().unwrap();
    assert_eq!(seen.reported, [(16 * K, 16 * K), (0, 64 * K)]);
}

#[test]
fn long_reports_come_in_parts_that_the_server_sends() {
    let version = Version {
        capabilities: Capabilities {
            max_data_xfer_size: 24,
            ..Version::ours().capabilities
        },
        ..Version::ours()
    };
    let (stream, server) = Script {
        fault: Some((Command::Version, 0, Fault::Payload(version.encode()))),
        ..script(&[0, 192 * K, 499 * K])
    }
    .start();
    let function = UserFunction::from_stream(stream, NAME, limits(PATIENCE)).unwrap();
    log(&function).start(&[(0, 1000 * K)]).unwrap();
    let mut bitmap = [0; 8];
    log(&function).report(0, 500 * K, &mut bitmap).unwrap();
    assert_eq!(bitmap, [1, 0, 0, 1, 0, 0, 0, 1 << 51]);
    drop(function);
    let seen = server.join().unwrap();
    let parts = [(0, 192 * K), (192 * K, 192 * K), (384 * K, 116 * K)];
    assert_eq!(seen.reported, parts);
}

#[test]
fn a_report_that_is_refused_ends_the_log_and_nothing_else() {
    let function = connect(Script {
        fault: Some((Command::DeviceFeature, 3, Fault::Refuse(5))),
        ..script(&[0])
    });
    log(&function).start(&[(0, K)]).unwrap();
    let refused = log(&function).report(0, K, &mut [0]).unwrap_err();
    assert!(explain(&refused).contains("DEVICE_FEATURE"), "{refused}");
    assert!(log(&function).report(0, K, &mut [0]).is_err());
    log(&function).stop().unwrap();
    log(&function).start(&[(0, K)]).unwrap();
    log(&function).report(0, K, &mut [0]).unwrap();
    assert_eq!(function.lost(), None);
    function.read(RegionIndex::Config, 0, &mut [0; 4]).unwrap();
}

fn control(flags: u32, page_size: u64, num_ranges: u32) -> Fault {
    let control = LoggingControl {
        argsz: 40,
        flags,
        page_size,
        num_ranges,
        reserved: 0,
    };
    Fault::Payload(control.encode(&[0; 16]))
}

/// What a report of two pages at 0 is answered with.
fn report(change: fn(&mut LoggingReport), bits: &[u8]) -> Fault {
    let mut report = LoggingReport {
        argsz: 40,
        flags: REPORT,
        iova: 0,
        length: 2 * K,
        page_size: K,
    };
    change(&mut report);
    Fault::Payload(report.encode(bits))
}

const START: u32 = FEATURE_SET | FEATURE_DMA_LOGGING_START;
const REPORT: u32 = FEATURE_GET | FEATURE_DMA_LOGGING_REPORT;

#[test]
fn nonsense_ends_the_connection() {
    let stop = |flags| Fault::Payload(Feature { argsz: 8, flags }.encode(&[]));
    let bits = [3, 0, 0, 0, 0, 0, 0, 0];
    // Questions before: what the device can do, and whether it logs.
    for (at, fault, expected) in [
        (2, control(REPORT, K, 1), "which feature it answers for"),
        (2, control(START, 0, 1), "pages that it logs is 0x0"),
        (2, control(START, 5000, 1), "pages that it logs is 0x1388"),
        (2, control(START, K, 2), "number of ranges is 0x2"),
        (2, Fault::Payload(vec![0; 23]), "it has 23 bytes, not 24"),
        (2, Fault::Payload(vec![0; 41]), "a message's size is 0x39"),
        (2, Fault::Close, ""),
        (3, report(|_| {}, &bits[..7]), "it has 39 bytes, not 40"),
        (3, report(|_| {}, &[]), "it has 32 bytes, not 40"),
        (3, report(|_| {}, &[0; 16]), "a message's size is 0x40"),
        (
            3,
            report(|_| {}, &[4, 0, 0, 0, 0, 0, 0, 0]),
            "not asked for is 0x4",
        ),
        (
            3,
            report(|_| {}, &[0, 0, 0, 0, 0, 0, 0, 128]),
            "not asked for",
        ),
        (
            3,
            report(|report| report.flags = START, &bits),
            "which feature",
        ),
        (
            3,
            report(|report| report.iova = K, &bits),
            "address is 0x1000",
        ),
        (
            3,
            report(|report| report.length = K, &bits),
            "length is 0x1000",
        ),
        (
            3,
            report(|report| report.page_size = 1, &bits),
            "page size is 0x1",
        ),
        (3, Fault::Payload(vec![0; 31]), "it has 31 bytes, not 32"),
        (4, stop(0), "which feature it answers for is 0x0"),
        (4, Fault::Payload(vec![0; 7]), "it has 7 bytes, not 8"),
        (4, Fault::Payload(vec![0; 9]), "a message's size is 0x19"),
    ] {
        let label = format!("{at} {fault:?}");
        let function = connect(Script {
            fault: Some((Command::DeviceFeature, at, fault)),
            ..script(&[])
        });
        let log = log(&function);
        let used = log
            .start(&[(0, 2 * K)])
            .and_then(|()| log.report(0, 2 * K, &mut [0]))
            .and_then(|()| log.stop());
        let error = used.expect_err(&label);
        assert!(matches!(error, BackendError::Server(_)), "{label}: {error}");
        let message = explain(&error);
        assert!(message.contains(expected), "{label}: {message}");
        assert!(function.lost().is_some(), "{label}");
    }
    let (stream, _server) = Script {
        fault: Some((Command::DeviceFeature, 1, stop(START))),
        ..script(&[])
    }
    .start();
    let error = UserFunction::from_stream(stream, NAME, limits(PATIENCE)).err();
    let message = explain(&error.unwrap());
    assert!(
        message.contains("which feature it answers for"),
        "{message}"
    );
}

/// Pages that are too large to be of use are no breach of the protocol.
#[test]
fn pages_that_are_too_large_are_not_logged_by() {
    let mut script = script(&[]);
    script.dma_log.as_mut().unwrap().page_size = 1 << 63;
    let function = connect(script);
    assert!(log(&function).start(&[(0, K)]).is_err());
    assert_eq!(function.lost(), None);
}

/// A device may take its time to begin; a report is there at once.
#[test]
fn silent_servers_have_their_time_and_no_more() {
    let silent_at = |at, limits| {
        let (stream, _server) = Script {
            fault: Some((Command::DeviceFeature, at, Fault::Silence)),
            ..script(&[])
        }
        .start();
        UserFunction::from_stream(stream, NAME, limits)
    };
    let quick_reset = Limits {
        reset: IMPATIENCE,
        ..limits(PATIENCE)
    };
    let quick_reply = Limits {
        reply: IMPATIENCE,
        ..limits(PATIENCE)
    };
    let begin = Instant::now();
    assert!(silent_at(1, quick_reply).is_err(), "a question");
    let function = silent_at(2, quick_reset).unwrap();
    assert!(log(&function).start(&[(0, K)]).is_err());
    assert!(function.lost().is_some());
    let function = silent_at(3, quick_reply).unwrap();
    log(&function).start(&[(0, K)]).unwrap();
    assert!(log(&function).report(0, K, &mut [0]).is_err());
    assert!(function.lost().is_some());
    assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
}
