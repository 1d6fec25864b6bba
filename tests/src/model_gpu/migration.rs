//! The device's state, taken and given: `VFIO_USER_DEVICE_FEATURE` and the two messages for data.
//!
//! The states and arcs are those of vfio-user (QEMU's docs/interop/vfio-user.rst), which has no states for
//! peers and no message for what is left in PRE_COPY: `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE` tells that.

use std::io;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::device::Device;
use super::faults::Point;
use super::pages::PAGE;
use super::state;
use super::stream::{HEAD_BYTES, Incoming, Outgoing, invalid};
use super::wire::{Fields, TRANSFER_MAX};

// `struct vfio_device_feature`, what can be asked with it, and `enum vfio_device_mig_state`.
pub(super) const GET: u32 = 1 << 16;
pub(super) const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;
pub(super) const FEATURE_MASK: u32 = 0xffff;
const MIGRATION: u32 = 1;
const DEVICE_STATE: u32 = 2;
const DATA_SIZE: u32 = 9;
const STOP_COPY_SUPPORTED: u64 = 1;
const PRE_COPY_SUPPORTED: u64 = 1 << 2;

/// The states that the device has, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Error = 0,
    Stop = 1,
    Running = 2,
    StopCopy = 3,
    Resuming = 4,
    PreCopy = 6,
}

impl State {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Error, "error"),
        (Self::Stop, "stop"),
        (Self::Running, "running"),
        (Self::StopCopy, "stop-copy"),
        (Self::Resuming, "resuming"),
        (Self::PreCopy, "pre-copy"),
    ];

    fn numbered(number: u32) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        let found = all.find(|(state, _)| *state as u32 == number);
        found.map(|(state, _)| state)
    }

    /// By its name on the command line.
    pub(super) fn named(name: &str) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|(_, of)| *of == name).map(|(state, _)| state)
    }
}

/// Where a device is on its way.
#[derive(Debug, Default)]
pub(super) enum Migration {
    #[default]
    Running,
    PreCopy(Outgoing),
    Stop,
    StopCopy(Outgoing),
    Resuming(Incoming),
    /// A state was begun that cannot be, or that was asked for.
    Error,
}

/// What is neither video memory nor fixed.
#[derive(Deserialize, Serialize)]
struct Rest {
    state: state::State,
    partition: u32,
}

impl Migration {
    pub(super) fn is_running(&self) -> bool {
        matches!(self, Self::Running | Self::PreCopy(_))
    }

    fn state(&self) -> State {
        match self {
            Self::Running => State::Running,
            Self::PreCopy(_) => State::PreCopy,
            Self::Stop => State::Stop,
            Self::StopCopy(_) => State::StopCopy,
            Self::Resuming(_) => State::Resuming,
            Self::Error => State::Error,
        }
    }
}

/// What is no video memory, as the stream has it.
fn rest_of(state: &state::State, partition: u32) -> io::Result<Vec<u8>> {
    let state = state.clone();
    Ok(serde_json::to_vec(&Rest { state, partition })?)
}

impl Device {
    /// Bytes that are yet to be read if the device is stopped now.
    fn bytes_left(&mut self) -> io::Result<u64> {
        let pending = match &self.migration {
            Migration::PreCopy(stream) | Migration::StopCopy(stream) => stream.pending(),
            _ => HEAD_BYTES as u64,
        };
        let all = self.vram.bytes() / PAGE;
        let pages = self.vram.written().map_or(all, |pages| pages.count());
        let rest = rest_of(&self.state, self.shape.partition)?;
        Ok(pending + pages * PAGE + (HEAD_BYTES + rest.len()) as u64)
    }

    /// Takes the arcs to a state.
    fn change(&mut self, to: u32) -> io::Result<()> {
        let to = State::numbered(to).ok_or_else(invalid)?;
        let from = self.migration.state();
        if from == to {
            return Ok(());
        }
        if let Err(failure) = self.faults.meet(Point::Arc(from, to)) {
            if failure.is_fatal {
                self.break_down();
            }
            return Err(failure.into());
        }
        match (from, to) {
            (State::Error, _) | (_, State::Error) | (State::StopCopy, State::PreCopy) => {
                return Err(invalid());
            }
            (_, State::PreCopy) if !self.abilities.pre_copy => return Err(invalid()),
            // The stream goes on.
            (State::PreCopy, State::StopCopy) => {
                if let Migration::PreCopy(stream) = std::mem::take(&mut self.migration) {
                    self.migration = Migration::StopCopy(stream);
                }
                return Ok(());
            }
            (State::Resuming, _) => self.install()?,
            _ => self.vram.forget_writes(),
        }
        self.migration = match to {
            State::Running => Migration::Running,
            State::Stop => Migration::Stop,
            State::PreCopy => Migration::PreCopy(self.begin_stream()),
            State::StopCopy => Migration::StopCopy(self.begin_stream()),
            State::Resuming => {
                // All of video memory comes with the state.
                self.state = state::State::new(&self.shape.bars());
                Migration::Resuming(Incoming::new(&self.vram))
            }
            State::Error => return Err(invalid()),
        };
        Ok(())
    }

    fn begin_stream(&mut self) -> Outgoing {
        self.vram.watch();
        Outgoing::new(&self.vram)
    }

    /// Only a reset helps.
    fn break_down(&mut self) {
        self.vram.forget_writes();
        self.migration = Migration::Error;
    }

    /// Ends [`Migration::Resuming`]: it has the whole of a state, or does not become stopped.
    fn install(&mut self) -> io::Result<()> {
        let Migration::Resuming(stream) = &self.migration else {
            return Ok(());
        };
        let rest: Rest = serde_json::from_slice(stream.rest().ok_or_else(invalid)?)?;
        if !rest.state.is_sound() {
            return Err(invalid());
        }
        self.state = rest.state;
        self.migration = Migration::Stop;
        Ok(())
    }

    fn read_state(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if let Err(failure) = self.faults.meet(Point::Read) {
            if failure.is_fatal {
                self.break_down();
            }
            return Err(failure.into());
        }
        let (state, partition) = (&self.state, self.shape.partition);
        match &mut self.migration {
            Migration::PreCopy(stream) => stream.read(&mut self.vram, || Ok(None), room),
            Migration::StopCopy(stream) => {
                let rest = || rest_of(state, partition).map(Some);
                stream.read(&mut self.vram, rest, room)
            }
            _ => Err(invalid()),
        }
    }

    fn write_state(&mut self, data: &[u8]) -> io::Result<()> {
        if self.migration.state() != State::Resuming {
            return Err(invalid());
        }
        // Whatever happens, no half of a state runs.
        let migration = std::mem::replace(&mut self.migration, Migration::Error);
        let Migration::Resuming(mut stream) = migration else {
            return Err(invalid());
        };
        self.faults.meet(Point::Write)?;
        stream.write(&mut self.vram, data)?;
        self.migration = Migration::Resuming(stream);
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
            (GET, MIGRATION) if self.abilities.pre_copy => STOP_COPY_SUPPORTED | PRE_COPY_SUPPORTED,
            (GET, MIGRATION) => STOP_COPY_SUPPORTED,
            (GET, DATA_SIZE) => self.bytes_left().map_err(|error| errno(&error))?,
            (GET, DEVICE_STATE) => self.migration.state() as u64,
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

    /// Answers `VFIO_USER_MIG_DATA_READ`, in memory that was used before. Nothing at present, in PRE_COPY,
    /// and nothing any more are both no bytes.
    pub(super) fn give_data(
        &mut self,
        mut fields: Fields<'_>,
        mut body: Vec<u8>,
    ) -> Result<Vec<u8>, Errno> {
        const DATA: usize = 8;
        let (_size, wanted) = (fields.u32()?, fields.u32()?);
        let wanted = usize::try_from(wanted.min(TRANSFER_MAX)).map_err(|_| Errno::INVAL)?;
        body.resize(DATA + wanted, 0);
        let read = self.read_state(&mut body[DATA..]);
        let read = read.map_err(|error| errno(&error))?;
        body.truncate(DATA + read);
        let count = u32::try_from(read).unwrap_or(u32::MAX);
        body[..4].copy_from_slice(&count.saturating_add(8).to_le_bytes());
        body[4..DATA].copy_from_slice(&count.to_le_bytes());
        Ok(body)
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
