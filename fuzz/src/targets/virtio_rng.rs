//! The entropy device, from a driver that is ready.

use std::io;
use std::sync::{Arc, Mutex};

use devices::virtio::VirtioDevice;
use devices::virtio::rng::{Entropy, Rng, RngOptions};

use crate::input::{Input, Script};
use crate::rig::{self, Subject};

pub fn run(data: &[u8]) {
    rig::run::<Source>(data, true);
}

/// A source of bytes that are always the same.
#[derive(Default)]
pub struct Source {
    next: Arc<Next>,
    /// It has failed, or made the device wait, at some time.
    spoilt: bool,
}

#[derive(Default)]
struct Next(Mutex<Mood>);

#[derive(Clone, Copy, Default)]
enum Mood {
    #[default]
    Full,
    Short,
    Empty,
    Broken,
}

impl Entropy for Next {
    fn fill(&self, buf: &mut [u8]) -> io::Result<usize> {
        assert!(!buf.is_empty(), "nothing is wanted");
        let mut mood = self.0.lock().expect("a panic ends everything");
        let len = match std::mem::take(&mut *mood) {
            Mood::Full => buf.len(),
            Mood::Short => 1,
            Mood::Empty => return Err(io::ErrorKind::WouldBlock.into()),
            Mood::Broken => return Err(io::ErrorKind::Other.into()),
        };
        buf[..len].fill(0xa5);
        Ok(len)
    }
}

impl Subject for Source {
    const QUEUES: u16 = 1;

    fn answers_all(&self, _queue: u16) -> bool {
        !self.spoilt
    }

    fn new() -> Self {
        Self::default()
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Rng::new(
            self.next.clone(),
            &RngOptions::default(),
            rig::reporter(),
        ))
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let mood = input.choose(&[Mood::Short, Mood::Empty, Mood::Broken]);
        self.spoilt |= !matches!(mood, Mood::Short);
        *self.next.0.lock().expect("a panic ends everything") = mood;
    }

    fn release(&mut self) {}
}

pub fn seeds() -> Vec<Vec<u8>> {
    // Place and length of each buffer; odd places are writable.
    let request = |options: u8, buffers: &[(u8, u8)]| {
        let script = Script::new().u8(0).u8(options);
        let write = |script: Script, (place, len): &(u8, u8)| script.u8(*place).u8(*len).u8(0);
        buffers.iter().fold(script, write)
    };
    rig::seeds(&[
        request(0, &[(1, 5)]),
        request(1, &[(1, 6), (0x81, 2)]),
        request(8, &[(1, 2)]),
        request(0, &[(1, 7)]),
    ])
}
