//! The legacy interrupt line: a thread that asserts it, and who hears when the guest is done.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use devices::interrupt::{LineSource, SharedLine};
use parking_lot::Mutex;
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
    signals: Arc<Signals>,
}

/// The device's signals, on their way to the line.
struct Signals {
    event: Arc<EventFd>,
    unmasker: Arc<Unmasker>,
    line: Arc<dyn SharedLine>,
    /// Held from taking a signal to raising the line.
    turn: Mutex<()>,
}

impl Signals {
    /// Raises the line, if the device has signalled.
    fn pass_on(&self) {
        let _turn = self.turn.lock();
        if take_events(&self.event) {
            self.unmasker.has_signalled.store(true, Ordering::Release);
            self.line.raise();
        }
    }
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
        let signals = Arc::new(Signals {
            event: Arc::clone(&event),
            unmasker,
            line,
            turn: Mutex::new(()),
        });
        let follower = Arc::clone(&signals);
        let thread = std::thread::Builder::new()
            .name("intx".to_owned())
            .spawn(move || follow(&wakes, &follower))?;
        Ok(Self {
            event,
            stop,
            thread: Some(thread),
            signals,
        })
    }

    /// Once the device stands still, every signal of its has raised the line, and none does any more.
    pub(super) fn settle(&self) {
        self.signals.pass_on();
    }
}

fn follow(wakes: &PollContext<u32>, signals: &Signals) {
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
        signals.pass_on();
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
