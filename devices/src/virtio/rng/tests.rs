#![allow(clippy::cast_possible_truncation)]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::DeviceId;
use crate::events::{DeviceEvent, EventSink, Reporter};
use crate::rate::{Rate, RateLimits};
use crate::state::{DeviceState, RestoreError};
use crate::testing::{Buffer, DriverQueue, ram};
use crate::virtio::{Activation, ActivationError, VirtioDevice, Virtqueue};
use crate::{GuestRam, counters::Counters};

const DEADLINE: Duration = Duration::from_secs(10);
const DATA: u64 = 0x2_0000;

struct Sink(Sender<DeviceEvent>);

impl EventSink for Sink {
    fn report(&self, _device: &DeviceId, event: DeviceEvent) {
        self.0.send(event).unwrap();
    }
}

/// Counts upwards from 1; before that it gives the scripted answers.
#[derive(Default)]
struct Source {
    script: Mutex<VecDeque<io::Result<usize>>>,
    next: Mutex<u8>,
}

impl Source {
    fn scripted(script: impl IntoIterator<Item = io::Result<usize>>) -> Arc<Self> {
        Arc::new(Self {
            script: Mutex::new(script.into_iter().collect()),
            next: Mutex::default(),
        })
    }
}

impl Entropy for Source {
    fn fill(&self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.script.lock().pop_front().unwrap_or(Ok(buf.len()))?;
        let mut next = self.next.lock();
        for byte in &mut buf[..count] {
            *next = next.wrapping_add(1);
            *byte = *next;
        }
        Ok(count)
    }
}

struct Fixture {
    memory: Arc<GuestRam>,
    driver: DriverQueue,
    rng: Rng,
    events: Receiver<DeviceEvent>,
}

fn fixture(source: Arc<Source>, rate_limits: RateLimits) -> Fixture {
    let memory = ram(0x10_0000);
    let (sender, events) = channel();
    let reporter = Reporter::new(DeviceId::new("rng").unwrap(), Arc::new(Sink(sender)));
    Fixture {
        driver: DriverQueue::new(&memory, 0, 16),
        rng: Rng::new(source, &RngOptions { rate_limits }, reporter),
        memory,
        events,
    }
}

impl Fixture {
    fn activate(&mut self) {
        let (queue, _) = self.driver.device_side(0);
        self.activate_with(queue);
    }

    fn activate_with(&mut self, queue: Virtqueue) {
        let interrupt = Arc::clone(queue.interrupt().shared());
        let memory = Arc::clone(&self.memory);
        let queues = vec![queue];
        let activation = Activation {
            memory,
            queues,
            features: 0,
            interrupt,
        };
        self.rng.activate(activation).unwrap();
    }

    /// The next `count` answers.
    fn answers(&mut self, count: usize) -> Vec<u32> {
        let start = Instant::now();
        let mut answers = Vec::new();
        while answers.len() < count {
            assert!(start.elapsed() < DEADLINE, "{answers:?} after {DEADLINE:?}");
            answers.extend(self.driver.used().into_iter().map(|(_, len)| len));
            std::thread::yield_now();
        }
        answers
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    fn counter(&self, name: &str) -> u64 {
        let mut found = None;
        self.rng.counters().visit(&mut |counter, _, value| {
            if counter == name {
                found = Some(value);
            }
        });
        found.unwrap()
    }
}

#[test]
fn buffers_are_filled_across_segments_in_order() {
    let mut f = fixture(Source::scripted([]), RateLimits::default());
    let two = [Buffer::writable(DATA, 3), Buffer::writable(DATA + 16, 5)];
    f.driver.offer(&two);
    f.driver.offer(&[Buffer::writable(DATA + 32, 1)]);
    f.activate();
    assert_eq!(f.answers(2), [8, 1]);
    assert_eq!(f.bytes(DATA, 3), [1, 2, 3]);
    assert_eq!(f.bytes(DATA + 16, 6), [4, 5, 6, 7, 8, 0]);
    assert_eq!(f.bytes(DATA + 32, 2), [9, 0]);
    assert_eq!(f.counter("rng_bytes_total"), 9);
}

#[test]
fn doorbell_wakes_the_device_and_the_driver_is_interrupted() {
    let mut f = fixture(Source::scripted([]), RateLimits::default());
    let (queue, route) = f.driver.device_side(0);
    let doorbell = queue.doorbell().try_clone().unwrap();
    f.activate_with(queue);
    f.driver.offer(&[Buffer::writable(DATA, 8)]);
    doorbell.write(1).unwrap();
    assert_eq!(f.answers(1), [8]);
    f.rng.deactivate();
    assert_eq!(route.delivered().len(), 1);
}

#[test]
fn one_request_gets_at_most_a_chunk() {
    let mut f = fixture(Source::scripted([]), RateLimits::default());
    f.driver.offer(&[Buffer::writable(DATA, 0x2_0000)]);
    f.activate();
    assert_eq!(f.answers(1), [0x1_0000]);
}

#[test]
fn requests_without_room_are_returned_empty() {
    let mut f = fixture(Source::scripted([]), RateLimits::default());
    f.driver.offer(&[Buffer::readable(DATA, 8)]);
    f.driver.offer(&[Buffer::writable(DATA, 0)]);
    f.driver.offer(&[Buffer::writable(DATA, 4)]);
    f.activate();
    assert_eq!(f.answers(3), [0, 0, 4]);
    assert_eq!(f.counter("rng_refused_total"), 2);
}

#[test]
fn malformed_chains_make_the_device_ask_for_a_reset() {
    type Offer = fn(&mut DriverQueue);
    let cases: [(&str, Offer); 4] = [
        ("outside RAM", |driver| {
            driver.offer(&[Buffer::writable(0xffff_f000, 0x2000)]);
        }),
        ("a loop", |driver| {
            driver.write_descriptor(0, &Buffer::writable(DATA, 1), 1 | 2, 0);
            driver.publish(0);
        }),
        ("readable after writable", |driver| {
            driver.offer(&[Buffer::writable(DATA, 1), Buffer::readable(DATA, 1)]);
        }),
        ("too many at once", |driver| driver.set_avail_index(17)),
    ];
    for (what, offer) in cases {
        let mut f = fixture(Source::scripted([]), RateLimits::default());
        offer(&mut f.driver);
        let (queue, _) = f.driver.device_side(0);
        let interrupt = Arc::clone(queue.interrupt().shared());
        f.activate_with(queue);
        f.rng.deactivate();
        assert!(interrupt.needs_reset(), "{what}");
    }
}

#[test]
fn source_that_has_nothing_yet_is_asked_again() {
    let blocked = || Err(io::ErrorKind::WouldBlock.into());
    let source = Source::scripted([blocked(), blocked(), Ok(2)]);
    let mut f = fixture(source, RateLimits::default());
    f.driver.offer(&[Buffer::writable(DATA, 4)]);
    f.activate();
    assert_eq!(f.answers(1), [2]);
    assert_eq!(f.bytes(DATA, 4), [1, 2, 0, 0]);
}

#[test]
fn failed_source_feeds_nothing_until_the_next_activation() {
    for failure in [Ok(0), Err(io::Error::other("worn out"))] {
        let mut f = fixture(Source::scripted([Ok(4), failure]), RateLimits::default());
        f.memory.write_slice(&[7; 16], GuestAddress(DATA)).unwrap();
        f.driver.offer(&[Buffer::writable(DATA, 4)]);
        f.driver.offer(&[Buffer::writable(DATA + 4, 4)]);
        f.activate();
        let event = f.events.recv_timeout(DEADLINE).unwrap();
        assert!(
            matches!(
                &event,
                DeviceEvent::IoError {
                    operation: "entropy",
                    ..
                }
            ),
            "{event:?}"
        );
        let queue = f.rng.deactivate().remove(0);
        assert_eq!(f.answers(1), [4]);
        assert_eq!(f.bytes(DATA, 8), [1, 2, 3, 4, 7, 7, 7, 7]);
        assert_eq!(f.counter("rng_errors_total"), 1);
        // The request is still there for a source that works again.
        f.activate_with(queue);
        assert_eq!(f.answers(1), [4]);
        assert_eq!(f.bytes(DATA + 4, 4), [5, 6, 7, 8]);
    }
}

#[test]
fn rate_limit_holds_and_a_waiting_request_survives_a_pause() {
    let bytes = Some(Rate {
        per_second: 4000,
        burst: Some(400),
    });
    let limits = RateLimits { bytes, ops: None };
    let mut f = fixture(Source::scripted([]), limits);
    let start = Instant::now();
    for _ in 0..8 {
        f.driver.offer(&[Buffer::writable(DATA, 1000)]);
    }
    f.activate();
    // A chunk is no larger than the burst.
    assert_eq!(f.answers(1)[0], 400);
    let queue = f.rng.deactivate().remove(0);
    let taken = queue.state().next_avail as usize;
    assert!(taken < 8, "{taken} requests got through");
    f.activate_with(queue);
    let rest = f.answers(8 - taken);
    let elapsed = start.elapsed().as_secs_f64();
    assert!(rest.iter().all(|len| *len == 400), "{rest:?}");
    let given = f.counter("rng_bytes_total") as f64;
    // One burst at first, and one operation in debt.
    assert!(given <= 4000.0 * elapsed + 800.0, "{given} in {elapsed} s");
    assert!(f.counter("rng_throttled_total") > 0);
}

#[test]
fn activation_without_a_queue_is_refused() {
    let mut f = fixture(Source::scripted([]), RateLimits::default());
    let (queue, _) = f.driver.device_side(0);
    let activation = Activation {
        memory: Arc::clone(&f.memory),
        queues: Vec::new(),
        features: 0,
        interrupt: Arc::clone(queue.interrupt().shared()),
    };
    let error = f.rng.activate(activation).unwrap_err();
    assert!(matches!(error, ActivationError::MissingQueue(0)), "{error}");
    assert!(f.rng.deactivate().is_empty());
}

#[test]
fn state_round_trips_and_foreign_states_are_refused() {
    let mut f = fixture(Source::scripted([]), RateLimits::default());
    let state = f.rng.save().unwrap();
    f.rng.restore(&state).unwrap();
    let newer = DeviceState {
        version: 2,
        ..state.clone()
    };
    let error = f.rng.restore(&newer).unwrap_err();
    assert!(matches!(error, RestoreError::UnsupportedVersion { .. }));
    let cut = DeviceState {
        bytes: Vec::new(),
        ..state.clone()
    };
    let error = f.rng.restore(&cut).unwrap_err();
    assert!(matches!(error, RestoreError::Malformed { .. }));
    let other = DeviceState {
        kind: "virtio-net".to_owned(),
        ..state
    };
    let error = f.rng.restore(&other).unwrap_err();
    assert!(matches!(error, RestoreError::WrongKind { .. }));
}
