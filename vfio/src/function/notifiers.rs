//! What the host has to say about a function: errors, and that it is wanted back.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

use super::interrupts::told;
use crate::backend::{BackendError, IrqKind, VfioBackend};
use crate::kernel::take_events;

/// What the host says (`VFIO_PCI_ERR_IRQ_INDEX`, `VFIO_PCI_REQ_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostNotice {
    /// The device has met an error that it cannot correct (PCIe advanced error reporting).
    Error,
    /// Somebody on the host wants the device: it is to be let go. Said again until it is.
    Request,
}

/// Who hears, on any thread.
pub type NoticeHook = Arc<dyn Fn(HostNotice) + Send + Sync>;

/// After a notice nothing is heard for so long: whoever sends them may send them without end.
const PAUSE: Duration = Duration::from_secs(1);

/// What the thread wakes for.
const STOP: u32 = 0;
const ERROR: u32 = 1;
const REQUEST: u32 = 2;

/// The thread that listens.
pub(super) struct Notifiers {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Notifiers {
    /// Listens to what `backend` has notices for; none if that is nothing.
    pub(super) fn new(backend: &dyn VfioBackend, hook: NoticeHook) -> io::Result<Option<Self>> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let wakes = PollContext::new()?;
        wakes.add(&*stop, STOP)?;
        let mut heard = Vec::new();
        for (kind, token, notice) in [
            (IrqKind::Error, ERROR, HostNotice::Error),
            (IrqKind::Request, REQUEST, HostNotice::Request),
        ] {
            let event = EventFd::new(EFD_NONBLOCK)?;
            match connect(backend, kind, &event) {
                Ok(true) => {
                    wakes.add(&event, token)?;
                    heard.push((event, notice));
                }
                Ok(false) => {}
                Err(error) => told(&error, "the host's notices of an assigned device"),
            }
        }
        if heard.is_empty() {
            return Ok(None);
        }
        let theirs = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("vfio-notices".to_owned())
            .spawn(move || follow(&wakes, &theirs, &heard, &*hook))?;
        Ok(Some(Self {
            stop,
            thread: Some(thread),
        }))
    }
}

/// Has `event` signalled; false where the device has no such notice.
fn connect(
    backend: &dyn VfioBackend,
    kind: IrqKind,
    event: &EventFd,
) -> Result<bool, BackendError> {
    if backend.irq(kind)?.count == 0 {
        return Ok(false);
    }
    backend.set_irqs(kind, &[event]).map(|()| true)
}

fn follow(
    wakes: &PollContext<u32>,
    stop: &EventFd,
    heard: &[(EventFd, HostNotice)],
    hook: &dyn Fn(HostNotice),
) {
    let pause = || -> io::Result<bool> {
        let only_stop = PollContext::<u32>::new()?;
        only_stop.add(stop, STOP)?;
        Ok(only_stop.wait_timeout(PAUSE)?.iter().next().is_some())
    };
    loop {
        let is_over = match wakes.wait() {
            Ok(events) => Ok(events.iter().any(|event| event.token() == STOP)),
            Err(error) => Err(io::Error::from(error)),
        };
        let is_over = is_over.and_then(|is_over| {
            if is_over {
                return Ok(true);
            }
            let new = heard.iter().filter(|(event, _)| take_events(event));
            new.for_each(|(_, notice)| hook(*notice));
            pause()
        });
        match is_over {
            Ok(false) => {}
            Ok(true) => return,
            Err(error) => {
                log::error!(error:% = error; "the host's notices of a device are no longer heard");
                return;
            }
        }
    }
}

impl Drop for Notifiers {
    fn drop(&mut self) {
        // It fails at the counter's end only, and then the thread is awake.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of the host's notices has panicked");
        }
    }
}
