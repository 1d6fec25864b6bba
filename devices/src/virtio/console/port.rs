//! The host's side of the console: two bounded buffers and the terminal's size.

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chardev::{ByteQueue, CharDevice};
use crate::virtio::interrupt::VirtioInterrupt;

/// Bytes that wait for the guest, and for the host, at most.
pub(super) const CAPACITY: usize = 64 << 10;

/// Size of a terminal in characters; zeroes when it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleSize {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

impl ConsoleSize {
    fn is_known(self) -> bool {
        self != Self::default()
    }
}

struct Inner {
    input: ByteQueue,
    output: ByteQueue,
    /// Input was refused; tell the host when there is room.
    input_refused: bool,
    /// The worker waits for room in `output`.
    output_blocked: bool,
    size: ConsoleSize,
    /// What the driver knows.
    announced: Option<ConsoleSize>,
    /// A driver ran and may go on: neither reset nor active.
    stopped: bool,
    /// The driver's configuration interrupt while the device is active.
    interrupt: Option<Arc<VirtioInterrupt>>,
}

impl Inner {
    /// Tells a driver about a size that it does not know.
    fn announce(&mut self) {
        let Some(interrupt) = &self.interrupt else {
            return;
        };
        let known = self.announced.unwrap_or_default();
        if self.size.is_known() && self.size != known {
            self.announced = Some(self.size);
            interrupt.config_changed();
        }
    }
}

/// The console as the host sees it.
pub struct ConsolePort {
    /// Wakes the host's thread.
    event: EventFd,
    /// Wakes the device's thread.
    wake: EventFd,
    /// Held for moments, by the host's thread, the device's thread and, for configuration
    /// accesses, by vCPUs under the transport's lock. Interrupt routes are the only locks taken
    /// under it.
    inner: Mutex<Inner>,
}

impl ConsolePort {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_NONBLOCK)?,
            wake: EventFd::new(EFD_NONBLOCK)?,
            inner: Mutex::new(Inner {
                input: ByteQueue::new(CAPACITY),
                output: ByteQueue::new(CAPACITY),
                input_refused: false,
                output_blocked: false,
                size: ConsoleSize::default(),
                announced: None,
                stopped: false,
                interrupt: None,
            }),
        })
    }

    /// Sets the terminal's size; the driver hears of it now or when it runs.
    pub fn resize(&self, size: ConsoleSize) {
        let mut inner = self.lock();
        inner.size = size;
        inner.announce();
    }

    /// The terminal's size.
    #[must_use]
    pub fn size(&self) -> ConsoleSize {
        self.lock().size
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// A driver runs, or does so no longer.
    pub(super) fn connect(&self, interrupt: Option<Arc<VirtioInterrupt>>) {
        let mut inner = self.lock();
        inner.stopped = interrupt.is_none();
        inner.interrupt = interrupt;
        inner.announce();
        if !inner.stopped {
            self.ask_for_refused(&mut inner);
        }
    }

    /// Appends output; returns how much fitted. If not all did, [`ConsolePort::wake`] is
    /// signalled when there is room.
    pub(super) fn transmit(&self, data: &[u8]) -> usize {
        let mut inner = self.lock();
        let was_empty = inner.output.is_empty();
        let accepted = inner.output.push(data);
        inner.output_blocked = accepted < data.len();
        if was_empty && accepted > 0 {
            signal(&self.event);
        }
        accepted
    }

    /// Appends output that cannot wait; returns how much fitted.
    pub(super) fn emergency(&self, data: &[u8]) -> usize {
        let mut inner = self.lock();
        let was_empty = inner.output.is_empty();
        let accepted = inner.output.push(data);
        if was_empty && accepted > 0 {
            signal(&self.event);
        }
        accepted
    }

    pub(super) fn has_input(&self) -> bool {
        !self.lock().input.is_empty()
    }

    /// Moves input into `buf`; returns how much.
    pub(super) fn take_input(&self, buf: &mut [u8]) -> usize {
        let mut inner = self.lock();
        let count = inner.input.take(buf);
        if count > 0 {
            self.ask_for_refused(&mut inner);
        }
        count
    }

    /// The host may offer what was refused.
    fn ask_for_refused(&self, inner: &mut Inner) {
        if std::mem::take(&mut inner.input_refused) {
            signal(&self.event);
        }
    }

    /// Input of the previous driver is not the next one's; output was sent before the reset.
    pub(super) fn reset(&self) {
        let mut inner = self.lock();
        inner.input.clear();
        inner.announced = None;
        inner.output_blocked = false;
        inner.stopped = false;
        self.ask_for_refused(&mut inner);
    }

    /// The size that the driver knows and the input that waits for it.
    pub(super) fn save(&self) -> (ConsoleSize, Vec<u8>) {
        let inner = self.lock();
        (inner.announced.unwrap_or(inner.size), inner.input.to_vec())
    }

    /// Takes over a driver that knows `announced`. A size that the host has set already stays
    /// and is announced when the device becomes active.
    pub(super) fn restore(&self, announced: ConsoleSize, input: &[u8]) {
        let mut inner = self.lock();
        inner.announced = Some(announced);
        if !inner.size.is_known() {
            inner.size = announced;
        }
        inner.input.clear();
        inner.input.push(input);
    }
}

impl CharDevice for ConsolePort {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn take_output(&self, buf: &mut [u8]) -> usize {
        let mut inner = self.lock();
        let count = inner.output.take(buf);
        if count > 0 && std::mem::take(&mut inner.output_blocked) {
            signal(&self.wake);
        }
        count
    }

    /// Takes nothing while the driver is stopped: what has been saved stays true.
    fn receive(&self, data: &[u8]) -> usize {
        let mut inner = self.lock();
        if inner.stopped {
            inner.input_refused = true;
            return 0;
        }
        let was_empty = inner.input.is_empty();
        let accepted = inner.input.push(data);
        inner.input_refused = accepted < data.len();
        if was_empty && accepted > 0 {
            signal(&self.wake);
        }
        accepted
    }
}

fn signal(event: &EventFd) {
    // The counter saturating means that the other side has a signal it has not yet seen.
    let _ = event.write(1);
}
