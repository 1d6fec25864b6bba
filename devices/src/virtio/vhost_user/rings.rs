//! Rings that another process works on: where it got to, and where it signals.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::interrupt::MsiRoute;
use crate::virtio::queue::Virtqueue;

const DRAIN_INTERVAL: Duration = Duration::from_millis(1);

/// Waits until everything that the driver has made available has come back, or `is_late`.
pub(super) fn finish(queue: &Virtqueue, is_late: impl Fn() -> bool) {
    let in_flight = || match (queue.available_index(), queue.used_index()) {
        (Ok(available), Ok(used)) => available.wrapping_sub(used),
        // A ring that cannot be read has nothing to wait for.
        _ => 0,
    };
    // Nor has one with impossible indices.
    let is_busy = || (1..=queue.size()).contains(&in_flight());
    if is_busy() {
        // The driver may have been stopped between offering a request and saying so.
        let _ = queue.doorbell().write(1);
    }
    while is_busy() && !is_late() {
        thread::sleep(DRAIN_INTERVAL);
    }
}

/// Waits until everything taken from the ring before `next_avail` has come back. False when that
/// does not happen in time.
pub(super) fn drain(queue: &Virtqueue, next_avail: u16, deadline: Instant) -> bool {
    loop {
        let in_flight = queue
            .used_index()
            .map(|used_index| next_avail.wrapping_sub(used_index));
        match in_flight {
            Ok(0) => return true,
            // Neither a ring that cannot be read nor one with impossible indices will ever agree.
            Err(_) => return false,
            Ok(count) if count > queue.size() || Instant::now() >= deadline => return false,
            Ok(_) => thread::sleep(DRAIN_INTERVAL),
        }
    }
}

/// Marks the used ring as written. Peers log the entries and the index that they write there; QEMU's
/// libvhost-user (7.2 for one) does not log the event index behind them.
pub(super) fn mark_used_ring(queue: &Virtqueue) {
    // Section 2.7.8: flags, index and event index of 2 bytes, entries of 8.
    let bytes = 6 + 8 * usize::from(queue.size());
    let at = GuestAddress(queue.state().used_ring);
    for slice in queue.memory().get_slices(at, bytes).flatten() {
        slice.bitmap().mark_dirty(0, slice.len());
    }
}

/// The first queue with requests that a previous peer has taken and not returned.
pub(super) fn first_unfinished(queues: &[Virtqueue]) -> Option<u16> {
    let unfinished = queues
        .iter()
        .find(|queue| queue.used_index().ok() != Some(queue.state().next_avail));
    unfinished.map(Virtqueue::index)
}

/// Where a peer signals that buffers were used.
pub(super) enum Call {
    Route(Arc<dyn MsiRoute>),
    /// The driver polls.
    Unheard(EventFd),
}

impl Call {
    pub(super) fn of(queue: &Virtqueue) -> io::Result<Self> {
        let route = queue.interrupt().shared().queue_route(queue.index());
        match route {
            Some(route) => Ok(Self::Route(Arc::clone(route))),
            None => EventFd::new(EFD_NONBLOCK).map(Self::Unheard),
        }
    }

    pub(super) fn eventfd(&self) -> &EventFd {
        match self {
            Self::Route(route) => route.eventfd(),
            Self::Unheard(event) => event,
        }
    }
}
