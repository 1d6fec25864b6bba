//! The engine: commands of the ring, carried out in small steps.
//!
//! A step ends soon, so that registers can be read, the device reset or its state taken between any two;
//! how far a command is stands in the state alone.

use drover_guest::gpu::{self, COMMAND_BYTES, Command, Error, FENCE_INTERRUPT, FENCE_WRITE};

use super::device::Device;
use super::dma::Unreachable;
use super::state::Job;

/// Bytes of video memory that a step works on.
pub(super) const STEP_BYTES: usize = 64 << 10;

const WORD: usize = 8;

/// Why a command cannot be carried out, and the address it is about.
struct Refusal {
    error: Error,
    address: u64,
}

impl From<Unreachable> for Refusal {
    fn from(unreachable: Unreachable) -> Self {
        Self {
            error: Error::Dma,
            address: unreachable.address,
        }
    }
}

/// Video memory itself could not be read or written: the host's trouble, not the guest's.
fn broken(_: std::io::Error) -> Refusal {
    Refusal {
        error: Error::Device,
        address: 0,
    }
}

/// Does the next step; `false` if there is nothing to do.
pub(super) fn step(device: &mut Device) -> bool {
    if !device.migration.is_running() || !device.has_work() {
        return false;
    }
    let outcome = match device.state.job.take() {
        None => begin(device),
        Some(job) => advance(device, job),
    };
    if let Err(Refusal { error, address }) = outcome {
        device.fail(error, address);
    }
    true
}

/// Steps done and to do of the command that is carried out.
pub(super) fn progress(device: &Device) -> (u64, u64) {
    let job = device.state.job.as_ref();
    let of = |job: &Job| {
        let command = Command::decode(&job.command)?;
        Some((job.done, steps(command)?))
    };
    job.and_then(of).unwrap_or((0, 0))
}

/// Steps of a command; `None` if they cannot be counted.
fn steps(command: Command) -> Option<u64> {
    match command {
        Command::Nop => Some(0),
        Command::Fill { len, .. } | Command::CopyIn { len, .. } | Command::CopyOut { len, .. } => {
            Some(len / WORD as u64)
        }
        Command::Compute { len, rounds, .. } => (len / WORD as u64).checked_mul(rounds.into()),
        Command::Fence { .. } => Some(1),
    }
}

/// Takes a command from the ring.
fn begin(device: &mut Device) -> Result<(), Refusal> {
    let registers = &device.state.registers;
    let slot = u64::from(registers.ring_head) * COMMAND_BYTES as u64;
    // The ring was checked when the device was enabled; its memory may have gone since.
    let address = registers.ring_base.saturating_add(slot);
    may_access(device, address)?;
    let mut command = [0; COMMAND_BYTES];
    device.dma.read(address, &mut command)?;
    advance(device, Job { command, done: 0 })
}

/// The command, if the device can begin, or go on with, it.
fn check(device: &Device, bytes: &[u8; COMMAND_BYTES]) -> Result<(Command, u64), Refusal> {
    let bad = |error, address| Refusal { error, address };
    let head = u64::from(device.state.registers.ring_head);
    let command = Command::decode(bytes).ok_or(bad(Error::Command, head))?;
    if let Command::Fill { offset, len, .. }
    | Command::CopyIn { offset, len, .. }
    | Command::CopyOut { offset, len, .. }
    | Command::Compute { offset, len, .. } = command
        && !device.vram.has_words(offset, len)
    {
        return Err(bad(Error::Vram, offset));
    }
    let (address, len) = match command {
        Command::CopyIn { address, len, .. } | Command::CopyOut { address, len, .. } => {
            (address, len)
        }
        Command::Fence { address, .. } => (address, WORD as u64),
        Command::Nop | Command::Fill { .. } | Command::Compute { .. } => (0, 0),
    };
    if !address.is_multiple_of(WORD as u64) || address.checked_add(len).is_none() {
        return Err(bad(Error::Dma, address));
    }
    let steps = steps(command).ok_or(bad(Error::Command, head))?;
    Ok((command, steps))
}

/// Does a part of a command, and ends it when nothing is left.
fn advance(device: &mut Device, mut job: Job) -> Result<(), Refusal> {
    let (command, total) = check(device, &job.command)?;
    if job.done < total {
        let mut buffer = std::mem::take(&mut device.buffer);
        let outcome = work(device, command, job.done, &mut buffer);
        device.buffer = buffer;
        job.done = job.done.saturating_add(outcome?);
    }
    if job.done < total {
        device.state.job = Some(job);
        return Ok(());
    }
    let registers = &mut device.state.registers;
    registers.ring_head = registers.ring_head.wrapping_add(1) & registers.ring_size.wrapping_sub(1);
    registers.commands_done = registers.commands_done.wrapping_add(1);
    if let Command::Fence { value, flags, .. } = command {
        registers.fence = value;
        let vector = registers.fence_vector;
        if flags & FENCE_INTERRUPT != 0 {
            device.interrupt(vector);
        }
    }
    Ok(())
}

/// Does the next steps of a command; returns how many.
fn work(
    device: &mut Device,
    command: Command,
    done: u64,
    buffer: &mut [u8],
) -> Result<u64, Refusal> {
    match command {
        Command::Nop => Ok(0),
        Command::Fill { offset, len, word } => {
            let (piece, at) = piece(buffer, done, len);
            for slot in piece.as_chunks_mut::<WORD>().0 {
                *slot = word.to_le_bytes();
            }
            device.vram.write(offset + at, piece).map_err(broken)?;
            Ok(words(piece))
        }
        Command::CopyIn {
            offset,
            len,
            address,
        } => {
            let (piece, at) = piece(buffer, done, len);
            may_access(device, address)?;
            device.dma.read(address + at, piece)?;
            device.vram.write(offset + at, piece).map_err(broken)?;
            Ok(words(piece))
        }
        Command::CopyOut {
            offset,
            len,
            address,
        } => {
            let (piece, at) = piece(buffer, done, len);
            may_access(device, address)?;
            device.vram.read(offset + at, piece).map_err(broken)?;
            device.dma.write(address + at, piece)?;
            Ok(words(piece))
        }
        Command::Compute {
            offset, len, seed, ..
        } => {
            let all = len / WORD as u64;
            let round = u32::try_from(done / all).unwrap_or(u32::MAX);
            let (piece, at) = piece(buffer, done % all, len);
            device.vram.read(offset + at, piece).map_err(broken)?;
            let first = at / WORD as u64;
            for (index, slot) in (first..).zip(piece.as_chunks_mut::<WORD>().0) {
                let word = u64::from_le_bytes(*slot);
                *slot = gpu::round(word, index, seed, round).to_le_bytes();
            }
            device.vram.write(offset + at, piece).map_err(broken)?;
            Ok(words(piece))
        }
        Command::Fence {
            address,
            value,
            flags,
        } => {
            if flags & FENCE_WRITE != 0 {
                may_access(device, address)?;
                device.dma.write(address, &value.to_le_bytes())?;
            }
            Ok(1)
        }
    }
}

/// A device that is no bus master must not access memory (PCI 3.0, 6.2.2).
fn may_access(device: &Device, address: u64) -> Result<(), Refusal> {
    match device.state.config.is_bus_master() {
        true => Ok(()),
        false => Err(Unreachable { address }.into()),
    }
}

/// The part of the buffer that holds the next words of `len` bytes, and how far in those they begin.
fn piece(buffer: &mut [u8], done: u64, len: u64) -> (&mut [u8], u64) {
    let at = done * WORD as u64;
    let left = usize::try_from(len - at).unwrap_or(usize::MAX);
    let len = left.min(buffer.len());
    (&mut buffer[..len], at)
}

fn words(piece: &[u8]) -> u64 {
    (piece.len() / WORD) as u64
}
