//! A virtio block device (virtio 1.2, 5.2) with a queue deep enough to be measured.

use super::hal::GuestHal;
use super::should_notify;
use super::transport::GuestTransport;
use crate::clock::Deadline;
use crate::commands::Failure;
use crate::heartbeat;
use alloc::boxed::Box;
use alloc::vec::Vec;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

/// Descriptors in the queue.
pub(crate) const QUEUE_SIZE: usize = 128;
/// Bytes of a sector, whatever the device's block size.
pub(crate) const SECTOR: u64 = 512;

pub(crate) const F_RO: u64 = 1 << 5;
pub(crate) const F_FLUSH: u64 = 1 << 9;
pub(crate) const F_DISCARD: u64 = 1 << 13;
pub(crate) const F_WRITE_ZEROES: u64 = 1 << 14;
const F_SEG_MAX: u64 = 1 << 2;
const F_BLK_SIZE: u64 = 1 << 6;
const F_MQ: u64 = 1 << 12;
const F_INDIRECT: u64 = 1 << 28;
const F_VERSION_1: u64 = 1 << 32;
const WANTED: u64 = F_RO
    | F_FLUSH
    | F_DISCARD
    | F_WRITE_ZEROES
    | F_SEG_MAX
    | F_BLK_SIZE
    | F_MQ
    | F_INDIRECT
    | F_VERSION_1;

/// Request status: done.
pub(crate) const STATUS_OK: u8 = 0;
/// Request status: device or driver error.
pub(crate) const STATUS_IOERR: u8 = 1;
/// Request status: unknown request type.
pub(crate) const STATUS_UNSUPPORTED: u8 = 2;

/// A request may take this long before the test fails.
const PATIENCE_MS: u64 = 20_000;

/// Request types.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Operation {
    Read = 0,
    Write = 1,
    Flush = 4,
    GetId = 8,
    Discard = 11,
    WriteZeroes = 13,
    /// A type that no device knows.
    Nonsense = 0x1234,
}

/// The data part of a request.
pub(crate) enum Data<'a> {
    None,
    /// Read by the device.
    Out(&'a [u8]),
    /// Written by the device.
    In(&'a mut [u8]),
}

/// The configuration space fields the tests use.
#[derive(Clone, Copy)]
pub(crate) struct Config {
    pub(crate) sectors: u64,
    pub(crate) seg_max: u32,
    pub(crate) block_size: u32,
    pub(crate) queues: u16,
    pub(crate) max_discard_sectors: u32,
    pub(crate) max_write_zeroes_sectors: u32,
}

/// The device, one of its queues in use.
pub(crate) struct Disk {
    pub(crate) transport: GuestTransport,
    pub(crate) queue: Box<VirtQueue<GuestHal, QUEUE_SIZE>>,
    queue_index: u16,
    pub(crate) features: u64,
    pub(crate) config: Config,
}

/// Resets a device and agrees on features, up to but not including DRIVER_OK (virtio 1.2, 3.1.1).
pub(crate) fn negotiate(transport: &mut GuestTransport, wanted: u64) -> Result<u64, Failure> {
    use virtio_drivers::transport::DeviceStatus as Status;
    transport.set_status(Status::empty());
    transport.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
    let features = transport.read_device_features() & wanted;
    transport.write_driver_features(features);
    let agreed = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    transport.set_status(agreed);
    if transport.get_status() != agreed {
        return Err(Failure::new("features-refused").with("features", features));
    }
    Ok(features)
}

impl Disk {
    /// Takes the device over and sets up queue `queue_index`.
    pub(crate) fn new(mut transport: GuestTransport, queue_index: u16) -> Result<Self, Failure> {
        let features = negotiate(&mut transport, WANTED)?;
        let config = read_config(&transport, features)?;
        if queue_index >= config.queues {
            return Err(Failure::new("no-such-queue").with("queues", u64::from(config.queues)));
        }
        let indirect = features & F_INDIRECT != 0;
        let queue = Box::new(VirtQueue::new(
            &mut transport,
            queue_index,
            indirect,
            false,
        )?);
        transport.finish_init();
        Ok(Self {
            transport,
            queue,
            queue_index,
            features,
            config,
        })
    }

    pub(crate) fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Requests that fit the queue at once, each with header, data and status.
    pub(crate) fn max_depth(&self) -> usize {
        if self.has(F_INDIRECT) {
            QUEUE_SIZE
        } else {
            QUEUE_SIZE / 3
        }
    }

    /// Tells the device about new requests, if it wants to know.
    pub(crate) fn kick(&mut self) {
        if should_notify(&self.queue) {
            self.transport.notify(self.queue_index);
        }
    }

    /// One request, waited for; its data in pieces of at most `piece` bytes. Returns its status.
    pub(crate) fn request(
        &mut self,
        operation: Operation,
        sector: u64,
        data: Data<'_>,
        piece: usize,
    ) -> Result<u8, Failure> {
        let header = header(operation, sector);
        let mut status = [0xff];
        let mut readable: Vec<&[u8]> = Vec::from([&header[..]]);
        let mut writable: Vec<&mut [u8]> = Vec::new();
        match data {
            Data::None => {}
            Data::Out(bytes) => readable.extend(bytes.chunks(piece)),
            Data::In(bytes) => writable.extend(bytes.chunks_mut(piece)),
        }
        writable.push(&mut status);
        // SAFETY: the buffers outlive the request: this function waits for it, or resets the device.
        let token = unsafe { self.queue.add(&readable, &mut writable) }?;
        self.kick();
        let deadline = Deadline::after_ms(PATIENCE_MS);
        while !self.queue.can_pop() {
            heartbeat::beat();
            core::hint::spin_loop();
            if deadline.passed() {
                let needs_reset = self.transport.needs_reset();
                self.transport
                    .set_status(virtio_drivers::transport::DeviceStatus::empty());
                return Err(
                    Failure::new("request-timeout").with("needs_reset", u64::from(needs_reset))
                );
            }
        }
        // SAFETY: the same buffers as above.
        unsafe { self.queue.pop_used(token, &readable, &mut writable) }?;
        Ok(status[0])
    }

    /// A request that must succeed.
    pub(crate) fn expect_ok(
        &mut self,
        operation: Operation,
        sector: u64,
        data: Data<'_>,
        piece: usize,
    ) -> Result<(), Failure> {
        match self.request(operation, sector, data, piece)? {
            STATUS_OK => Ok(()),
            status => {
                let failure = Failure::new("request-failed").with("status", u64::from(status));
                Err(failure
                    .with("type", operation as u64)
                    .with("sector", sector))
            }
        }
    }

    /// Puts a slot's request into the queue without telling the device. Returns its token.
    ///
    /// # Safety
    /// The slot and its data stay put and untouched until `complete` gets the same slot and token.
    pub(crate) unsafe fn submit(&mut self, slot: &mut Slot) -> Result<u16, Failure> {
        slot.with_buffers(|readable, writable| {
            // SAFETY: the caller vouches for the buffers' lifetime.
            let token = unsafe { self.queue.add(readable, writable) }?;
            Ok(token)
        })
    }

    /// Takes a finished request back; returns its status.
    ///
    /// # Safety
    /// `token` came from `submit` with this slot and is next in the used ring.
    pub(crate) unsafe fn complete(&mut self, slot: &mut Slot, token: u16) -> Result<u8, Failure> {
        slot.with_buffers(|readable, writable| {
            // SAFETY: the caller vouches that these are the buffers of `token`.
            unsafe { self.queue.pop_used(token, readable, writable) }?;
            Ok(())
        })?;
        Ok(slot.status[0])
    }
}

/// A request in flight: header, data, status.
pub(crate) struct Slot {
    header: [u8; 16],
    status: [u8; 1],
    data: *mut u8,
    len: usize,
    operation: Operation,
    /// When it was submitted, in TSC ticks.
    pub(crate) started: u64,
}

impl Slot {
    /// A slot over a data buffer.
    ///
    /// # Safety
    /// `data` is valid for `len` bytes as long as the slot lives. Slots may share a buffer whose content
    /// nobody looks at.
    pub(crate) unsafe fn new(data: *mut u8, len: usize) -> Self {
        Self {
            header: [0; 16],
            status: [0],
            data,
            len,
            operation: Operation::Read,
            started: 0,
        }
    }

    /// Sets the next request.
    pub(crate) fn set(&mut self, operation: Operation, sector: u64) {
        self.operation = operation;
        self.header = header(operation, sector);
        self.status = [0xff];
    }

    fn with_buffers<T>(
        &mut self,
        work: impl for<'b> FnOnce(&'b [&'b [u8]], &'b mut [&'b mut [u8]]) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        // SAFETY: `new`'s caller vouches for the buffer.
        let data = unsafe { core::slice::from_raw_parts_mut(self.data, self.len) };
        if self.operation == Operation::Write {
            work(&[&self.header, data], &mut [&mut self.status])
        } else {
            work(&[&self.header], &mut [data, &mut self.status])
        }
    }
}

fn header(operation: Operation, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&(operation as u32).to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn read_config(transport: &GuestTransport, features: u64) -> Result<Config, Failure> {
    let word = |offset| -> Result<u32, Failure> { Ok(transport.read_config_space::<u32>(offset)?) };
    let word_if = |feature, offset| {
        if features & feature != 0 {
            word(offset)
        } else {
            Ok(0)
        }
    };
    let queues = if features & F_MQ != 0 {
        transport.read_config_space::<u16>(34)?
    } else {
        1
    };
    Ok(Config {
        sectors: u64::from(word(0)?) | u64::from(word(4)?) << 32,
        seg_max: word_if(F_SEG_MAX, 12)?,
        block_size: word_if(F_BLK_SIZE, 20)?,
        queues,
        max_discard_sectors: word_if(F_DISCARD, 36)?,
        max_write_zeroes_sectors: word_if(F_WRITE_ZEROES, 48)?,
    })
}
