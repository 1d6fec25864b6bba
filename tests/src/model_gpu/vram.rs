//! Video memory: an anonymous file, so that a client can map it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use super::pages::Pages;

/// Video memory.
#[derive(Debug)]
pub(super) struct Vram {
    file: File,
    bytes: u64,
    /// What was written since it was asked for; `None`: nobody asks. What a client writes that has the
    /// memory mapped is not in it.
    written: Option<Pages>,
}

impl Vram {
    /// Cleared memory that nobody else has.
    pub(super) fn new(bytes: u64) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("model-gpu-vram", flags)?);
        file.set_len(bytes)?;
        // Who maps it must not be able to take it away.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok(Self {
            file,
            bytes,
            written: None,
        })
    }

    /// How much there is.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file, for a client to map.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Begins to note what is written: all of it, to begin with.
    pub(super) fn watch(&mut self) {
        self.written = Some(Pages::all(self.bytes));
    }

    /// Nobody asks any more.
    pub(super) fn forget_writes(&mut self) {
        self.written = None;
    }

    /// What was written and not taken since.
    pub(super) fn written(&mut self) -> Option<&mut Pages> {
        self.written.as_mut()
    }

    /// Makes it all zero, for those who have it mapped, too. Where nothing was written, nothing is done.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        if let Some(written) = &mut self.written {
            *written = Pages::all(self.bytes);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(0)) {
            Err(Errno::NXIO) => return Ok(()),
            found => found?,
        };
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, hole, 0, self.bytes)?)
    }

    /// Whether a piece lies inside and consists of whole words.
    pub(super) fn has_words(&self, offset: u64, len: u64) -> bool {
        let end = offset.checked_add(len);
        offset.is_multiple_of(8)
            && len.is_multiple_of(8)
            && end.is_some_and(|end| end <= self.bytes)
    }

    /// Reads; what lies behind the end reads as 0.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let (inside, behind) = data.split_at_mut(self.inside(offset, data.len()));
        behind.fill(0);
        self.file.read_exact_at(inside, offset)
    }

    /// Writes; what lies behind the end is dropped.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let inside = self.inside(offset, data.len());
        if let Some(written) = &mut self.written {
            // Also what is written only in part, and then fails.
            written.insert(offset, inside as u64);
        }
        self.file.write_all_at(&data[..inside], offset)
    }

    fn inside(&self, offset: u64, len: usize) -> usize {
        let left = self.bytes.saturating_sub(offset);
        usize::try_from(left).map_or(len, |left| left.min(len))
    }
}
