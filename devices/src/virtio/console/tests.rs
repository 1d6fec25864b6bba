#![allow(clippy::cast_possible_truncation)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::GuestRam;
use crate::chardev::CharDevice;
use crate::device::DeviceId;
use crate::state::{DeviceState, RestoreError};
use crate::testing::{Buffer, DriverQueue, FakeRoute, ram};
use crate::virtio::{Activation, ActivationError, VirtioDevice, VirtioInterrupt, Virtqueue};

const DEADLINE: Duration = Duration::from_secs(10);
const CAPACITY: usize = 64 << 10;
const INPUT_AT: u64 = 0x2_0000;
const OUTPUT_AT: u64 = 0x4_0000;
const SIZE: ConsoleSize = ConsoleSize {
    columns: 132,
    rows: 43,
};

struct Fixture {
    memory: Arc<GuestRam>,
    receive: DriverQueue,
    transmit: DriverQueue,
    console: Console,
    port: Arc<ConsolePort>,
    /// Where the worker reports errors of the driver.
    errors: Option<Arc<VirtioInterrupt>>,
    route: Option<Arc<FakeRoute>>,
}

fn console() -> Console {
    Console::new(DeviceId::new("console").unwrap()).unwrap()
}

fn fixture() -> Fixture {
    let memory = ram(0x40_0000);
    let console = console();
    Fixture {
        receive: DriverQueue::new(&memory, 0, 16),
        transmit: DriverQueue::new(&memory, DriverQueue::BYTES, 16),
        port: console.port(),
        console,
        memory,
        errors: None,
        route: None,
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < DEADLINE, "no {what} in {DEADLINE:?}");
        std::thread::yield_now();
    }
}

impl Fixture {
    fn activate(&mut self) {
        let (receive, _) = self.receive.device_side(0);
        let (transmit, _) = self.transmit.device_side(1);
        self.activate_with(vec![receive, transmit]).unwrap();
    }

    fn activate_with(&mut self, queues: Vec<Virtqueue>) -> Result<(), ActivationError> {
        // Any queue's interrupt side will do; this one has a vector for changes only of its own.
        let (spare, route) = self.receive.device_side(0);
        let interrupt = Arc::clone(spare.interrupt().shared());
        self.route = Some(route);
        let receive = queues.first();
        self.errors = receive.map(|queue| Arc::clone(queue.interrupt().shared()));
        self.console.activate(Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features: 0,
            interrupt,
        })
    }

    /// Interrupts about the configuration since the last activation.
    fn config_changes(&self) -> usize {
        self.route.as_ref().unwrap().delivered().len()
    }

    /// Offers output of `len` bytes that starts at position `start` of an endless pattern.
    fn offer_output(&mut self, start: usize, len: usize) {
        let at = OUTPUT_AT + start as u64;
        self.memory
            .write_slice(&pattern(start, len), GuestAddress(at))
            .unwrap();
        self.transmit.offer(&[Buffer::readable(at, len as u32)]);
    }

    fn take(&self) -> Vec<u8> {
        let mut buf = vec![0; 5000];
        let count = self.port.take_output(&mut buf);
        buf.truncate(count);
        buf
    }

    fn take_until(&self, len: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        wait("output", || {
            taken.extend(self.take());
            taken.len() >= len
        });
        taken
    }
}

fn pattern(start: usize, len: usize) -> Vec<u8> {
    (start..start + len).map(|i| (i / 7 % 251) as u8).collect()
}

#[test]
fn output_reaches_the_host_in_order_and_input_the_guest() {
    let mut f = fixture();
    f.offer_output(0, 100);
    f.offer_output(100, 50);
    let two = [
        Buffer::writable(INPUT_AT, 2),
        Buffer::writable(INPUT_AT + 8, 6),
    ];
    f.receive.offer(&two);
    f.activate();
    assert_eq!(f.take_until(150), pattern(0, 150));
    wait("used output", || !f.transmit.used().is_empty());

    assert_eq!(f.port.receive(b"hello"), 5);
    let mut used = Vec::new();
    wait("input", || {
        used.extend(f.receive.used());
        !used.is_empty()
    });
    assert_eq!(used, [(0, 5)]);
    let mut input = [0; 2];
    f.memory
        .read_slice(&mut input, GuestAddress(INPUT_AT))
        .unwrap();
    assert_eq!(&input, b"he");
    let mut input = [0; 4];
    f.memory
        .read_slice(&mut input, GuestAddress(INPUT_AT + 8))
        .unwrap();
    assert_eq!(&input, b"llo\0");
    assert_eq!(f.console.counters().input_bytes.get(), 5);
}

#[test]
fn slow_host_stops_the_transmit_queue_and_loses_nothing() {
    const TOTAL: usize = 1 << 20;
    let mut f = fixture();
    for chunk in 0..8 {
        f.offer_output(chunk * TOTAL / 8, TOTAL / 8);
    }
    f.activate();
    // The host reads nothing: the device fills its buffer and stops taking requests.
    wait("backpressure", || {
        f.console.counters().output_waits.get() > 0
    });
    assert_eq!(f.console.counters().output_bytes.get(), CAPACITY as u64);
    assert!(f.transmit.used().is_empty());
    let mut taken = Vec::new();
    wait("all output", || {
        taken.extend(f.take());
        taken.len() >= TOTAL
    });
    assert!(taken == pattern(0, TOTAL), "output differs");
    wait("all chains", || f.console.counters().output_waits.get() > 1);
    f.console.deactivate();
    assert_eq!(f.transmit.used().len(), 8);
}

#[test]
fn pause_in_the_middle_of_a_chain_neither_loses_nor_repeats_output() {
    let mut f = fixture();
    f.offer_output(0, 3 * CAPACITY);
    f.activate();
    wait("backpressure", || {
        f.console.counters().output_waits.get() > 0
    });
    let queues = f.console.deactivate();
    assert!(f.transmit.used().is_empty());
    // Paused: the host may take what it was given, more does not come.
    let mut taken = f.take_until(CAPACITY);
    assert!(f.take().is_empty());
    f.activate_with(queues).unwrap();
    taken.extend(f.take_until(2 * CAPACITY));
    assert!(taken == pattern(0, 3 * CAPACITY), "output differs");
}

#[test]
fn restored_console_goes_on_where_the_saved_one_stopped() {
    let mut f = fixture();
    f.port.resize(SIZE);
    f.offer_output(0, 2 * CAPACITY);
    f.activate();
    wait("backpressure", || {
        f.console.counters().output_waits.get() > 0
    });
    f.port.receive(b"typed");
    let queues = f.console.deactivate();
    let before = f.take_until(CAPACITY);
    let state = f.console.save().unwrap();
    assert_eq!(f.port.receive(b"during the pause"), 0);
    assert_eq!(f.console.save().unwrap(), state);

    f.console = console();
    f.port = f.console.port();
    f.console.restore(&state).unwrap();
    assert_eq!(f.port.size(), SIZE);
    f.receive.offer(&[Buffer::writable(INPUT_AT, 16)]);
    f.activate_with(queues).unwrap();
    let after = f.take_until(CAPACITY);
    assert!([before, after].concat() == pattern(0, 2 * CAPACITY));
    wait("input", || f.receive.used() == [(0, 5)]);
    assert_eq!(f.config_changes(), 0, "the size is the same");
    let queues = f.console.deactivate();
    // What it said about the output.
    let _ = f.port.event().read();
    assert_eq!(f.port.receive(b"during the pause"), 0);
    assert!(f.port.event().read().is_err(), "asked for too early");
    f.activate_with(queues).unwrap();
    assert!(f.port.event().read().is_ok(), "the host may send again");
}

#[test]
fn size_set_before_the_restore_is_announced_when_the_driver_runs() {
    let mut f = fixture();
    f.port.resize(SIZE);
    let state = f.console.save().unwrap();
    f.console = console();
    f.port = f.console.port();
    let here = ConsoleSize {
        columns: 80,
        rows: 25,
    };
    f.port.resize(here);
    f.console.restore(&state).unwrap();
    assert_eq!(f.port.size(), here);
    f.activate();
    assert_eq!(f.config_changes(), 1);
}

#[test]
fn resize_changes_the_configuration_and_interrupts_once() {
    let mut f = fixture();
    f.activate();
    assert_eq!(f.config_changes(), 0, "the size is not known");
    f.port.resize(SIZE);
    f.port.resize(SIZE);
    assert_eq!(f.config_changes(), 1);
    let mut config = [0xff; 16];
    f.console.read_config(0, &mut config);
    assert_eq!(config[..8], [132, 0, 43, 0, 1, 0, 0, 0]);
    assert_eq!(config[8..], [0; 8]);
    f.console.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 16]);
    // A new driver has to be told again.
    let queues = f.console.deactivate();
    f.console.reset();
    f.activate_with(queues).unwrap();
    assert_eq!(f.config_changes(), 1);
}

#[test]
fn emergency_characters_need_no_driver_and_never_wait() {
    let mut f = fixture();
    f.console.write_config(8, &u32::from(b'o').to_le_bytes());
    f.console.write_config(8, b"k");
    for (offset, data) in [(0, &b"xxxx"[..]), (9, b"x"), (12, b"x"), (8, b"")] {
        f.console.write_config(offset, data);
    }
    assert_eq!(f.take(), b"ok");
    for _ in 0..CAPACITY + 3 {
        f.console.write_config(8, b"!");
    }
    assert_eq!(f.console.counters().emergency_lost.get(), 3);
}

#[test]
fn refused_input_is_announced_once_there_is_room() {
    let mut f = fixture();
    assert_eq!(f.port.receive(&pattern(0, CAPACITY + 10)), CAPACITY);
    assert!(f.port.event().read().is_err(), "no room was made");
    for _ in 0..16 {
        let len = (CAPACITY / 16) as u32;
        f.receive.offer(&[Buffer::writable(INPUT_AT, len)]);
    }
    f.activate();
    wait("room", || f.port.event().read().is_ok());
    let mut used = 0;
    wait("input", || {
        used += f.receive.used().len();
        used == 16
    });
    assert_eq!(f.port.receive(b"more"), 4);
}

#[test]
fn receive_buffers_without_room_are_returned_and_input_is_kept() {
    let mut f = fixture();
    f.receive.offer(&[Buffer::readable(INPUT_AT, 8)]);
    f.receive.offer(&[Buffer::writable(INPUT_AT, 0)]);
    f.receive.offer(&[Buffer::writable(INPUT_AT, 8)]);
    f.port.receive(b"abc");
    f.activate();
    let mut used = Vec::new();
    wait("input", || {
        used.extend(f.receive.used());
        used.len() == 3
    });
    assert_eq!(used, [(0, 0), (1, 0), (2, 3)]);
    assert_eq!(f.console.counters().refused.get(), 2);
}

#[test]
fn chains_of_any_shape_are_transmitted_or_break_the_device() {
    let mut f = fixture();
    f.memory
        .write_slice(b"abcdef", GuestAddress(OUTPUT_AT))
        .unwrap();
    let mixed = [
        Buffer::readable(OUTPUT_AT, 2),
        Buffer::readable(OUTPUT_AT, 0),
        Buffer::readable(OUTPUT_AT + 2, 4),
        Buffer::writable(OUTPUT_AT, 4),
    ];
    f.transmit.offer(&mixed);
    f.transmit.offer(&[Buffer::writable(OUTPUT_AT, 4)]);
    f.transmit.offer(&[Buffer::readable(0xffff_ffff, 4)]);
    f.activate();
    wait("reset request", || f.errors.as_ref().unwrap().needs_reset());
    assert_eq!(f.take(), b"abcdef");
    f.console.deactivate();
}

#[test]
fn both_queues_are_needed() {
    let mut f = fixture();
    let (receive, _) = f.receive.device_side(0);
    let (transmit, _) = f.transmit.device_side(1);
    for (queues, missing) in [(vec![receive], 1), (vec![transmit], 0), (Vec::new(), 0)] {
        let error = f.activate_with(queues).unwrap_err();
        assert!(
            matches!(error, ActivationError::MissingQueue(index) if index == missing),
            "{error}"
        );
        assert!(f.console.deactivate().is_empty());
    }
}

#[test]
fn reset_forgets_input_and_keeps_output() {
    let mut f = fixture();
    f.port.receive(&pattern(0, CAPACITY + 1));
    f.offer_output(0, 10);
    f.activate();
    wait("output", || !f.transmit.used().is_empty());
    f.console.deactivate();
    f.console.reset();
    assert!(f.port.event().read().is_ok(), "the host may send again");
    assert_eq!(f.port.receive(&pattern(0, CAPACITY)), CAPACITY);
    assert_eq!(f.take(), pattern(0, 10));
}

#[test]
fn hostile_states_are_refused_or_harmless() {
    let encode = |wire: &ConsoleStateV1| DeviceState::encode("virtio-console", 1, wire).unwrap();
    let wire = ConsoleStateV1 {
        columns: u16::MAX,
        rows: 0,
        input: vec![1; CAPACITY + 1],
        transmitted: u64::MAX,
    };
    let error = console().restore(&encode(&wire)).unwrap_err();
    assert!(
        matches!(error, RestoreError::InvalidField { field: "input", .. }),
        "{error}"
    );
    // More sent than the chain has: it counts as sent.
    let mut f = fixture();
    let wire = ConsoleStateV1 {
        input: Vec::new(),
        ..wire
    };
    f.console.restore(&encode(&wire)).unwrap();
    f.offer_output(0, 10);
    f.offer_output(10, 5);
    f.activate();
    assert_eq!(f.take_until(5), pattern(10, 5));
}
