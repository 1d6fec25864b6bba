//! The console, from a driver that is ready.

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
}

impl Terminal {
    fn port(&self) -> Arc<ConsolePort> {
        let port = self.port.lock().expect("a panic ends everything");
        Arc::clone(port.as_ref().expect("there is a device"))
    }

    fn take(&self, len: usize) -> usize {
        let port = self.port();
        let _ = port.event().read();
        port.take_output(&mut vec![0; len])
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
        *self.port.lock().expect("a panic ends everything") = Some(console.port());
        Box::new(console)
    }

    fn host(&mut self, input: &mut Input<'_>) {
        match input.below(4) {
            0 => {
                let typed = input.blob();
                let accepted = self.port().receive(typed);
                assert!(accepted <= typed.len());
            }
            1 => drop(self.port().receive(&[b'x'; 40_000])),
            2 => drop(self.take(usize::from(input.u8()) * 64)),
            _ => {
                let (columns, rows) = (input.u8().into(), input.u8().into());
                self.port().resize(ConsoleSize { columns, rows });
            }
        }
    }

    fn release(&mut self) {
        while self.take(0x4000) > 0 {}
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let room = |len: u8| Script::new().u8(0).u8(0).u8(1).u8(len).u8(0);
    let output = |len: u8, text: &[u8]| Script::new().u8(1).u8(0).u8(2).u8(len).u8(0).blob(text);
    let typed = Script::new().u8(10).u8(0).blob(b"typed").done();
    // Input before and after there is room for it, then more output than the host takes.
    let talk = Script::new().bytes(&typed).u8(3).bytes(&room(2).done()).u8(9).bytes(&typed);
    let flood = (0..40).fold(Script::new(), |script, _| {
        let script = script.u8(3).u8(1).u8(7);
        (0..8).fold(script, |script, place| script.u8(2 * place).u8(6).u8(0).u8(0)).u8(9)
    });
    let resized = Script::new().u8(10).u8(3).u8(80).u8(25).u8(0).u8(3).u8(0).width(4).u8(0);
    let emergency = Script::new().u8(0).u8(3).u8(8).width(4).u8(1).u64(0x21);
    let mut seeds = rig::seeds(&[room(1), output(2, b"hello"), output(7, b""), room(6)]);
    seeds.extend([talk, flood, resized, emergency].map(Script::done));
    seeds
}
