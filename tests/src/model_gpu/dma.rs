//! Guest memory as the client has given it to the device.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::dma_log::{DmaLogging, Log};

/// Mappings that a client may have at once: each holds a descriptor.
pub(super) const MAPPINGS_MAX: usize = 256;

const PAGE: u64 = 4096;

/// What the device may do with guest memory (vfio-user, DMA_MAP flags).
pub(super) const READ: u32 = 1 << 0;
/// See [`READ`].
pub(super) const WRITE: u32 = 1 << 1;

/// The device's view of guest memory, by guest-physical address.
#[derive(Debug)]
pub(super) struct Dma {
    mappings: BTreeMap<u64, Mapping>,
    /// What was written.
    pub(super) log: Log,
}

#[derive(Debug)]
struct Mapping {
    len: u64,
    flags: u32,
    /// Memory without a file could be reached by messages only, which this device does not send.
    file: Option<File>,
    offset: u64,
}

/// A piece of guest memory that the device cannot access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unreachable {
    pub(super) address: u64,
}

impl Dma {
    pub(super) fn new(logging: DmaLogging) -> Self {
        Self {
            mappings: BTreeMap::new(),
            log: Log::new(logging),
        }
    }

    /// Adds a mapping.
    pub(super) fn map(
        &mut self,
        (address, len): (u64, u64),
        flags: u32,
        file: Option<File>,
        offset: u64,
    ) -> Result<(), Errno> {
        let aligned = [address, len, offset];
        if len == 0 || aligned.iter().any(|value| !value.is_multiple_of(PAGE)) {
            return Err(Errno::INVAL);
        }
        let end = address.checked_add(len).ok_or(Errno::OVERFLOW)?;
        let file_end = offset.checked_add(len).ok_or(Errno::OVERFLOW)?;
        if flags & !(READ | WRITE) != 0 {
            return Err(Errno::INVAL);
        }
        // Reading from a pipe or a socket would be waited for, and writing behind a file's end makes it
        // longer.
        let holds = |file: &File| {
            let data = file.metadata();
            data.is_ok_and(|data| data.is_file() && data.len() >= file_end)
        };
        if file.as_ref().is_some_and(|file| !holds(file)) {
            return Err(Errno::INVAL);
        }
        let before = self.mappings.range(..end).next_back();
        if before.is_some_and(|(start, mapping)| start + mapping.len > address) {
            return Err(Errno::EXIST);
        }
        if self.mappings.len() >= MAPPINGS_MAX {
            return Err(Errno::NOSPC);
        }
        let mapping = Mapping {
            len,
            flags,
            file,
            offset,
        };
        self.mappings.insert(address, mapping);
        Ok(())
    }

    /// Removes the mappings of a range, which must hold at least one and cut none.
    pub(super) fn unmap(&mut self, address: u64, len: u64) -> Result<(), Errno> {
        let end = address.checked_add(len).ok_or(Errno::OVERFLOW)?;
        let ends = |(start, mapping): (&u64, &Mapping)| (*start, start + mapping.len);
        let touched = self.mappings.range(..end).map(ends);
        let touched: Vec<_> = touched.filter(|(_, last)| *last > address).collect();
        if touched.is_empty() {
            return Err(Errno::NOENT);
        }
        if touched
            .iter()
            .any(|&(start, last)| start < address || last > end)
        {
            return Err(Errno::INVAL);
        }
        for (start, _) in touched {
            self.mappings.remove(&start);
        }
        Ok(())
    }

    /// Removes all mappings.
    pub(super) fn clear(&mut self) {
        self.mappings.clear();
    }

    /// Reads guest memory.
    pub(super) fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Unreachable> {
        let mut done = 0;
        while done < data.len() {
            let rest = &mut data[done..];
            let (file, offset, len) = self.piece(address, done, rest.len(), READ)?;
            let unreachable = |_| Unreachable { address };
            file.read_exact_at(&mut rest[..len], offset)
                .map_err(unreachable)?;
            done += len;
        }
        Ok(())
    }

    /// Writes guest memory. All that the device ever writes goes through here.
    pub(super) fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Unreachable> {
        let mut done = 0;
        while done < data.len() {
            let rest = &data[done..];
            let (file, offset, len) = self.piece(address, done, rest.len(), WRITE)?;
            let written = file.write_all_at(&rest[..len], offset);
            // A write that has failed may have changed something all the same.
            self.log.note(address.saturating_add(done as u64), len);
            written.map_err(|_| Unreachable { address })?;
            done += len;
        }
        Ok(())
    }

    /// The file with the byte `done` bytes behind `address`, where in it that is, and how many of
    /// `wanted` bytes it has.
    fn piece(
        &self,
        address: u64,
        done: usize,
        wanted: usize,
        access: u32,
    ) -> Result<(&File, u64, usize), Unreachable> {
        let unreachable = Unreachable { address };
        let address = address.checked_add(done as u64).ok_or(unreachable)?;
        let found = self.mappings.range(..=address).next_back();
        let (start, mapping) = found.ok_or(unreachable)?;
        let within = address - start;
        if within >= mapping.len || mapping.flags & access == 0 {
            return Err(unreachable);
        }
        let file = mapping.file.as_ref().ok_or(unreachable)?;
        let left = usize::try_from(mapping.len - within).unwrap_or(usize::MAX);
        Ok((file, mapping.offset + within, left.min(wanted)))
    }
}
