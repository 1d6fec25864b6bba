//! The file below the qcow2 library, with barriers between metadata writes.
//!
//! The library writes refcounts before the tables that refer to them (and the other way round
//! when it frees), but leaves it to the host in which order they reach the disk. After a power
//! failure a table could then refer to a cluster that counts as free. So while metadata is
//! flushed, each write waits until those before it are durable, data included. There are only a
//! few: a flush without new clusters writes none.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};

use super::refcounts::{ENTRY_BYTES, Refcounts};
use crate::host::disk::syscalls::uninterrupted;

thread_local! {
    /// Whether this thread is flushing metadata.
    static FLUSHING: Cell<bool> = const { Cell::new(false) };
}

/// Puts a barrier before each write that `flush` makes on this thread.
pub(super) fn with_barriers<T>(flush: impl FnOnce() -> T) -> T {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            FLUSHING.set(false);
        }
    }
    FLUSHING.set(true);
    let _reset = Reset;
    flush()
}

/// A file of an image chain.
#[derive(Debug)]
pub(super) struct ImageStorage {
    inner: imago::file::File,
    /// The same description, for calls that need no lock of the library.
    file: File,
    /// `None`: the file is only read.
    refcounts: Option<Refcounts>,
}

impl ImageStorage {
    /// Storage in an open file, which is written when there are `refcounts`.
    ///
    /// # Errors
    /// The host has no descriptor left, or the file's status cannot be read.
    pub(super) fn new(file: &File, path: &Path, refcounts: Option<Refcounts>) -> io::Result<Self> {
        let writable = refcounts.is_some();
        let options = StorageOpenOptions::new().filename(path).write(writable);
        Ok(Self {
            inner: imago::file::File::from_open_file(file.try_clone()?, options)?,
            file: file.try_clone()?,
            refcounts,
        })
    }

    fn barrier(&self) -> io::Result<()> {
        match FLUSHING.get() {
            true => uninterrupted(|| self.file.sync_data()),
            false => Ok(()),
        }
    }
}

impl fmt::Display for ImageStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Storage for ImageStorage {
    fn mem_align(&self) -> usize {
        self.inner.mem_align()
    }

    fn req_align(&self) -> usize {
        self.inner.req_align()
    }

    fn zero_align(&self) -> usize {
        self.inner.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.inner.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.inner.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.inner.get_filename()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: passed on as it came; the caller keeps the alignment rules, which are `inner`'s.
        unsafe { self.inner.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.barrier()?;
        let len = bufv.len();
        let Some(refcounts) = &self.refcounts else {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        };
        if len == ENTRY_BYTES {
            let mut entry = [0; 8];
            bufv.copy_into_slice(&mut entry);
            refcounts.before_entry(&self.file, entry)?;
        }
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.pure_writev(bufv, offset) }?;
        refcounts.after_write(&self.file, offset, len)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.barrier()?;
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.barrier()?;
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.barrier()?;
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn sync(&self) -> io::Result<()> {
        // Unlike the library's own, this lets other threads read and write meanwhile.
        uninterrupted(|| self.file.sync_data())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.inner.get_storage_helper()
    }

    fn resize(&self, new_size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.inner.resize(new_size, mode)
    }
}
