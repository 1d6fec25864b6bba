//! The driver's side of a block device, for tests: lays requests out in guest RAM.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::GuestRam;
use crate::testing::{Buffer, DriverQueue, FakeRoute, ram};
use crate::virtio::queue::Virtqueue;

pub(super) const SECTOR: usize = 512;
/// A status that no device writes.
pub(super) const UNANSWERED: u8 = 0xee;

const HEADERS: u64 = 0x1_0000;
const STATUSES: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
const DATA_STRIDE: u64 = 0x4000;
const RAM_BYTES: usize = 0x40_0000;

/// One request in guest RAM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) head: u16,
    /// Where its data lies.
    pub(super) data: u64,
    status: u64,
}

/// A queue and the RAM around it.
pub(super) struct BlockDriver {
    pub(super) memory: Arc<GuestRam>,
    pub(super) queue: DriverQueue,
    made: u64,
}

impl BlockDriver {
    pub(super) fn new(queue_size: u16) -> Self {
        let memory = ram(RAM_BYTES);
        let queue = DriverQueue::new(&memory, 0, queue_size);
        Self {
            memory,
            queue,
            made: 0,
        }
    }

    pub(super) fn device_side(&self) -> (Virtqueue, Arc<FakeRoute>) {
        self.queue.device_side(0)
    }

    /// The places of the next request, header and status filled in.
    fn place(&mut self, kind: u32, sector: u64) -> (u64, Request) {
        let slot = self.made % 128;
        self.made += 1;
        let header = HEADERS + slot * 16;
        self.store(header, &kind.to_le_bytes());
        self.store(header + 4, &[0; 4]);
        self.store(header + 8, &sector.to_le_bytes());
        let request = Request {
            head: 0,
            data: DATA + slot * DATA_STRIDE,
            status: STATUSES + slot,
        };
        self.store(request.status, &[UNANSWERED]);
        (header, request)
    }

    /// Offers a request whose `len` data bytes the device writes.
    pub(super) fn offer_in(&mut self, kind: u32, sector: u64, len: u32) -> Request {
        let (header, mut request) = self.place(kind, sector);
        let mut buffers = vec![Buffer::readable(header, 16)];
        if len > 0 {
            buffers.push(Buffer::writable(request.data, len));
        }
        buffers.push(Buffer::writable(request.status, 1));
        request.head = self.queue.offer(&buffers);
        request
    }

    /// Offers a request whose data the device reads.
    pub(super) fn offer_out(&mut self, kind: u32, sector: u64, data: &[u8]) -> Request {
        let (header, mut request) = self.place(kind, sector);
        let len = u32::try_from(data.len()).unwrap();
        let mut buffers = vec![Buffer::readable(header, 16)];
        if len > 0 {
            self.store(request.data, data);
            buffers.push(Buffer::readable(request.data, len));
        }
        buffers.push(Buffer::writable(request.status, 1));
        request.head = self.queue.offer(&buffers);
        request
    }

    /// Offers a discard or write-zeroes request of ranges (sector, sectors, flags).
    pub(super) fn offer_ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> Request {
        let mut data = Vec::new();
        for (sector, sectors, flags) in ranges {
            data.extend(sector.to_le_bytes());
            data.extend(sectors.to_le_bytes());
            data.extend(flags.to_le_bytes());
        }
        self.offer_out(kind, 0, &data)
    }

    pub(super) fn status(&self, request: &Request) -> u8 {
        self.memory.read_obj(GuestAddress(request.status)).unwrap()
    }

    pub(super) fn data(&self, request: &Request, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let at = GuestAddress(request.data);
        self.memory.read_slice(&mut data, at).unwrap();
        data
    }

    pub(super) fn store(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }
}
