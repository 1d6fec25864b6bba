//! What a server may reach of guest memory.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use parking_lot::Mutex;

use super::connection::{Connection, Request};
use super::offer::{Offer, ask, structure_bytes};
use super::protocol::{Command, DMA_READABLE, DMA_WRITABLE, DmaMap, DmaUnmap, Payload, invalid};
use crate::backend::BackendError;
use crate::dma::{DmaAccess, DmaFile, DmaRange, DmaSpace, IovaMap};

/// The ranges that are mapped for the server.
pub(super) struct UserDma {
    connection: Arc<Connection>,
    max_ranges: u64,
    granule: u64,
    /// Held while a range is added or removed.
    mapped: Mutex<IovaMap>,
}

impl UserDma {
    pub(super) fn new(connection: &Arc<Connection>, offer: &Offer) -> Self {
        Self {
            connection: Arc::clone(connection),
            max_ranges: offer.max_dma_ranges,
            granule: offer.dma_granule,
            mapped: Mutex::default(),
        }
    }
}

impl DmaSpace for UserDma {
    fn map(
        &self,
        range: DmaRange,
        access: DmaAccess,
        file: Option<DmaFile<'_>>,
    ) -> Result<(), BackendError> {
        const WHAT: &str = "a range of guest memory cannot be shared with the vfio-user server";
        let refuse = |source| BackendError::Refused { what: WHAT, source };
        let file = file.ok_or_else(|| refuse(io::Error::other("it has no file behind it")))?;
        let mut mapped = self.mapped.lock();
        let is_aligned = |value: u64| value.is_multiple_of(self.granule);
        if !is_aligned(range.iova.0) || !is_aligned(range.len) {
            let granule = self.granule;
            let what = format!("the server's pages have {granule:#x} bytes");
            return Err(refuse(io::Error::other(what)));
        }
        if mapped.ranges().count() as u64 >= self.max_ranges {
            let what = format!("the server takes no more than {}", self.max_ranges);
            return Err(refuse(io::Error::other(what)));
        }
        let inserted = mapped.insert(range);
        inserted.map_err(|error| refuse(io::Error::other(error)))?;
        // The server may reach it before it has answered.
        let served = self.connection.memory().add(range, access, file);
        let sent = served
            .map_err(refuse)
            .and_then(|()| self.send_map(range, access, file));
        if sent.is_err() {
            self.connection.memory().remove(range.iova);
            // It was inserted above.
            let _ = mapped.remove(range.iova);
        }
        sent
    }

    fn unmap(&self, range: DmaRange) -> Result<(), BackendError> {
        const WHAT: &str = "a range of guest memory cannot be taken from the vfio-user server";
        let refuse = |source| BackendError::Refused { what: WHAT, source };
        let mut mapped = self.mapped.lock();
        let removed = mapped.remove(range.iova);
        let removed = removed.map_err(|error| refuse(io::Error::other(error)))?;
        let unmapped = match removed.len == range.len {
            true => self.send_unmap(range),
            false => Err(refuse(io::Error::other(format!(
                "it has {:#x} bytes, not {:#x}",
                removed.len, range.len
            )))),
        };
        match unmapped {
            Ok(()) => self.connection.memory().remove(range.iova),
            // It was there a moment ago.
            Err(_) => drop(mapped.insert(removed)),
        }
        unmapped
    }
}

impl UserDma {
    fn send_map(
        &self,
        range: DmaRange,
        access: DmaAccess,
        DmaFile { file, offset }: DmaFile<'_>,
    ) -> Result<(), BackendError> {
        let flags = match access {
            DmaAccess::Read => DMA_READABLE,
            DmaAccess::ReadWrite => DMA_READABLE | DMA_WRITABLE,
        };
        let map = DmaMap {
            argsz: structure_bytes::<DmaMap>(),
            flags,
            offset,
            address: range.iova.0,
            size: range.len,
        };
        let request = Request {
            command: Command::DmaMap,
            payload: map.encode(&[]),
            descriptors: &[file.as_raw_fd()],
            reply_bytes: 0,
        };
        self.connection.request(request).map(drop)
    }

    fn send_unmap(&self, range: DmaRange) -> Result<(), BackendError> {
        let command = Command::DmaUnmap;
        let argsz = structure_bytes::<DmaUnmap>();
        let unmap = DmaUnmap {
            argsz,
            flags: 0,
            address: range.iova.0,
            size: range.len,
        };
        let reply = ask(&self.connection, command, unmap.encode(&[]), argsz as usize)?;
        let answer = DmaUnmap::decode(&reply.payload).and_then(|(answer, _)| {
            match (answer.address, answer.size) == (unmap.address, unmap.size) {
                true => Ok(()),
                false => Err(invalid("the range's address", answer.address)),
            }
        });
        answer.map_err(|error| self.connection.broken(command, &error))
    }
}
