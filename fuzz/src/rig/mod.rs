//! A virtio device with a driver that a byte string directs: well-behaved, careless or hostile.
//!
//! The rig knows what the driver has offered. As long as the driver kept to the rules, it checks
//! that the device keeps to them, too: what it returns, how much it says it has written, and that
//! it wrote nowhere else.

mod driver;
mod host;
mod memory;

use std::sync::Arc;

use devices::pci::PciFunction;
use devices::testing::{FakeRouter, run_workers, workers_on_this_thread};
use devices::virtio::{VirtioDevice, VirtioPci};
use devices::{Device, DeviceId};

use crate::input::{Input, Script};
pub use driver::{DATA, Ring};
pub use host::reporter;
use memory::Memory;
pub use memory::RAM;

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
/// MSI-X message control: on.
const MSIX_ENABLE: u16 = 1 << 15;

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
                self.subject.returned(queue, chain.readable_bytes, chain.written);
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
        self.pci.write_bar(0, MSIX_TABLE + 16 * vector + 12, &masked.to_le_bytes());
    }

    fn pause(&mut self) {
        self.pci.pause().expect("a fake host has everything");
        let before = self.memory.contents();
        run_workers();
        assert!(before == self.memory.contents(), "a paused device has written");
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
        self.careless = false;
        for ring in &mut self.rings {
            ring.reset(&mut self.memory);
        }
    }

    /// All that a driver does before it works (virtio 1.2 section 3.1.1), with those of the
    /// offered features that `wanted` names.
    fn initialize(&mut self, wanted: u64, size: u16) {
        self.common(0x14, &[0]);
        self.forget();
        self.common(0x14, &[3]);
        let mut features = 1 << 32;
        for half in [0_u32, 1] {
            self.common(0x00, &half.to_le_bytes());
            let mut offered = [0; 4];
            self.pci.read_bar(0, 0x04, &mut offered);
            let offered = u64::from(u32::from_le_bytes(offered)) << (32 * half);
            features |= offered & wanted;
        }
        for half in [0_u32, 1] {
            self.common(0x08, &half.to_le_bytes());
            let bits = (features >> (32 * half)) as u32;
            self.common(0x0c, &bits.to_le_bytes());
        }
        self.common(0x14, &[11]);
        self.common(0x10, &[0, 0]);
        for queue in 0..S::QUEUES {
            self.common(0x16, &queue.to_le_bytes());
            let mut max = [0; 2];
            self.pci.read_bar(0, 0x18, &mut max);
            let size = size.min(u16::from_le_bytes(max));
            self.common(0x18, &size.to_le_bytes());
            self.common(0x1a, &(queue + 1).to_le_bytes());
            let ring = &mut self.rings[usize::from(queue)];
            ring.set_size(size);
            for (register, address) in (0x20..).step_by(8).zip(ring.addresses()) {
                self.common(register, &address.to_le_bytes());
            }
            self.common(0x1c, &[1, 0]);
        }
        let msix = self.msix_control();
        self.pci.write_config(msix, &MSIX_ENABLE.to_le_bytes());
        for vector in 0..=u64::from(S::QUEUES) {
            self.pci.write_bar(0, MSIX_TABLE + 16 * vector, &0xfee0_0000_u64.to_le_bytes());
            self.pci.write_bar(0, MSIX_TABLE + 16 * vector + 8, &vector.to_le_bytes());
        }
        self.common(0x14, &[15]);
    }

    fn common(&self, offset: u64, data: &[u8]) {
        self.pci.write_bar(0, offset, data);
    }

    /// Where MSI-X message control lies: the capability after all of virtio's.
    fn msix_control(&self) -> u16 {
        let byte = |at: u16| {
            let mut data = [0];
            self.pci.read_config(at, &mut data);
            u16::from(data[0])
        };
        let mut at = byte(0x34);
        while at != 0 && byte(at) != 0x11 {
            at = byte(at + 1);
        }
        assert_ne!(at, 0, "the capability list ends before MSI-X");
        at + 2
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
    assert!(!undefined, "{width} bytes at {at:#x} read as {first:x?}, then {second:x?}");
}

/// Seeds that suit every device: the driver comes and goes, moves, and offers `chains` (queue,
/// then the buffers as [`Ring::offer`] reads them).
pub fn seeds(chains: &[Script]) -> Vec<Vec<u8>> {
    let offer = |script: Script, chain: &Script| script.u8(3).bytes(&chain.clone().done());
    let plain = chains.iter().fold(Script::new(), |script, chain| offer(script, chain).u8(9));
    let event_idx = Script::new().u8(12).u64(u64::MAX).u8(4);
    let no_features = Script::new().u8(12).u64(0).u8(3);
    let together = |start: Script| chains.iter().fold(start, offer).u8(9).u8(9);
    let moved = chains.iter().fold(Script::new(), |script, chain| {
        offer(script, chain).u8(13).u8(2).u8(9).u8(13).u8(0)
    });
    let registers = (0..0x38_u8).step_by(4).fold(Script::new(), |script, at| {
        script.u8(0).u8(0).u8(at).width(4).u8(0)
    });
    vec![
        plain.clone().done(),
        together(event_idx).done(),
        together(no_features).u8(13).u8(1).done(),
        moved.done(),
        registers.u8(1).u8(0x40).u8(2).u8(0).u8(14).u8(1).u8(1).done(),
        plain.u8(15).u8(0).u8(1).u16(40).u8(9).u8(2).u16(0x400).blob(&[0; 8]).done(),
    ]
}
