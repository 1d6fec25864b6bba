//! Bounded reads from a kernel image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::error::BootError;

/// Bytes copied at a time.
const CHUNK: usize = 256 << 10;

/// A file, or bytes in memory, that are read by position.
pub(super) struct Image<'a> {
    source: Source<'a>,
    len: u64,
}

enum Source<'a> {
    File(&'a File),
    Bytes(&'a [u8]),
}

impl<'a> Image<'a> {
    /// # Errors
    /// [`BootError::Read`] when the file has no length: a pipe, a directory.
    pub(super) fn from_file(file: &'a File) -> Result<Self, BootError> {
        let metadata = file.metadata().map_err(|source| BootError::Read {
            what: "file metadata",
            source,
        })?;
        if !metadata.is_file() {
            return Err(BootError::Read {
                what: "image",
                source: io::Error::other("not a regular file"),
            });
        }
        Ok(Self {
            source: Source::File(file),
            len: metadata.len(),
        })
    }

    pub(super) fn from_bytes(bytes: &'a [u8]) -> Self {
        Self {
            source: Source::Bytes(bytes),
            len: bytes.len() as u64,
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Reads a structure at `offset`.
    pub(super) fn read<T: FromBytes + IntoBytes>(
        &self,
        offset: u64,
        what: &'static str,
    ) -> Result<T, BootError> {
        let mut value = T::new_zeroed();
        self.read_into(offset, value.as_mut_bytes(), what)?;
        Ok(value)
    }

    pub(super) fn read_into(
        &self,
        offset: u64,
        buf: &mut [u8],
        what: &'static str,
    ) -> Result<(), BootError> {
        self.check(offset, buf.len() as u64, what)?;
        match self.source {
            Source::File(file) => file
                .read_exact_at(buf, offset)
                .map_err(|source| BootError::Read { what, source }),
            Source::Bytes(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let part = bytes.get(start..start + buf.len());
                buf.copy_from_slice(part.expect("checked above"));
                Ok(())
            }
        }
    }

    /// Copies `len` bytes at `offset` to `address`.
    pub(super) fn copy_to(
        &self,
        ram: &GuestRam,
        offset: u64,
        len: u64,
        address: u64,
        what: &'static str,
    ) -> Result<(), BootError> {
        self.check(offset, len, what)?;
        if let Source::File(mut file) = self.source {
            use std::io::{Seek, SeekFrom};
            let failed = |source| BootError::Read { what, source };
            file.seek(SeekFrom::Start(offset)).map_err(failed)?;
            let count = usize::try_from(len).unwrap_or(usize::MAX);
            ram.read_exact_volatile_from(GuestAddress(address), &mut file, count)?;
            return Ok(());
        }
        let mut buf = vec![0; CHUNK];
        let mut done = 0;
        while done < len {
            let count = usize::try_from(len - done).unwrap_or(CHUNK).min(CHUNK);
            let part = &mut buf[..count];
            self.read_into(offset + done, part, what)?;
            ram.write_slice(part, GuestAddress(address + done))?;
            done += count as u64;
        }
        Ok(())
    }

    fn check(&self, offset: u64, len: u64, what: &'static str) -> Result<(), BootError> {
        let end = offset.checked_add(len);
        match end {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(BootError::Truncated {
                what,
                end: end.unwrap_or(u64::MAX),
                file_len: self.len,
            }),
        }
    }
}
