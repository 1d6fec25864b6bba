//! A virtio network device (virtio 1.2, 5.1): one receive and one send queue, no offloads.

use super::disk::negotiate;
use super::hal::GuestHal;
use super::should_notify;
use super::transport::GuestTransport;
use crate::clock::Deadline;
use crate::commands::Failure;
use crate::heap::PageBuffer;
use crate::heartbeat;
use alloc::boxed::Box;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

const QUEUE_SIZE: usize = 256;
const RECEIVE: u16 = 0;
const SEND: u16 = 1;
/// Header and frame each take one descriptor of this size.
const BUFFER: usize = 2048;
/// `virtio_net_hdr` with `num_buffers`, as version 1 devices use it.
const HEADER: usize = 12;
/// Largest frame this driver sends or receives.
pub(crate) const MAX_FRAME: usize = BUFFER - HEADER;

const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
const F_VERSION_1: u64 = 1 << 32;

/// The device.
pub(crate) struct Nic {
    pub(crate) transport: GuestTransport,
    receive: Box<Ring>,
    send: Box<Ring>,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
    pub(crate) link_up: bool,
}

/// A queue whose requests are single buffers.
struct Ring {
    queue: VirtQueue<GuestHal, QUEUE_SIZE>,
    buffers: PageBuffer,
    /// Which buffer a token (a descriptor) stands for.
    buffer_of: [u16; QUEUE_SIZE],
    free: [u16; QUEUE_SIZE],
    free_len: usize,
    /// Requests added since the device was last told.
    unannounced: bool,
}

impl Ring {
    fn new(transport: &mut GuestTransport, index: u16) -> Result<Box<Self>, Failure> {
        let mut free = [0; QUEUE_SIZE];
        for (number, slot) in (0_u16..).zip(&mut free) {
            *slot = number;
        }
        // Kilobytes of bookkeeping: not for the stack.
        Ok(Box::new(Self {
            queue: VirtQueue::new(transport, index, false, false)?,
            buffers: PageBuffer::new(QUEUE_SIZE * BUFFER)?,
            buffer_of: [0; QUEUE_SIZE],
            free,
            free_len: QUEUE_SIZE,
            unannounced: false,
        }))
    }

    fn buffer(&mut self, number: u16) -> &mut [u8] {
        let start = usize::from(number) * BUFFER;
        &mut self.buffers.as_mut_slice()[start..start + BUFFER]
    }

    fn take_free(&mut self) -> Option<u16> {
        self.free_len = self.free_len.checked_sub(1)?;
        Some(self.free[self.free_len])
    }

    fn give_back(&mut self, number: u16) {
        self.free[self.free_len] = number;
        self.free_len += 1;
    }

    fn add(&mut self, number: u16, len: usize, device_writes: bool) -> Result<(), Failure> {
        let start = self.buffer(number).as_mut_ptr();
        // SAFETY: the buffer's `len` bytes; it is off the free list until `pop` returns it.
        let bytes = unsafe { core::slice::from_raw_parts_mut(start, len) };
        let token = if device_writes {
            // SAFETY: the ring's buffers live as long as its queue.
            unsafe { self.queue.add(&[], &mut [bytes]) }?
        } else {
            // SAFETY: as above.
            unsafe { self.queue.add(&[bytes], &mut []) }?
        };
        self.buffer_of[usize::from(token)] = number;
        self.unannounced = true;
        Ok(())
    }

    /// The next used buffer and the bytes the device wrote.
    fn pop(&mut self, device_writes: bool) -> Result<Option<(u16, usize)>, Failure> {
        let Some(token) = self.queue.peek_used() else {
            return Ok(None);
        };
        let number = *self
            .buffer_of
            .get(usize::from(token))
            .ok_or(Failure::new("bad-token"))?;
        let start = self.buffer(number).as_mut_ptr();
        // SAFETY: the buffer `add` passed; the device is done with it.
        let bytes = unsafe { core::slice::from_raw_parts_mut(start, BUFFER) };
        let len = if device_writes {
            // SAFETY: as above.
            unsafe { self.queue.pop_used(token, &[], &mut [bytes]) }?
        } else {
            // SAFETY: as above.
            unsafe { self.queue.pop_used(token, &[bytes], &mut []) }?
        };
        Ok(Some((number, len as usize)))
    }

    fn announce(&mut self, transport: &mut GuestTransport, index: u16) {
        if self.unannounced && should_notify(&self.queue) {
            transport.notify(index);
        }
        self.unannounced = false;
    }
}

impl Nic {
    /// Takes the device over, with all receive buffers posted.
    pub(crate) fn new(mut transport: GuestTransport) -> Result<Self, Failure> {
        let features = negotiate(&mut transport, F_MTU | F_MAC | F_STATUS | F_VERSION_1)?;
        let has = |feature| features & feature != 0;
        let mut mac = [0x02, 0x44, 0x52, 0x56, 0x52, 0x01];
        if has(F_MAC) {
            for (offset, octet) in mac.iter_mut().enumerate() {
                *octet = transport.read_config_space::<u8>(offset)?;
            }
        }
        let link_up = !has(F_STATUS) || transport.read_config_space::<u16>(6)? & 1 != 0;
        let mtu = if has(F_MTU) {
            transport.read_config_space::<u16>(10)?
        } else {
            1500
        };
        let mut receive = Ring::new(&mut transport, RECEIVE)?;
        let mut send = Ring::new(&mut transport, SEND)?;
        // Everything is polled.
        receive.queue.set_dev_notify(false);
        send.queue.set_dev_notify(false);
        transport.finish_init();
        while let Some(number) = receive.take_free() {
            receive.add(number, BUFFER, true)?;
        }
        receive.announce(&mut transport, RECEIVE);
        Ok(Self {
            transport,
            receive,
            send,
            mac,
            mtu,
            link_up,
        })
    }

    /// Hands each received frame to `handle` and posts its buffer again. Returns the number of frames.
    pub(crate) fn receive(&mut self, mut handle: impl FnMut(&mut [u8])) -> Result<u64, Failure> {
        let mut frames = 0;
        while let Some((number, len)) = self.receive.pop(true)? {
            if let Some(frame) = self.receive.buffer(number).get_mut(HEADER..len) {
                handle(frame);
                frames += 1;
            }
            self.receive.add(number, BUFFER, true)?;
            // A flood must not keep the caller from its clock.
            if frames == QUEUE_SIZE as u64 {
                break;
            }
        }
        self.receive.announce(&mut self.transport, RECEIVE);
        Ok(frames)
    }

    /// Queues a frame of `len` bytes that `fill` writes; `false` if every buffer is in flight. Buffers keep
    /// what was last written to them.
    pub(crate) fn send(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<bool, Failure> {
        if self.send.free_len == 0 {
            self.reclaim()?;
        }
        let Some(number) = self.send.take_free() else {
            return Ok(false);
        };
        let buffer = self.send.buffer(number);
        fill(&mut buffer[HEADER..HEADER + len]);
        self.send.add(number, HEADER + len, false)?;
        Ok(true)
    }

    /// Takes back the buffers of sent frames; returns how many.
    pub(crate) fn reclaim(&mut self) -> Result<u64, Failure> {
        let mut sent = 0;
        while let Some((number, _)) = self.send.pop(false)? {
            self.send.give_back(number);
            sent += 1;
        }
        Ok(sent)
    }

    /// Tells the device about queued frames.
    pub(crate) fn flush(&mut self) {
        self.send.announce(&mut self.transport, SEND);
    }

    /// Writes the same bytes into every send buffer, for senders that change little per frame.
    pub(crate) fn preset(&mut self, frame: &[u8]) {
        for number in 0..QUEUE_SIZE {
            let start = number * BUFFER + HEADER;
            self.send.buffers.as_mut_slice()[start..start + frame.len()].copy_from_slice(frame);
        }
    }

    /// Waits until the device has taken every queued frame; `false` if it does not.
    pub(crate) fn drain(&mut self, ms: u64) -> Result<bool, Failure> {
        let deadline = Deadline::after_ms(ms);
        while self.send.free_len < QUEUE_SIZE {
            self.reclaim()?;
            heartbeat::beat();
            core::hint::spin_loop();
            if deadline.passed() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
