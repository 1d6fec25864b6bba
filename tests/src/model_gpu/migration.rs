//! The device's state, taken and given: `VFIO_USER_DEVICE_FEATURE` and the two messages for data.
//!
//! A state is a stream: [`MAGIC`], bytes of video memory, bytes of the rest, the rest as JSON, video memory.
//! Whoever gives one is not trusted.

use std::io;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::device::Device;
use super::state::State;
use super::wire::{Fields, TRANSFER_MAX};

const MAGIC: [u8; 8] = *b"DGPUMIG1";
/// Bytes before the JSON.
const HEAD_BYTES: usize = 24;
/// Bytes of JSON that are taken; a state has some 20 KiB.
const REST_MAX: u64 = 256 << 10;

// `struct vfio_device_feature`, what can be asked with it, and `enum vfio_device_mig_state`.
pub(super) const GET: u32 = 1 << 16;
pub(super) const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;
pub(super) const FEATURE_MASK: u32 = 0xffff;
const MIGRATION: u32 = 1;
const DEVICE_STATE: u32 = 2;
const DATA_SIZE: u32 = 9;
const STOP_COPY_SUPPORTED: u64 = 1;
const ERROR: u32 = 0;
const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;

/// Where a device is on its way.
#[derive(Debug, Default)]
pub(super) enum Migration {
    #[default]
    Running,
    Stop,
    /// What stands before video memory, and how much of all was read.
    StopCopy {
        head: Vec<u8>,
        read: u64,
    },
    /// The beginning as far as it has come, and how much of all was written.
    Resuming {
        head: Vec<u8>,
        written: u64,
    },
    /// A state was begun that cannot be.
    Error,
}

/// What is neither video memory nor fixed.
#[derive(Deserialize, Serialize)]
struct Rest {
    state: State,
    partition: u32,
}

impl Migration {
    pub(super) fn is_running(&self) -> bool {
        matches!(self, Self::Running)
    }

    fn number(&self) -> u32 {
        match self {
            Self::Running => RUNNING,
            Self::Stop => STOP,
            Self::StopCopy { .. } => STOP_COPY,
            Self::Resuming { .. } => RESUMING,
            Self::Error => ERROR,
        }
    }
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

fn number_at(bytes: &[u8], place: usize) -> Option<u64> {
    let word = bytes.get(place..)?.first_chunk()?;
    Some(u64::from_le_bytes(*word))
}

/// What stands before video memory in the stream.
fn head(device: &Device) -> io::Result<Vec<u8>> {
    let rest = serde_json::to_vec(&Rest {
        state: device.state.clone(),
        partition: device.shape.partition,
    })?;
    let vram_bytes = device.vram.bytes().to_le_bytes();
    Ok([
        &MAGIC[..],
        &vram_bytes,
        &(rest.len() as u64).to_le_bytes(),
        &rest,
    ]
    .concat())
}

/// Bytes of the whole beginning, as soon as it tells; refuses one of another device.
fn head_bytes(device: &Device, head: &[u8]) -> io::Result<Option<usize>> {
    let known = head.len().min(MAGIC.len());
    if head[..known] != MAGIC[..known] {
        return Err(invalid());
    }
    let (Some(vram_bytes), Some(rest)) = (number_at(head, 8), number_at(head, 16)) else {
        return Ok(None);
    };
    if vram_bytes != device.vram.bytes() || rest > REST_MAX {
        return Err(invalid());
    }
    let rest = usize::try_from(rest).map_err(|_| invalid())?;
    Ok(Some(HEAD_BYTES + rest))
}

impl Device {
    /// Takes the arcs to a state; the way from any to any other is by STOP.
    fn change(&mut self, to: u32) -> io::Result<()> {
        if self.migration.number() == to {
            return Ok(());
        }
        match (&self.migration, to) {
            (Migration::Error, _) => return Err(invalid()),
            (Migration::Resuming { .. }, _) => self.install()?,
            _ => {}
        }
        self.migration = match to {
            RUNNING => Migration::Running,
            STOP => Migration::Stop,
            STOP_COPY => Migration::StopCopy {
                head: head(self)?,
                read: 0,
            },
            RESUMING => {
                self.reset()?;
                Migration::Resuming {
                    head: Vec::new(),
                    written: 0,
                }
            }
            _ => return Err(invalid()),
        };
        Ok(())
    }

    /// Ends [`Migration::Resuming`]: it has the whole of a state, or does not become stopped.
    fn install(&mut self) -> io::Result<()> {
        let Migration::Resuming { head, written } = &self.migration else {
            return Ok(());
        };
        let head_len = head_bytes(self, head)?.ok_or_else(invalid)?;
        if *written != head_len as u64 + self.vram.bytes() {
            return Err(invalid());
        }
        let rest: Rest = serde_json::from_slice(&head[HEAD_BYTES..])?;
        if !rest.state.is_sound() {
            return Err(invalid());
        }
        self.state = rest.state;
        self.migration = Migration::Stop;
        Ok(())
    }

    fn read_state(&mut self, size: u32) -> io::Result<Vec<u8>> {
        let vram_bytes = self.vram.bytes();
        let Migration::StopCopy { head, read } = &mut self.migration else {
            return Err(invalid());
        };
        let total = head.len() as u64 + vram_bytes;
        let count = (total - *read).min(size.min(TRANSFER_MAX).into());
        let mut data = vec![0; usize::try_from(count).map_err(|_| invalid())?];
        let at = usize::try_from(*read).unwrap_or(usize::MAX);
        let of_head = head.get(at..).unwrap_or_default();
        let of_head = &of_head[..of_head.len().min(data.len())];
        let (first, second) = data.split_at_mut(of_head.len());
        first.copy_from_slice(of_head);
        let offset = (*read + of_head.len() as u64).saturating_sub(head.len() as u64);
        self.vram.read(offset, second)?;
        *read += count;
        Ok(data)
    }

    fn write_state(&mut self, mut data: &[u8]) -> io::Result<()> {
        let Migration::Resuming { mut head, written } = std::mem::take(&mut self.migration) else {
            return Err(invalid());
        };
        // Whatever happens, no half of a state runs.
        self.migration = Migration::Error;
        let end = written.checked_add(data.len() as u64).ok_or_else(invalid)?;
        let mut at = written;
        while !data.is_empty() {
            let wanted = head_bytes(self, &head)?.unwrap_or(HEAD_BYTES);
            let missing = wanted.saturating_sub(head.len());
            if missing == 0 {
                let offset = at - head.len() as u64;
                let room = self.vram.bytes().saturating_sub(offset);
                if data.len() as u64 > room {
                    return Err(invalid());
                }
                self.vram.write(offset, data)?;
                break;
            }
            let (part, rest) = data.split_at(missing.min(data.len()));
            head.extend(part);
            at += part.len() as u64;
            data = rest;
        }
        head_bytes(self, &head)?;
        let written = end;
        self.migration = Migration::Resuming { head, written };
        Ok(())
    }

    /// Answers `VFIO_USER_DEVICE_FEATURE`.
    pub(super) fn feature(&mut self, mut fields: Fields<'_>) -> Result<Vec<u8>, Errno> {
        let (room, flags) = (fields.u32()?, fields.u32()?);
        let feature = flags & FEATURE_MASK;
        let can = match feature {
            MIGRATION | DATA_SIZE | DEVICE_STATE if !self.abilities.migration => 0,
            MIGRATION | DATA_SIZE => GET,
            DEVICE_STATE => GET | SET,
            _ => self.dma.log.can(feature),
        };
        if can == 0 {
            return Err(Errno::NOTTY);
        }
        let asked = flags & (GET | SET);
        if asked & !can != 0 {
            return Err(Errno::INVAL);
        }
        if flags & PROBE != 0 {
            return Ok(reply(flags, &[]));
        }
        let value = match (asked, feature) {
            (GET, MIGRATION) => STOP_COPY_SUPPORTED,
            (GET, DATA_SIZE) => {
                let head = head(self).map_err(|error| errno(&error))?;
                head.len() as u64 + self.vram.bytes()
            }
            (GET, DEVICE_STATE) => self.migration.number().into(),
            (SET, DEVICE_STATE) => {
                let to = fields.u32()?;
                self.change(to).map_err(|error| errno(&error))?;
                to.into()
            }
            (GET | SET, _) => return self.dma.log.answer(room, flags, fields),
            _ => return Err(Errno::INVAL),
        };
        Ok(reply(flags, &value.to_le_bytes()))
    }

    /// Answers `VFIO_USER_MIG_DATA_READ`.
    pub(super) fn give_data(&mut self, mut fields: Fields<'_>) -> Result<Vec<u8>, Errno> {
        let (_size, count) = (fields.u32()?, fields.u32()?);
        let data = self.read_state(count).map_err(|error| errno(&error))?;
        let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
        Ok([&(count + 8).to_le_bytes()[..], &count.to_le_bytes(), &data].concat())
    }

    /// Answers `VFIO_USER_MIG_DATA_WRITE`.
    pub(super) fn take_data(&mut self, mut fields: Fields<'_>) -> Result<(), Errno> {
        let (_size, count) = (fields.u32()?, fields.u32()?);
        let data = fields.rest();
        if usize::try_from(count) != Ok(data.len()) {
            return Err(Errno::INVAL);
        }
        self.write_state(data).map_err(|error| errno(&error))
    }
}

pub(super) fn reply(flags: u32, data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(8 + data.len()).unwrap_or(u32::MAX);
    [&size.to_le_bytes()[..], &flags.to_le_bytes(), data].concat()
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::INVAL)
}
