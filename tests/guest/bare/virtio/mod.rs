//! Virtio devices over PCI.

pub(crate) mod disk;
pub(crate) mod hal;
pub(crate) mod nic;
pub(crate) mod transport;

use core::sync::atomic::{Ordering, fence};

use hal::GuestHal;
use virtio_drivers::queue::VirtQueue;

/// Whether the device wants to hear of what was just made available.
///
/// The crate reads the device's wish without the barrier that section 2.7.13.4.1 asks for. The
/// processor may then read it before it has written the available index: a device that goes to
/// sleep in between is never told.
pub(crate) fn should_notify<const SIZE: usize>(queue: &VirtQueue<GuestHal, SIZE>) -> bool {
    fence(Ordering::SeqCst);
    queue.should_notify()
}
