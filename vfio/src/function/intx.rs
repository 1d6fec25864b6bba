//! The legacy interrupt line: a thread that asserts it, and who hears when the guest is done.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use devices::interrupt::{LineSource, SharedLine};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

use super::interrupts::told;
use crate::backend::VfioBackend;

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
struct Unmasker(Arc<dyn VfioBackend>);

impl LineSource for Unmasker {
    fn handled(&self) {
        if let Err(error) = self.0.unmask_intx() {
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
        let unmasker = Arc::new(Unmasker(Arc::clone(backend)));
        let source: Arc<dyn LineSource> = unmasker.clone();
        line.listen(Arc::downgrade(&source));
        let wakes = PollContext::new()?;
        wakes.add(&stop, STOP)?;
        wakes.add(&*event, SIGNAL)?;
        let signalled = Arc::clone(&event);
        let thread = std::thread::Builder::new()
            .name("intx".to_owned())
            .spawn(move || follow(&wakes, &signalled, &*line))?;
        Ok(Self {
            event,
            stop,
            thread: Some(thread),
            _unmasker: unmasker,
        })
    }
}

fn follow(wakes: &PollContext<u32>, event: &EventFd, line: &dyn SharedLine) {
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
        if event.read().is_ok() {
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
