//! The device: its regions as a client reads and writes them.

use std::fs::File;
use std::io::{self, Write};

use drover_guest::gpu::{
    self, BAR_MSIX, BAR_REGISTERS, BAR_VRAM, Error, NO_VECTOR, RING_MAX, VECTORS, control,
    registers, status,
};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::config::{Bar, Effect};
use super::dma::Dma;
use super::dma_log::DmaLogging;
use super::engine;
use super::faults::{Fault, Faults};
use super::migration::Migration;
use super::state::{MSIX_BYTES, MSIX_TABLE, State};
use super::vram::Vram;

/// What is fixed of a virtual function when it is made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes of video memory, a multiple of the page size.
    pub vram_bytes: u64,
    /// Which partition it is, from 0.
    pub partition: u32,
    /// Of how many.
    pub partitions: u32,
}

/// What a virtual function can do beyond computing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Whether its state can be taken and given.
    pub migration: bool,
    /// Whether its state can be read while it runs. Then its video memory cannot be mapped: what is written there
    /// by others would not be noticed.
    pub pre_copy: bool,
    /// How well it keeps the log of its writes.
    pub dma_log: DmaLogging,
    /// What fails, each once in the life of the process.
    pub faults: Vec<Fault>,
}

impl Default for Abilities {
    fn default() -> Self {
        Self {
            migration: true,
            pre_copy: false,
            dma_log: DmaLogging::On,
            faults: Vec::new(),
        }
    }
}

/// Vectors, and the two notices.
const LINES: usize = VECTORS as usize + 2;

/// Bytes of the BAR with the registers.
const REGISTER_BYTES: u64 = 4096;

impl Shape {
    /// The device's BARs.
    pub(super) fn bars(&self) -> [Bar; 3] {
        let bar = |index, bytes, is_wide| Bar {
            index,
            bytes,
            is_wide,
        };
        [
            bar(BAR_REGISTERS, REGISTER_BYTES, false),
            bar(BAR_MSIX, MSIX_BYTES as u64, false),
            bar(BAR_VRAM, self.vram_bytes.next_power_of_two(), true),
        ]
    }
}

/// A virtual function.
pub(super) struct Device {
    pub(super) shape: Shape,
    pub(super) state: State,
    pub(super) vram: Vram,
    pub(super) abilities: Abilities,
    pub(super) dma: Dma,
    pub(super) migration: Migration,
    pub(super) faults: Faults,
    /// Who is told of an interrupt, by vector; then of an error, and of the host's request.
    interrupts: [Option<File>; LINES],
    /// Words on their way.
    pub(super) buffer: Vec<u8>,
}

impl Device {
    pub(super) fn new(shape: Shape, abilities: Abilities) -> io::Result<Self> {
        Ok(Self {
            shape,
            state: State::new(&shape.bars()),
            vram: Vram::new(shape.vram_bytes)?,
            dma: Dma::new(abilities.dma_log),
            migration: Migration::default(),
            faults: Faults::new(&abilities.faults),
            abilities,
            interrupts: [const { None }; LINES],
            buffer: vec![0; engine::STEP_BYTES],
        })
    }

    /// Becomes another client's: as new, with video memory that no earlier one can still have mapped.
    pub(super) fn renew(&mut self) -> io::Result<()> {
        self.forget()?;
        self.vram = Vram::new(self.shape.vram_bytes)?;
        Ok(())
    }

    /// Forgets a client and all that it has left.
    pub(super) fn forget(&mut self) -> io::Result<()> {
        self.dma.clear();
        self.dma.log.forget();
        self.interrupts = [const { None }; LINES];
        self.reset()
    }

    /// Resets the device; the client's mappings, interrupts and log stay.
    pub(super) fn reset(&mut self) -> io::Result<()> {
        self.state = State::new(&self.shape.bars());
        self.migration = Migration::default();
        self.vram.forget_writes();
        self.vram.clear()
    }

    /// Reads configuration space.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.state.config.read(offset, data);
    }

    /// Writes configuration space.
    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let effect = self.state.config.write(offset, data, &self.shape.bars());
        match effect {
            Effect::None => Ok(()),
            Effect::Reset => self.reset(),
        }
    }

    /// Reads a BAR.
    pub(super) fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match bar {
            BAR_REGISTERS => read_bytes(&self.registers(), offset, data),
            BAR_MSIX => read_bytes(&self.state.msix, offset, data),
            BAR_VRAM => return self.vram.read(offset, data),
            _ => data.fill(0),
        }
        Ok(())
    }

    /// Writes a BAR.
    pub(super) fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) -> io::Result<()> {
        match bar {
            BAR_REGISTERS => self.write_registers(offset, data),
            BAR_MSIX => {
                self.write_msix(offset, data);
                Ok(())
            }
            BAR_VRAM => self.vram.write(offset, data),
            _ => Ok(()),
        }
    }

    fn write_msix(&mut self, offset: u64, data: &[u8]) {
        let table = &mut self.state.msix[..MSIX_TABLE];
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let places = table.iter_mut().skip(start);
        for (place, &value) in places.zip(data) {
            *place = value;
        }
    }

    /// All registers as they read.
    fn registers(&self) -> [u8; registers::END] {
        let mut bytes = [0; registers::END];
        let mut put = |offset: u64, value: &[u8]| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            bytes[start..start + value.len()].copy_from_slice(value);
        };
        let state = &self.state.registers;
        let (done, total) = engine::progress(self);
        for (offset, value) in [
            (registers::ID, gpu::ID),
            (registers::VERSION, gpu::VERSION),
            (registers::PARTITION, self.shape.partition),
            (registers::PARTITIONS, self.shape.partitions),
            (registers::STATUS, self.status()),
            (registers::ERROR, state.error),
            (registers::CONTROL, u32::from(state.enabled)),
            (registers::RING_SIZE, state.ring_size),
            (registers::RING_HEAD, state.ring_head),
            (registers::RING_TAIL, state.ring_tail),
            (registers::FENCE_VECTOR, state.fence_vector),
            (registers::ERROR_VECTOR, state.error_vector),
        ] {
            put(offset, &value.to_le_bytes());
        }
        for (offset, value) in [
            (registers::VRAM_BYTES, self.shape.vram_bytes),
            (registers::RING_BASE, state.ring_base),
            (registers::FENCE, state.fence),
            (registers::STEPS_DONE, done),
            (registers::STEPS_TOTAL, total),
            (registers::COMMANDS_DONE, state.commands_done),
            (registers::ERROR_ADDRESS, state.error_address),
        ] {
            put(offset, &value.to_le_bytes());
        }
        bytes
    }

    fn status(&self) -> u32 {
        let bit = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
        bit(self.state.registers.enabled, status::ENABLED)
            | bit(self.has_work(), status::BUSY)
            | bit(self.state.registers.error != 0, status::FAILED)
    }

    /// Whether there are commands to carry out, sooner or later.
    pub(super) fn has_work(&self) -> bool {
        let registers = &self.state.registers;
        let is_asked = self.state.job.is_some() || registers.ring_head != registers.ring_tail;
        registers.enabled && registers.error == 0 && is_asked
    }

    /// Registers are written in words of 4 bytes; what is not aligned to one is dropped.
    fn write_registers(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (words, rest) = data.as_chunks::<4>();
        if !rest.is_empty() || !offset.is_multiple_of(4) {
            return Ok(());
        }
        for (place, word) in (offset..).step_by(4).zip(words) {
            self.write_register(place, u32::from_le_bytes(*word))?;
        }
        Ok(())
    }

    fn write_register(&mut self, offset: u64, value: u32) -> io::Result<()> {
        const RING_BASE_HIGH: u64 = registers::RING_BASE + 4;
        let state = &mut self.state.registers;
        match offset {
            registers::CONTROL if value & control::RESET != 0 => return self.reset_registers(),
            registers::CONTROL => self.switch(value & control::ENABLE != 0),
            registers::RING_BASE if !state.enabled => {
                state.ring_base = state.ring_base >> 32 << 32 | u64::from(value);
            }
            RING_BASE_HIGH if !state.enabled => {
                let low = state.ring_base & u64::from(u32::MAX);
                state.ring_base = u64::from(value) << 32 | low;
            }
            registers::RING_SIZE if !state.enabled => state.ring_size = value,
            registers::RING_TAIL if state.enabled && state.error == 0 => {
                if value < state.ring_size {
                    state.ring_tail = value;
                } else {
                    self.fail(Error::Ring, u64::from(value));
                }
            }
            registers::FENCE_VECTOR => state.fence_vector = vector(value),
            registers::ERROR_VECTOR => state.error_vector = vector(value),
            _ => {}
        }
        Ok(())
    }

    /// The driver's own reset, which leaves configuration space and the MSI-X table as they are.
    fn reset_registers(&mut self) -> io::Result<()> {
        let new = State::new(&self.shape.bars());
        self.state.registers = new.registers;
        self.state.job = new.job;
        self.vram.clear()
    }

    fn switch(&mut self, on: bool) {
        let state = &mut self.state.registers;
        if on == state.enabled || state.error != 0 {
            return;
        }
        self.state.job = None;
        state.enabled = on;
        (state.ring_head, state.ring_tail) = (0, 0);
        if !on {
            return;
        }
        (state.fence, state.commands_done) = (0, 0);
        let ring_bytes = u64::from(state.ring_size) * gpu::COMMAND_BYTES as u64;
        let is_sized =
            state.ring_size.is_power_of_two() && (2..=RING_MAX).contains(&state.ring_size);
        let is_placed = state.ring_base.is_multiple_of(4096)
            && state.ring_base.checked_add(ring_bytes).is_some();
        if !is_sized || !is_placed {
            let base = state.ring_base;
            self.fail(Error::Ring, base);
        }
    }

    /// Stops the device until it is reset.
    pub(super) fn fail(&mut self, error: Error, address: u64) {
        self.state.job = None;
        let state = &mut self.state.registers;
        state.error = error as u32;
        state.error_address = address;
        let vector = state.error_vector;
        self.interrupt(vector);
    }

    /// Sends the interrupt of a vector, if somebody listens.
    pub(super) fn interrupt(&mut self, vector: u32) {
        let found = usize::try_from(vector).ok();
        let found = found.and_then(|vector| self.interrupts.get_mut(vector)?.as_mut());
        let Some(file) = found else {
            return;
        };
        // A counter at its end, or a pipe that nobody reads, is not waited for.
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut poll = [PollFd::new(&*file, PollFlags::OUT)];
        let is_free = matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(1));
        if is_free && poll[0].revents().contains(PollFlags::OUT) {
            // It may be gone: an interrupt that nobody hears.
            let _ = file.write(&1_u64.to_ne_bytes());
        }
    }

    /// Says who is told of an interrupt.
    pub(super) fn set_interrupt(&mut self, vector: u32, file: Option<File>) {
        let slot = usize::try_from(vector).ok();
        if let Some(slot) = slot.and_then(|vector| self.interrupts.get_mut(vector)) {
            *slot = file;
        }
    }
}

/// A vector that there is.
fn vector(value: u32) -> u32 {
    if value < VECTORS { value } else { NO_VECTOR }
}

/// Reads a part of bytes; what lies behind their end reads as 0.
pub(super) fn read_bytes(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (slot, byte) in data.iter_mut().zip(bytes.iter().skip(start)) {
        *slot = *byte;
    }
}
