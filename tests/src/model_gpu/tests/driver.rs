//! A driver over the client of the crate `vfio_user`, with guest memory of its own.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use drover_guest::gpu::{
    BAR_REGISTERS, COMMAND_BYTES, Command, Error, FENCE_INTERRUPT, FENCE_WRITE, control, registers,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use vfio_user::Client;

use crate::harness::scratch::Scratch;
use crate::model_gpu::{Abilities, DmaLogging, Fault, Server, Shape};

pub(super) const MIB: u64 = 1 << 20;

/// Where guest memory begins for the device, and where its parts lie in it.
pub(super) const MEMORY: u64 = 0x10_0000;
pub(super) const MEMORY_BYTES: u64 = 4 * MIB;
const RING: u64 = 0;
const FENCE: u64 = 0x8000;
/// Free for data.
pub(super) const DATA: u64 = 0x10000;
pub(super) const RING_SIZE: u32 = 8;

const LIMIT: Duration = Duration::from_secs(20);

/// A served device.
pub(super) struct Stand {
    pub(super) server: Server,
    pub(super) vram_bytes: u64,
    path: PathBuf,
    _scratch: Scratch,
}

impl Stand {
    pub(super) fn new() -> Self {
        Self::with_vram(4 * MIB)
    }

    pub(super) fn with_vram(vram_bytes: u64) -> Self {
        Self::with(vram_bytes, DmaLogging::On)
    }

    pub(super) fn with(vram_bytes: u64, dma_log: DmaLogging) -> Self {
        let abilities = Abilities {
            dma_log,
            ..Abilities::default()
        };
        Self::able_to(vram_bytes, abilities)
    }

    pub(super) fn with_pre_copy(vram_bytes: u64) -> Self {
        let abilities = Abilities {
            pre_copy: true,
            ..Abilities::default()
        };
        Self::able_to(vram_bytes, abilities)
    }

    /// One that fails as the program's option says.
    pub(super) fn with_faults(text: &str) -> Self {
        let abilities = Abilities {
            faults: Fault::parse_all(text).unwrap(),
            ..Abilities::default()
        };
        Self::able_to(4 * MIB, abilities)
    }

    fn able_to(vram_bytes: u64, abilities: Abilities) -> Self {
        let scratch = Scratch::new().unwrap();
        let path = scratch.join("gpu");
        let shape = Shape {
            vram_bytes,
            partition: 0,
            partitions: 1,
        };
        Self {
            server: Server::start_with(&path, shape, abilities).unwrap(),
            vram_bytes,
            path,
            _scratch: scratch,
        }
    }

    pub(super) fn client(&self) -> Client {
        Client::new(&self.path).unwrap()
    }
}

/// A client that has given the device memory, an interrupt and the right to use them.
pub(super) struct Driver {
    pub(super) client: Client,
    pub(super) memory: File,
    interrupts: [File; 2],
    tail: u32,
    fence: u64,
}

impl Driver {
    /// A driver that has not enabled the device.
    pub(super) fn new(stand: &Stand) -> Self {
        Self::over(stand.client())
    }

    pub(super) fn over(mut client: Client) -> Self {
        let memory = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let memory = File::from(memory);
        memory.set_len(MEMORY_BYTES).unwrap();
        client
            .dma_map(0, MEMORY, MEMORY_BYTES, memory.as_raw_fd())
            .unwrap();
        let eventfd = || {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            File::from(rustix::event::eventfd(0, flags).unwrap())
        };
        let interrupts = [eventfd(), eventfd()];
        let fds = [interrupts[0].as_raw_fd(), interrupts[1].as_raw_fd()];
        // Eventfds that trigger.
        client
            .set_irqs(super::MSIX, 1 << 2 | 1 << 5, 0, 2, &fds)
            .unwrap();
        let mut driver = Self {
            client,
            memory,
            interrupts,
            tail: 0,
            fence: 0,
        };
        driver.set_bus_master(true);
        driver
    }

    /// One with its ring, ready for commands.
    pub(super) fn enabled(stand: &Stand) -> Self {
        let mut driver = Self::new(stand);
        driver.enable();
        driver
    }

    pub(super) fn set_bus_master(&mut self, on: bool) {
        let command = if on { 6_u16 } else { 2 };
        self.client
            .region_write(super::CONFIG, 4, &command.to_le_bytes())
            .unwrap();
    }

    pub(super) fn enable(&mut self) {
        self.enable_with(MEMORY + RING, RING_SIZE);
    }

    pub(super) fn enable_with(&mut self, base: u64, size: u32) {
        self.set64(registers::RING_BASE, base);
        self.set(registers::RING_SIZE, size);
        self.set(registers::FENCE_VECTOR, 0);
        self.set(registers::ERROR_VECTOR, 1);
        self.set(registers::CONTROL, control::ENABLE);
        self.tail = 0;
    }

    pub(super) fn register(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        let bar = BAR_REGISTERS.into();
        self.client.region_read(bar, offset, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    pub(super) fn register64(&mut self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        let bar = BAR_REGISTERS.into();
        self.client.region_read(bar, offset, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub(super) fn set(&mut self, offset: u64, value: u32) {
        let bar = BAR_REGISTERS.into();
        let bytes = value.to_le_bytes();
        self.client.region_write(bar, offset, &bytes).unwrap();
    }

    pub(super) fn set64(&mut self, offset: u64, value: u64) {
        let bar = BAR_REGISTERS.into();
        let bytes = value.to_le_bytes();
        self.client.region_write(bar, offset, &bytes).unwrap();
    }

    /// Puts bytes of a command into the ring.
    pub(super) fn put(&mut self, bytes: [u8; COMMAND_BYTES]) {
        let slot = RING + u64::from(self.tail) * COMMAND_BYTES as u64;
        self.memory.write_all_at(&bytes, slot).unwrap();
        self.tail = (self.tail + 1) % RING_SIZE;
    }

    pub(super) fn ring_doorbell(&mut self) {
        self.set(registers::RING_TAIL, self.tail);
    }

    /// Has commands carried out, and a fence behind them.
    pub(super) fn submit(&mut self, commands: &[Command]) {
        for command in commands {
            self.put(command.encode());
        }
        self.fence += 1;
        let fence = Command::Fence {
            address: MEMORY + FENCE,
            value: self.fence,
            flags: FENCE_WRITE | FENCE_INTERRUPT,
        };
        self.put(fence.encode());
        self.ring_doorbell();
    }

    /// Waits for the last fence's interrupt, and looks whether its value is there.
    pub(super) fn wait(&mut self) {
        assert_eq!(self.wait_interrupt(0), 1, "interrupts of one fence");
        assert_eq!(self.words(FENCE, 1), [self.fence]);
        assert_eq!(self.register64(registers::FENCE), self.fence);
    }

    pub(super) fn run(&mut self, commands: &[Command]) {
        self.submit(commands);
        self.wait();
    }

    /// Waits for an interrupt; returns how many have come.
    pub(super) fn wait_interrupt(&mut self, vector: usize) -> u64 {
        let limit = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        let file = &mut self.interrupts[vector];
        let mut poll = [PollFd::new(&*file, PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut poll, Some(&limit)), Ok(1));
        let mut count = [0; 8];
        file.read_exact(&mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    /// Whether an interrupt waits to be read.
    pub(super) fn has_interrupt(&mut self, vector: usize) -> bool {
        let mut count = [0; 8];
        self.interrupts[vector].read_exact(&mut count).is_ok()
    }

    /// Waits for the device to stop, and tells why and about which address.
    pub(super) fn wait_error(&mut self) -> (Error, u64) {
        assert_eq!(self.wait_interrupt(1), 1, "interrupts of one error");
        let error = Error::from_code(self.register(registers::ERROR)).unwrap();
        (error, self.register64(registers::ERROR_ADDRESS))
    }

    /// Reads a register until it has the value.
    pub(super) fn wait_register(&mut self, offset: u64, mut is_there: impl FnMut(u64) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !is_there(self.register64(offset)) {
            assert!(Instant::now() < deadline, "register {offset:#x}");
        }
    }

    /// Words of guest memory.
    pub(super) fn words(&self, offset: u64, count: usize) -> Vec<u64> {
        let mut bytes = vec![0; count * 8];
        self.memory.read_exact_at(&mut bytes, offset).unwrap();
        let words = bytes.as_chunks::<8>().0.iter();
        words.map(|word| u64::from_le_bytes(*word)).collect()
    }

    pub(super) fn set_words(&self, offset: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.write_all_at(&bytes, offset).unwrap();
    }
}
