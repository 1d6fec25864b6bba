use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use super::*;
use crate::bitmap::DirtyBitmap;
use crate::codec::{Encoder, Encoding};
use crate::page::{PageIndex, PageRun};
use crate::ports::{Channel, DirtyTracker, PageStore};
use crate::wire::Message;

const PAGE: usize = 4096;

#[test]
fn frames_are_counted_with_their_raw_pages() {
    let mut encoder = Encoder::new(0);
    let run = PageRun::new(PageIndex(0), 2).unwrap();
    let noise: Vec<u8> = (0..2 * PAGE)
        .map(|at| ((at * at) >> 3).to_le_bytes()[0])
        .collect();
    let mut frame = Vec::new();
    let (_, raw) = encoder.encode(run.start, (&[run], &noise), &[], Encoding::Raw, &mut frame);
    raw.into_iter()
        .for_each(|range| frame.extend_from_slice(&noise[range]));
    assert!(frame.len() > 2 * PAGE);
    let mut counter = frames::FrameCounter::default();
    for number in 0..3 {
        assert_eq!(counter.place(), (number, 0));
        frame.iter().for_each(|byte| counter.step(*byte));
    }
}

fn harvested(tracker: &FakeTracker, base: u64, pages: u64) -> Vec<u64> {
    let mut bitmap = DirtyBitmap::new(PageIndex(base), pages);
    tracker.harvest(&mut bitmap).unwrap();
    bitmap.runs().map(|run| run.start.0).collect()
}

/// The contract that every tracker keeps: writes while logging appear exactly once.
#[test]
fn writes_while_logging_appear_in_exactly_one_harvest() {
    let tracker = FakeTracker::default();
    tracker.touch(PageIndex(1));
    tracker.start().unwrap();
    tracker.touch(PageIndex(5));
    tracker.touch(PageIndex(15));
    assert_eq!(harvested(&tracker, 0, 10), [5]);
    assert!(harvested(&tracker, 0, 10).is_empty());
    assert_eq!(harvested(&tracker, 10, 10), [15]);
}

#[test]
fn a_harvested_page_is_seen_again_once_it_is_rearmed() {
    let tracker = FakeTracker::default();
    tracker.start().unwrap();
    tracker.touch(PageIndex(5));
    assert_eq!(harvested(&tracker, 0, 10), [5]);
    tracker.touch(PageIndex(5));
    assert!(harvested(&tracker, 0, 10).is_empty());
    tracker
        .rearm(PageRun::new(PageIndex(0), 10).unwrap())
        .unwrap();
    tracker.touch(PageIndex(5));
    assert_eq!(harvested(&tracker, 0, 10), [5]);
}

#[test]
fn memory_reads_back_and_knows_its_holes() {
    let memory = FakeMemory::new(8);
    let run = PageRun::new(PageIndex(3), 1).unwrap();
    memory.write(run, &[7; PAGE]).unwrap();
    let all = PageRun::new(PageIndex(0), 8).unwrap();
    assert_eq!(memory.data_runs(all).unwrap(), [run]);
    assert_eq!(memory.hole_reads(), 0);
    let mut buf = vec![1; 8 * PAGE];
    memory.read(all, &mut buf).unwrap();
    assert_eq!(buf.iter().filter(|byte| **byte == 7).count(), PAGE);
    assert_eq!(memory.hole_reads(), 7);
    let outside = PageRun::new(PageIndex(7), 2).unwrap();
    assert!(memory.read(outside, &mut buf).is_err());
}

fn faulty(frame: u32, offset: usize, kind: FaultKind) -> (FakeChannel, FakeChannel) {
    let fault = Some(Fault {
        frame,
        offset,
        kind,
    });
    let wire = Wire {
        fault,
        ..Wire::default()
    };
    pair(wire, Wire::default())
}

/// Two frames of 16 bytes.
fn send_two(channel: &mut FakeChannel) {
    for _ in 0..2 {
        Message::Accept.send(channel).unwrap();
    }
}

#[test]
fn a_full_channel_times_out_and_goes_on_when_it_is_read() {
    let wire = Wire {
        capacity: 4,
        ..Wire::default()
    };
    let (mut here, mut there) = pair(wire, Wire::default());
    here.set_timeout(Duration::from_millis(5)).unwrap();
    assert_eq!(here.write(b"abcdef").unwrap(), 4);
    assert!(here.is_congested());
    let full = here.write(b"ef").unwrap_err();
    assert_eq!(full.kind(), ErrorKind::TimedOut);
    let mut buf = [0; 3];
    assert_eq!(there.read(&mut buf).unwrap(), 3);
    assert_eq!(here.write(b"ef").unwrap(), 2);
    drop(here);
    let mut rest = Vec::new();
    there.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"def");
}

#[test]
fn a_cut_ends_both_directions_and_what_was_before_it_arrives() {
    let (mut here, mut there) = faulty(1, 3, FaultKind::Cut);
    send_two(&mut here);
    let mut got = Vec::new();
    there.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), 16 + 3);
    assert!(there.write(b"x").is_err() || here.read(&mut [0]).unwrap() == 0);
    assert!(here.write(b"x").is_err());
}

#[test]
fn a_flip_turns_one_bit() {
    let (mut here, mut there) = faulty(1, 2, FaultKind::Flip);
    send_two(&mut here);
    drop(here);
    let mut got = Vec::new();
    there.read_to_end(&mut got).unwrap();
    let expected = [
        Message::Accept.encode().unwrap(),
        Message::Accept.encode().unwrap(),
    ]
    .concat();
    let turned: Vec<_> = (0..32).filter(|at| got[*at] != expected[*at]).collect();
    assert_eq!(turned, [18]);
}

#[test]
fn a_stalled_channel_is_silent_also_about_its_end() {
    let (mut here, mut there) = faulty(1, 0, FaultKind::Stall);
    send_two(&mut here);
    drop(here);
    there.set_timeout(Duration::from_millis(5)).unwrap();
    let mut frame = [0; 16];
    there.read_exact(&mut frame).unwrap();
    let silence = there.read(&mut frame).unwrap_err();
    assert_eq!(silence.kind(), ErrorKind::TimedOut);
}

#[test]
fn a_delay_is_a_delay() {
    let (mut here, mut there) = faulty(0, 0, FaultKind::Delay(Duration::from_millis(20)));
    let begin = Instant::now();
    send_two(&mut here);
    let mut frame = [0; 16];
    there.set_timeout(Duration::from_millis(2)).unwrap();
    assert!(there.read(&mut frame).is_err());
    there.set_timeout(Duration::from_secs(5)).unwrap();
    there.read_exact(&mut frame).unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(20));
}

#[test]
fn a_breaker_wakes_whoever_waits() {
    let (mut here, mut there) = pair(Wire::default(), Wire::default());
    let breaker = here.breaker();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            breaker.break_off();
        });
        assert_eq!(here.read(&mut [0]).unwrap(), 0);
    });
    assert_eq!(there.read(&mut [0]).unwrap(), 0);
}
