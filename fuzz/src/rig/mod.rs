//! A virtio device with a driver that a byte string directs: well-behaved, careless or hostile.
//!
//! The rig knows what the driver has offered. As long as the driver kept to the rules, it checks
//! that the device keeps to them, too: what it returns, how much it says it has written, and that
//! it wrote nowhere else.

mod driver;
mod host;
mod initialize;
mod memory;
mod seeds;

use std::sync::Arc;

use devices::pci::PciFunction;
use devices::testing::{FakeRouter, run_workers, workers_on_this_thread};
use devices::virtio::{VirtioDevice, VirtioPci};
use devices::{Device, DeviceId};

use crate::input::Input;
pub use driver::{DATA, Ring};
pub use host::reporter;
use memory::Memory;
pub use memory::RAM;
pub use seeds::seeds;

/// What differs between devices.
pub trait Subject {
    /// Number of queues.
    const QUEUES: u16;
    /// Queues from which the device takes buffers when it has something for the driver.
    const RECEIVES: &'static [u16] = &[];
    /// Whether the device returns every valid chain of queue `queue` once the host lets it.
    fn answers_all(&self, queue: u16) -> bool;
    /// The host's side, fresh.
    fn new() -> Self;
    /// A device over that side; called again for each migration.
    fn device(&self) -> Box<dyn VirtioDevice>;
    /// Something happens on the host.
    fn host(&mut self, input: &mut Input<'_>);
    /// The host stops holding anything back, and takes what the device has for it.
    fn release(&mut self);
    /// The device has returned a chain: bytes that it could read, bytes that it says it wrote.
    fn returned(&mut self, _queue: u16, _readable: u64, _written: u64) {}
    /// The driver starts anew, or has written to the device's configuration.
    fn disturbed(&mut self) {}
    /// Everything has been answered, to a driver that kept to the rules all the time.
    fn check(&self) {}
}

/// Turns of the workers until everything that can happen has happened, and the longest that may
/// take: every turn answers a chain, or has something for the driver.
const TURNS: usize = 16;
const MAX_TURNS: usize = 4096;
/// One writable buffer of 4 KiB, as [`Ring::offer`] reads it.
const ROOM: [u8; 4] = [0, 1, 6, 0];
/// Starts of the areas in the BAR, and one that belongs to nobody.
const AREAS: [u64; 8] = [0, 0, 0x1000, 0x2000, 0x4000, 0x8000, 0xc000, 0xf000];
const NOTIFY: u64 = 0x4000;
const MSIX_TABLE: u64 = 0x8000;

/// A device on no bus at all, its driver and the memory between them.
pub struct Rig<S: Subject> {
    subject: S,
    memory: Memory,
    pci: VirtioPci,
    rings: Vec<Ring>,
    /// The driver has broken a rule, so that the device owes it nothing but to survive.
    careless: bool,
}

/// Runs `data` as steps; `ready`: the driver is initialized first.
pub fn run<S: Subject>(data: &[u8], ready: bool) {
    workers_on_this_thread();
    let mut input = Input::new(data);
    let mut rig = Rig::<S>::new();
    rig.pci.start().expect("a fake host has everything");
    if ready {
        rig.initialize(u64::MAX, 16);
    }
    while !input.is_empty() {
        rig.step(&mut input);
    }
    rig.finish();
}

impl<S: Subject> Rig<S> {
    fn new() -> Self {
        let subject = S::new();
        let memory = Memory::new();
        let pci = function(&subject, &memory);
        Self {
            subject,
            memory,
            pci,
            rings: (0..S::QUEUES).map(Ring::new).collect(),
            careless: false,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(16) {
            0 => self.access_bar(input),
            1 => self.access_config(input),
            2 => self.poke(input),
            3..8 => {
                let queue = input.u8();
                let ring = &mut self.rings[usize::from(queue) % usize::from(S::QUEUES)];
                self.careless |= ring.offer(&mut self.memory, input);
                self.kick(queue);
            }
            8 => self.kick(input.u8()),
            9 => run_workers(),
            10 | 11 => self.subject.host(input),
            12 => {
                self.subject.disturbed();
                self.initialize(input.u64(), 1 << input.below(6));
            }
            13 => match input.below(4) {
                0 => self.pause(),
                1 => self.reset(),
                2 if input.may_move() => self.migrate(),
                _ => self.subject.release(),
            },
            14 => self.mask(input),
            _ => {
                let queue = usize::from(input.u8()) % usize::from(S::QUEUES);
                let ring = &mut self.rings[queue];
                self.careless |= ring.scribble(&mut self.memory, input);
            }
        }
        self.collect();
    }

    /// Takes back what the device has returned; how many chains that were.
    fn collect(&mut self) -> usize {
        let strict = !self.careless;
        let mut count = 0;
        for (ring, queue) in self.rings.iter_mut().zip(0..) {
            for chain in ring.collect(&self.memory, strict) {
                self.subject
                    .returned(queue, chain.readable_bytes, chain.written);
                count += 1;
            }
        }
        count
    }

    /// Any register of any area. Reads define every byte, and reading clears bits at most.
    fn access_bar(&mut self, input: &mut Input<'_>) {
        let (area, offset, width) = (input.choose(&AREAS), input.u8(), input.width());
        let at = area + u64::from(offset);
        if input.flag() {
            self.careless |= area == 0;
            self.subject.disturbed();
            let value = input.u64().to_le_bytes();
            self.pci.write_bar(0, at, &value[..width]);
            return;
        }
        let mut fills = [[0x00_u8; 8], [0xff; 8]];
        for fill in &mut fills {
            self.pci.read_bar(0, at, &mut fill[..width]);
        }
        check_reads(fills, width, at);
    }

    fn access_config(&mut self, input: &mut Input<'_>) {
        let (offset, width) = (u16::from(input.u8()), input.choose(&[1, 2, 4]));
        if input.flag() {
            self.careless = true;
            self.subject.disturbed();
            let value = input.u32().to_le_bytes();
            self.pci.write_config(offset, &value[..width]);
            return;
        }
        let mut fills = [[0x00_u8; 8], [0xff; 8]];
        for fill in &mut fills {
            self.pci.read_config(offset, &mut fill[..width]);
        }
        check_reads(fills, width, offset.into());
    }

    /// The driver writes somewhere into memory.
    fn poke(&mut self, input: &mut Input<'_>) {
        let (at, bytes) = (u64::from(input.u16()), input.blob());
        self.careless |= at < DATA;
        self.memory.write(at, bytes);
    }

    fn kick(&mut self, queue: u8) {
        let queue = u64::from(u16::from(queue) % S::QUEUES);
        self.pci.write_bar(0, NOTIFY + 4 * queue, &[0, 0]);
    }

    fn mask(&mut self, input: &mut Input<'_>) {
        let vector = u64::from(input.below(8));
        let masked = u32::from(input.flag());
        self.pci
            .write_bar(0, MSIX_TABLE + 16 * vector + 12, &masked.to_le_bytes());
    }

    fn pause(&mut self) {
        self.pci.pause().expect("a fake host has everything");
        let before = self.memory.contents();
        run_workers();
        assert!(
            before == self.memory.contents(),
            "a paused device has written"
        );
        self.pci.start().expect("a fake host has everything");
    }

    /// The machine is reset.
    fn reset(&mut self) {
        self.subject.disturbed();
        self.pci.pause().expect("a fake host has everything");
        self.pci.reset().expect("a fake host has everything");
        self.pci.reset_config();
        self.forget();
        self.pci.start().expect("a fake host has everything");
    }

    /// The same device in another process, over the same memory and host side.
    fn migrate(&mut self) {
        self.pci.pause().expect("a fake host has everything");
        let state = self.pci.save().expect("a paused device can be saved");
        let fresh = function(&self.subject, &self.memory);
        fresh.restore(&state).expect("its own state");
        assert_eq!(fresh.save().expect("as before"), state);
        fresh.start().expect("a fake host has everything");
        self.pci = fresh;
    }

    /// The driver starts anew, on empty rings.
    fn forget(&mut self) {
        if std::mem::take(&mut self.careless) {
            // The device may have been sent anywhere.
            self.memory.accept();
        }
        for ring in &mut self.rings {
            ring.reset(&mut self.memory);
        }
    }

    /// Once the host lets it, the device has answered everything it owes.
    fn finish(mut self) {
        let mut quiet = 0;
        for _ in 0..MAX_TURNS {
            let answered = self.turn();
            quiet = if answered { 0 } else { quiet + 1 };
            if quiet == TURNS {
                break;
            }
        }
        assert_eq!(quiet, TURNS, "the device goes on and on");
        let mut status = [0];
        self.pci.read_bar(0, 0x14, &mut status);
        let works = status[0] & 0x44 == 4;
        for (ring, queue) in self.rings.iter().zip(0..) {
            let left = ring.outstanding();
            let settled = left == 0 || !works || self.careless || !self.subject.answers_all(queue);
            assert!(settled, "queue {queue}: {left} chains are never returned");
        }
        self.pci.pause().expect("a fake host has everything");
        if !self.careless {
            self.memory.check();
            self.subject.check();
        }
    }
}

impl<S: Subject> Rig<S> {
    /// Everybody does what there is to do. True when the device has returned something.
    fn turn(&mut self) -> bool {
        self.subject.release();
        for queue in S::RECEIVES.iter().filter(|_| !self.careless) {
            let ring = &mut self.rings[usize::from(*queue)];
            ring.offer(&mut self.memory, &mut Input::new(&ROOM));
        }
        for queue in 0..S::QUEUES {
            self.kick((queue & 0xff) as u8);
        }
        run_workers();
        self.collect() > 0
    }
}

fn function<S: Subject>(subject: &S, memory: &Memory) -> VirtioPci {
    let id = DeviceId::new("subject").expect("a good name");
    let ram = Arc::clone(memory.ram());
    VirtioPci::new(id, subject.device(), ram, &FakeRouter::default()).expect("a fake")
}

/// The first read began with zeroes and the second with ones in the buffer: what differs was
/// cleared by reading, or not written at all.
fn check_reads([first, second]: [[u8; 8]; 2], width: usize, at: u64) {
    let pairs = first.iter().zip(&second).take(width);
    let undefined = pairs.clone().any(|(first, second)| second & !first != 0);
    assert!(
        !undefined,
        "{width} bytes at {at:#x} read as {first:x?}, then {second:x?}"
    );
}
