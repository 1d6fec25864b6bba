//! Byte streams between the guest and a host terminal, file or socket.

use std::collections::VecDeque;

use vmm_sys_util::eventfd::EventFd;

/// A device with a byte stream in each direction: the serial port, a virtio console port.
///
/// The device never touches host descriptors and a vCPU never waits for them: a host thread moves
/// the bytes, driven by [`CharDevice::event`].
pub trait CharDevice: Send + Sync {
    /// Readable when there is output to take, or when the guest has made room for input after
    /// [`CharDevice::receive`] refused some.
    fn event(&self) -> &EventFd;

    /// Moves up to `buf.len()` bytes of guest output into `buf`; returns how many.
    fn take_output(&self, buf: &mut [u8]) -> usize;

    /// Offers input; returns how many bytes the device had room for.
    fn receive(&self, data: &[u8]) -> usize;
}

/// A bounded byte queue. What does not fit stays with the sender.
#[derive(Debug)]
pub(crate) struct ByteQueue {
    bytes: VecDeque<u8>,
    capacity: usize,
}

impl ByteQueue {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            capacity,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.room() == 0
    }

    pub(crate) fn room(&self) -> usize {
        self.capacity.saturating_sub(self.bytes.len())
    }

    /// Appends what fits; returns how many bytes that were.
    pub(crate) fn push(&mut self, data: &[u8]) -> usize {
        let fits = data.len().min(self.room());
        self.bytes.extend(data.iter().take(fits));
        fits
    }

    pub(crate) fn pop(&mut self) -> Option<u8> {
        self.bytes.pop_front()
    }

    /// Moves bytes from the front into `buf`; returns how many.
    pub(crate) fn take(&mut self, buf: &mut [u8]) -> usize {
        let count = buf.len().min(self.bytes.len());
        for (slot, byte) in buf.iter_mut().zip(self.bytes.drain(..count)) {
            *slot = byte;
        }
        count
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
    }

    pub(crate) fn to_vec(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_is_bounded_and_keeps_order() {
        let mut queue = ByteQueue::new(3);
        assert_eq!(queue.push(b"abcd"), 3);
        assert!(queue.is_full());
        assert_eq!(queue.pop(), Some(b'a'));
        assert_eq!(queue.push(b"xy"), 1);
        let mut buf = [0; 8];
        assert_eq!(queue.take(&mut buf), 3);
        assert_eq!(&buf[..3], b"bcx");
        assert!(queue.is_empty());
    }
}
