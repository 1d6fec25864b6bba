//! The console, from a driver that is ready.

use std::cell::Cell;
use std::sync::{Arc, Mutex};

use devices::DeviceId;
use devices::chardev::CharDevice;
use devices::virtio::VirtioDevice;
use devices::virtio::console::{Console, ConsolePort, ConsoleSize};

use crate::input::{Input, Script};
use crate::rig::{self, Subject};

pub fn run(data: &[u8]) {
    rig::run::<Terminal>(data, true);
}

/// The host's terminal.
#[derive(Default)]
pub struct Terminal {
    /// That of the device in use.
    port: Mutex<Option<Arc<ConsolePort>>>,
    /// Bytes that the host has typed and taken.
    typed: u64,
    taken: Cell<u64>,
    /// Bytes in chains that the driver got back: input written, output read.
    received: u64,
    sent: u64,
    /// These numbers say nothing any more.
    disturbed: bool,
}

impl Terminal {
    fn port(&self) -> Arc<ConsolePort> {
        let port = self.port.lock().expect("a panic ends everything");
        Arc::clone(port.as_ref().expect("there is a device"))
    }

    fn type_in(&mut self, bytes: &[u8]) {
        let accepted = self.port().receive(bytes);
        assert!(accepted <= bytes.len());
        self.typed += accepted as u64;
    }

    fn take(&self, port: &ConsolePort, len: usize) -> usize {
        let _ = port.event().read();
        let taken = port.take_output(&mut vec![0; len]);
        self.taken.set(self.taken.get() + taken as u64);
        taken
    }

    fn take_all(&self, port: &ConsolePort) {
        while self.take(port, 0x4000) > 0 {}
    }
}

impl Subject for Terminal {
    const QUEUES: u16 = 2;
    const RECEIVES: &'static [u16] = &[0];

    /// Buffers for input wait for input.
    fn answers_all(&self, queue: u16) -> bool {
        queue == 1
    }

    fn new() -> Self {
        Self::default()
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let id = DeviceId::new("subject").expect("a good name");
        let console = Console::new(id).expect("the host has descriptors left");
        let mut port = self.port.lock().expect("a panic ends everything");
        // What the former device has for the host does not move with it.
        if let Some(former) = port.replace(console.port()) {
            self.take_all(&former);
        }
        Box::new(console)
    }

    fn host(&mut self, input: &mut Input<'_>) {
        match input.below(4) {
            0 => self.type_in(input.blob()),
            1 => self.type_in(&[b'x'; 40_000]),
            2 => drop(self.take(&self.port(), usize::from(input.u8()) * 64)),
            _ => {
                let (columns, rows) = (input.u8().into(), input.u8().into());
                self.port().resize(ConsoleSize { columns, rows });
            }
        }
    }

    fn release(&mut self) {
        self.take_all(&self.port());
    }

    fn returned(&mut self, queue: u16, readable: u64, written: u64) {
        if queue == 0 {
            self.received += written;
        } else {
            self.sent += readable;
        }
    }

    fn disturbed(&mut self) {
        self.disturbed = true;
    }

    /// Nothing is lost, and nothing comes twice.
    fn check(&self) {
        if !self.disturbed {
            assert_eq!(self.taken.get(), self.sent, "output");
            assert_eq!(self.typed, self.received, "input");
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let room = |len: u8| Script::new().u8(0).u8(0).u8(1).u8(len).u8(0);
    let output = |len: u8, text: &[u8]| Script::new().u8(1).u8(0).u8(2).u8(len).u8(0).blob(text);
    let typed = Script::new().u8(10).u8(0).blob(b"typed").done();
    // Input before and after there is room for it, then more output than the host takes.
    let talk = Script::new()
        .bytes(&typed)
        .u8(3)
        .bytes(&room(2).done())
        .u8(9)
        .bytes(&typed);
    let flood = (0..40).fold(Script::new(), |script, _| {
        let script = script.u8(3).u8(1).u8(7);
        (0..8)
            .fold(script, |script, place| {
                script.u8(2 * place).u8(6).u8(0).u8(0)
            })
            .u8(9)
    });
    let resized = Script::new()
        .u8(10)
        .u8(3)
        .u8(80)
        .u8(25)
        .u8(0)
        .u8(3)
        .u8(0)
        .width(4)
        .u8(0);
    let emergency = Script::new().u8(0).u8(3).u8(8).width(4).u8(1).u64(0x21);
    let mut seeds = rig::seeds(&[room(1), output(2, b"hello"), output(7, b""), room(6)]);
    seeds.extend([talk, flood, resized, emergency].map(Script::done));
    seeds
}
