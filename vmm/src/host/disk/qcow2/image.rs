//! An image while it is being used.

use std::io;

use devices::GuestRam;
use devices::virtio::block::{BlockOp, BlockRequest};
use imago::ShallowMapping;
use parking_lot::{Mutex, RwLock};

use super::chain::{Access, Chain};
use super::storage::with_barriers;
use crate::host::disk::image::{Scratch, SyncImage};
use crate::host::disk::pieces::{copy_from_guest, copy_to_guest};
use crate::host::disk::syscalls::{self, Fallocate};

/// A qcow2 image. Its metadata is loaded while it is open, see [`Qcow2Image::open`].
pub(super) struct Qcow2Image {
    chain: Chain,
    /// Reads, writes and flushes share the image. What takes clusters away has it to itself,
    /// because others may be about to access these clusters; and so has what zeroes a part of
    /// one, because the library zeroes the whole when it has found the rest to be zero.
    access: RwLock<Option<Access>>,
    /// Flushes one at a time: they write the same tables.
    flushing: Mutex<()>,
}

impl Qcow2Image {
    pub(super) fn new(chain: Chain) -> Self {
        Self {
            chain,
            access: RwLock::new(None),
            flushing: Mutex::new(()),
        }
    }

    pub(super) fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Loads the metadata, unless it is.
    pub(super) fn open(&self) -> io::Result<()> {
        let mut access = self.access.write();
        if access.is_none() {
            let opened = self.chain.access(self.chain.is_writable());
            *access = Some(opened.map_err(io::Error::other)?);
        }
        Ok(())
    }

    /// Writes the metadata back and forgets it. On failure it stays: writes that the guest knows
    /// to be done must still be found.
    pub(super) fn close(&self) -> io::Result<()> {
        let mut access = self.access.write();
        if let Some(open) = access.as_ref()
            && self.chain.is_writable()
        {
            with_barriers(|| open.flush())?;
        }
        *access = None;
        Ok(())
    }

    fn transfer(
        &self,
        access: &Access,
        memory: &GuestRam,
        request: &BlockRequest,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        let buffer = scratch.bounce();
        let mut done = 0;
        while done < request.len {
            let left = usize::try_from(request.len - done).unwrap_or(usize::MAX);
            let part = left.min(buffer.len());
            let part = &mut buffer[..part];
            let offset = request.offset + done;
            if request.op == BlockOp::Read {
                access.read(&mut *part, offset)?;
                copy_to_guest(memory, &request.segments, done, part)?;
            } else {
                copy_from_guest(memory, &request.segments, done, part)?;
                access.write(&*part, offset)?;
            }
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Where the clusters that lie wholly within a range have their data in the file, if nothing
    /// else (a snapshot) uses that data.
    fn data_of(&self, access: &Access, offset: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
        let cluster_bytes = u64::from(self.chain.header().cluster_bytes);
        let end = offset + len;
        let end = end - end % cluster_bytes;
        let mut at = offset.next_multiple_of(cluster_bytes);
        let mut ranges = Vec::new();
        while at < end {
            let (mapping, mapped) = access.get_shallow_mapping(at, end - at)?;
            if let ShallowMapping::Raw {
                offset,
                writable: true,
                ..
            } = mapping
            {
                ranges.push((offset, mapped));
            }
            if mapped == 0 {
                break;
            }
            at += mapped;
        }
        Ok(ranges)
    }

    /// Gives storage of clusters that are about to be discarded back to the host, which the
    /// library does not. Should the discard fail or the tables be lost, they refer to zeroes.
    fn give_back(&self, ranges: &[(u64, u64)]) {
        for (offset, len) in ranges {
            // An offer; the host may be unable to take it.
            let _ = syscalls::fallocate(self.chain.file(), Fallocate::PunchHole, *offset, *len);
        }
    }

    fn flush(&self, access: &Access) -> io::Result<()> {
        {
            let _one = self.flushing.lock();
            with_barriers(|| access.flush())?;
        }
        access.sync()
    }
}

impl SyncImage for Qcow2Image {
    fn execute(
        &self,
        memory: &GuestRam,
        request: &BlockRequest,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        let &BlockRequest {
            op, offset, len, ..
        } = request;
        let closed = || io::Error::other("the image is not open");
        match op {
            BlockOp::Read | BlockOp::Write => {
                let access = self.access.read();
                self.transfer(
                    access.as_ref().ok_or_else(closed)?,
                    memory,
                    request,
                    scratch,
                )
            }
            BlockOp::Flush => self.flush(self.access.read().as_ref().ok_or_else(closed)?),
            BlockOp::WriteZeroes { unmap: false } => {
                let access = self.access.write();
                access
                    .as_ref()
                    .ok_or_else(closed)?
                    .write_zeroes(offset, len)
            }
            BlockOp::Discard | BlockOp::WriteZeroes { unmap: true } => {
                let mut access = self.access.write();
                let access = access.as_mut().ok_or_else(closed)?;
                // First: what the library frees it may use again at once.
                self.give_back(&self.data_of(access, offset, len)?);
                match op {
                    BlockOp::Discard => access.discard_to_any(offset, len),
                    _ => access.discard_to_zero(offset, len),
                }
            }
        }
    }
}
