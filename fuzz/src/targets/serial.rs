//! The serial port: registers on one side, a host that moves bytes on the other.

use std::collections::VecDeque;
use std::sync::Arc;

use devices::chardev::CharDevice;
use devices::legacy::{Serial, SerialStateV1};
use devices::testing::FakeLine;
use devices::{Device, DeviceId, IoHandler};

use crate::input::{Input, Script};

const DATA: u64 = 0;
const IER: u64 = 1;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;

const LSR_DATA_READY: u8 = 1 << 0;
const LCR_DIVISOR: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;

/// What the device promises to hold.
const RX_CAPACITY: usize = 256;
const TX_CAPACITY: usize = 64 << 10;

/// Register accesses and steps of the host in any order.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut port = Port::new();
    while !input.is_empty() {
        let pending = is_pending(&port.state);
        match input.below(8) {
            0 | 1 => drop(port.read(u64::from(input.u8()) % 10)),
            2 | 3 => port.write(u64::from(input.u8()) % 10, input.u8()),
            4 => port.type_in(input.blob()),
            5 => port.host_wakes(usize::from(input.u8())),
            6 => port.odd_access(&mut input),
            _ => match input.below(2) {
                0 => port.reset(),
                _ if input.may_move() => port.migrate(),
                _ => {}
            },
        }
        port.check_line(pending);
    }
    port.finish();
}

struct Port {
    serial: Serial,
    line: Arc<FakeLine>,
    /// Typed by the user, refused by the device, as the host's pump keeps it.
    waiting: Vec<u8>,
    /// Sent by the guest, not yet seen by the host.
    sent: VecDeque<u8>,
    /// As of the last step.
    state: SerialStateV1,
    edges: u64,
}

fn serial(line: &Arc<FakeLine>) -> Serial {
    let id = DeviceId::new("serial").expect("a good name");
    Serial::new(id, line.clone()).expect("the host has descriptors left")
}

fn start(serial: &Serial) {
    serial.start().expect("nothing can fail");
}

impl Port {
    fn new() -> Self {
        let line = Arc::new(FakeLine::default());
        let serial = serial(&line);
        start(&serial);
        Self {
            state: state(&serial),
            serial,
            line,
            waiting: Vec::new(),
            sent: VecDeque::new(),
            edges: 0,
        }
    }

    fn read(&mut self, offset: u64) -> u8 {
        let mut data = [0xa5];
        self.serial.read(offset, &mut data);
        let before = &self.state;
        if offset == DATA && before.lcr & LCR_DIVISOR == 0 && !before.rx.is_empty() {
            assert_eq!(data[0], before.rx[0]);
        }
        data[0]
    }

    fn write(&mut self, offset: u64, value: u8) {
        self.serial.write(offset, &[value]);
        let before = &self.state;
        let sends = offset == DATA && before.lcr & LCR_DIVISOR == 0 && before.mcr & MCR_LOOP == 0;
        if sends && self.sent.len() < TX_CAPACITY {
            self.sent.push_back(value);
        }
    }

    /// Accesses that the chip does not know define every byte all the same.
    fn odd_access(&mut self, input: &mut Input<'_>) {
        let (offset, width) = (u64::from(input.u8()), input.choose(&[2, 4, 8]));
        let mut fills = [[0x00_u8; 8], [0xff; 8]];
        for fill in &mut fills {
            self.serial.read(offset, &mut fill[..width]);
        }
        assert_eq!(fills[0][..width], fills[1][..width]);
        self.serial
            .write(offset, &input.u64().to_le_bytes()[..width]);
    }

    /// What the host's pump does with what a person types.
    fn type_in(&mut self, text: &[u8]) {
        if self.waiting.is_empty() {
            self.waiting.extend_from_slice(text);
            self.offer();
        }
    }

    fn offer(&mut self) {
        let before = state(&self.serial);
        let taken = self.serial.receive(&self.waiting);
        let taken: Vec<u8> = self.waiting.drain(..taken).collect();
        let after = state(&self.serial);
        if before.mcr & MCR_LOOP == 0 {
            assert_eq!(after.rx, [before.rx, taken].concat());
            assert!(self.waiting.is_empty() || after.rx.len() == RX_CAPACITY);
        }
    }

    /// What the pump does when the device has signalled it.
    fn host_wakes(&mut self, room: usize) {
        if self.serial.event().read().is_err() {
            return;
        }
        if !self.waiting.is_empty() {
            self.offer();
        }
        let mut buf = vec![0; room.max(1)];
        loop {
            let count = self.serial.take_output(&mut buf);
            let expected: Vec<u8> = self.sent.drain(..count).collect();
            assert_eq!(buf[..count], expected);
            if count < buf.len() {
                break;
            }
        }
    }

    fn reset(&mut self) {
        self.pause();
        self.serial.reset().expect("nothing can fail");
        start(&self.serial);
    }

    /// Nothing changes in a pause, whatever the host does.
    fn pause(&mut self) {
        self.serial.pause().expect("nothing can fail");
        let before = state(&self.serial);
        assert_eq!(self.serial.receive(b"x"), 0);
        let taken = self.serial.take_output(&mut [0; 1]);
        self.sent.drain(..taken);
        assert_eq!(state(&self.serial), before);
    }

    /// The same port in another process.
    fn migrate(&mut self) {
        self.pause();
        let state = self.serial.save().expect("it can always be saved");
        let fresh = serial(&self.line);
        fresh.restore(&state).expect("its own state");
        assert_eq!(fresh.save().expect("as before"), state);
        start(&fresh);
        self.serial = fresh;
        // The new host's pump has neither input nor the old one's output.
        self.waiting.clear();
        self.sent.clear();
    }

    /// A cause that appears raises an edge.
    fn check_line(&mut self, before: bool) {
        self.state = state(&self.serial);
        let edges = self.line.edges();
        if is_pending(&self.state) && !before {
            assert!(
                edges > self.edges,
                "an interrupt was lost: {:?}",
                self.state
            );
        }
        assert!(!self.line.is_high(), "edges come down again");
        self.edges = edges;
    }

    /// A guest that reads all there is, and a host that follows its signals, move every byte.
    fn finish(&mut self) {
        for register in [LCR, MCR, IER] {
            self.serial.write(register, &[0]);
        }
        let read = |serial: &Serial, register| {
            let mut data = [0];
            serial.read(register, &mut data);
            data[0]
        };
        for _ in 0..4096 {
            self.host_wakes(64);
            if read(&self.serial, LSR) & LSR_DATA_READY == 0 {
                break;
            }
            read(&self.serial, DATA);
        }
        assert!(self.waiting.is_empty(), "typed input is stuck in the host");
        self.host_wakes(4096);
        assert!(self.sent.is_empty(), "output is stuck in the device");
    }
}

fn state(serial: &Serial) -> SerialStateV1 {
    let saved = serial.save().expect("it can always be saved");
    saved.decode("serial-16550", 1..=1).expect("its own state")
}

fn is_pending(state: &SerialStateV1) -> bool {
    let receives = state.ier & 1 != 0 && !state.rx.is_empty();
    receives || state.ier & 2 != 0 && state.tx_interrupt
}

pub fn seeds() -> Vec<Vec<u8>> {
    let write = |script: Script, offset, value| script.u8(2).u8(offset).u8(value);
    let mut hello = write(write(Script::new(), 3, 0x83), 0, 1);
    hello = write(write(hello, 1, 0), 3, 3);
    hello = write(write(hello, 2, 7), 1, 3);
    for byte in *b"hi\n" {
        hello = write(hello, 0, byte).u8(0).u8(5).u8(0).u8(2);
    }
    hello = hello.u8(5).u8(16);
    let mut typed = write(Script::new(), 1, 1);
    typed = typed
        .u8(4)
        .blob(&[b'x'; 200])
        .u8(4)
        .blob(&[b'y'; 200])
        .u8(0)
        .u8(0);
    typed = write(typed.u8(5).u8(3), 2, 2)
        .u8(7)
        .u8(0)
        .u8(4)
        .blob(b"abc")
        .u8(7)
        .u8(1);
    let loopback = write(write(Script::new(), 4, 0x1f), 0, b'z')
        .u8(0)
        .u8(6)
        .u8(0)
        .u8(0);
    vec![hello.done(), typed.done(), loopback.done()]
}
