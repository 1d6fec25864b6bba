//! The legacy interrupt line: a thread that asserts it, and who hears when the guest is done.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use devices::interrupt::{LineSource, SharedLine};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

use super::interrupts::told;
use crate::backend::VfioBackend;
use crate::kernel::take_events;

/// What the thread wakes for.
const STOP: u32 = 0;
const SIGNAL: u32 = 1;

/// The line of one function.
pub(super) struct Intx {
    /// The device signals it, and is masked then.
    pub(super) event: Arc<EventFd>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    _unmasker: Arc<Unmasker>,
}

/// Lets the device assert its line again: if it still has something to say it does at once.
struct Unmasker {
    backend: Arc<dyn VfioBackend>,
    /// Whether the device has signalled, and is masked therefore. Others on the line are handled,
    /// too.
    has_signalled: AtomicBool,
}

impl LineSource for Unmasker {
    fn handled(&self) {
        if !self.has_signalled.swap(false, Ordering::AcqRel) {
            return;
        }
        if let Err(error) = self.backend.unmask_intx() {
            told(
                &error,
                "the interrupt line of an assigned device stays masked",
            );
        }
    }
}

impl Intx {
    /// Connects the device's signal to `line`.
    pub(super) fn new(
        backend: &Arc<dyn VfioBackend>,
        line: Arc<dyn SharedLine>,
    ) -> io::Result<Self> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let unmasker = Arc::new(Unmasker {
            backend: Arc::clone(backend),
            has_signalled: AtomicBool::new(false),
        });
        let source: Arc<dyn LineSource> = unmasker.clone();
        line.listen(Arc::downgrade(&source));
        let wakes = PollContext::new()?;
        wakes.add(&stop, STOP)?;
        wakes.add(&*event, SIGNAL)?;
        let follower = (Arc::clone(&event), Arc::clone(&unmasker));
        let thread = std::thread::Builder::new()
            .name("intx".to_owned())
            .spawn(move || follow(&wakes, (&follower.0, &follower.1), &*line))?;
        Ok(Self {
            event,
            stop,
            thread: Some(thread),
            _unmasker: unmasker,
        })
    }
}

fn follow(wakes: &PollContext<u32>, (event, source): (&EventFd, &Unmasker), line: &dyn SharedLine) {
    loop {
        let is_over = match wakes.wait() {
            Ok(events) => events.iter().any(|event| event.token() == STOP),
            Err(error) => {
                log::error!(error:% = error; "an interrupt line is no longer followed");
                return;
            }
        };
        if is_over {
            return;
        }
        if take_events(event) {
            source.has_signalled.store(true, Ordering::Release);
            line.raise();
        }
    }
}

impl Drop for Intx {
    fn drop(&mut self) {
        // It fails at the counter's end only, and then the thread is awake.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of an interrupt line has panicked");
        }
    }
}
