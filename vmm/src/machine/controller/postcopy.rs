//! A machine that runs here while parts of its memory are still at its source.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{CommandError, Controller};
use crate::machine::events::EventKind;
use crate::machine::lifecycle::{Request, VmState};
use crate::machine::runtime::{Machine, MachineError};

/// How long vCPUs may take to stop that do not wait for a page.
const HOLD_TIME: Duration = Duration::from_millis(200);

/// How long the source may take to hear that nobody needs its pages any more.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long devices may wait for a page that a VM's end needs: a source that is connected and does
/// not send it is as bad as none.
const END_TIME: Duration = Duration::from_secs(30);

const TICK: Duration = Duration::from_millis(10);

/// How a post-copy stands: what the thread that fetches pages and the controller tell each other.
#[derive(Debug, Default)]
pub(in crate::machine) struct Fate {
    /// The machine was started, or is about to be.
    pub(in crate::machine) started: Arc<AtomicBool>,
    /// The connection is cut.
    pub(in crate::machine) cut: AtomicBool,
    /// The machine is no more.
    pub(in crate::machine) ended: AtomicBool,
    /// All pages are here, though the source may not know yet.
    pub(in crate::machine) whole: Arc<AtomicBool>,
    /// The source knows that all pages are here, or nobody fetches them any more.
    pub(in crate::machine) over: AtomicBool,
    /// The machine stands still for want of its pages alone, and goes on with them.
    pub(in crate::machine) goes_on: AtomicBool,
}

impl Fate {
    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn is_whole(&self) -> bool {
        self.whole.load(Ordering::SeqCst)
    }
}

impl Controller {
    /// The post-copy, while pages are missing.
    fn open_postcopy(&self) -> Option<&Fate> {
        let fate = self.postcopy.as_deref();
        fate.filter(|fate| !fate.is_over() && !fate.is_whole())
    }

    /// Whether pages are missing.
    pub(super) fn has_missing_pages(&self) -> bool {
        self.open_postcopy().is_some()
    }

    /// Whether they are, and the connection to them is cut.
    pub(super) fn is_cut(&self) -> bool {
        self.open_postcopy().is_some_and(Fate::is_cut)
    }

    /// What cannot be done while the connection to the pages is cut.
    pub(super) fn check_pages(&self, request: Request) -> Result<(), CommandError> {
        match request {
            Request::Resume | Request::Reset if self.is_cut() => Err(CommandError::PagesCut),
            _ => Ok(()),
        }
    }

    /// The connection is cut: vCPUs that do not wait for a page stop, too.
    pub(in crate::machine) fn hold_for_pages(&mut self) {
        let held = self.machine.vcpus.hold(HOLD_TIME);
        log::warn!(held, vcpus = self.machine.vcpus.len(); "vCPUs stopped, the others wait for memory");
        if self.state == VmState::Running {
            self.set_paused();
            if let Some(fate) = &self.postcopy {
                fate.goes_on.store(true, Ordering::SeqCst);
            }
        }
        self.events.publish(EventKind::PagesCut);
    }

    /// Somebody wants a machine paused that stands still for want of its pages: it does not go on
    /// with them.
    pub(super) fn note_pause(&self) {
        if let Some(fate) = &self.postcopy {
            fate.goes_on.store(false, Ordering::SeqCst);
        }
    }

    /// Pages come again, and the machine goes on, unless somebody has paused it.
    ///
    /// # Errors
    /// [`MachineError`]; the machine stays paused.
    pub(in crate::machine) fn go_on_with_pages(&mut self) -> Result<(), MachineError> {
        let Some(fate) = self.postcopy.clone() else {
            return Ok(());
        };
        fate.cut.store(false, Ordering::SeqCst);
        self.events.publish(EventKind::PagesLinked);
        if self.end.is_some() {
            return Ok(());
        }
        if !fate.goes_on.swap(false, Ordering::SeqCst) {
            // vCPUs were held at most; devices and the guest's time stand still, too, in a pause.
            return match self.machine.has_run {
                true => self.machine.pause(),
                false => Ok(()),
            };
        }
        if self.machine.has_run {
            self.machine.vcpus.run();
        } else {
            fate.started.store(true, Ordering::SeqCst);
            self.machine.start()?;
        }
        self.state = VmState::Running;
        self.events.publish(EventKind::Resumed);
        Ok(())
    }

    /// Takes the machine apart at its end.
    pub(super) fn take_apart(self) {
        let Some(fate) = self.postcopy.clone().filter(|fate| !fate.is_over()) else {
            return;
        };
        if fate.is_cut() {
            // Whoever waits for a page would wait for ever, or go on with zeroes and write them to
            // a disk. The end of the process ends them.
            log::warn!("the machine is left as it is: parts of its memory never came");
            std::mem::forget(self.machine);
        } else {
            take_apart_unless_cut(self.machine, &fate);
        }
        fate.ended.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + FAREWELL;
        while !fate.is_over() && Instant::now() < deadline {
            std::thread::sleep(TICK);
        }
    }
}

/// A device may be waiting for a page; when the connection breaks now, it waits for ever, and so
/// would this thread.
fn take_apart_unless_cut(machine: Machine, fate: &Fate) {
    let machine = Arc::new(Mutex::new(Some(machine)));
    let theirs = Arc::clone(&machine);
    let thread = std::thread::Builder::new().name("ctl-end".to_owned());
    let thread = thread.spawn(move || drop(theirs.lock().take()));
    let thread = match thread {
        Ok(thread) => thread,
        Err(error) => {
            log::warn!(error:%; "no thread to take the machine apart");
            return drop(machine.lock().take());
        }
    };
    let deadline = Instant::now() + END_TIME;
    while !thread.is_finished() && !fate.is_cut() && Instant::now() < deadline {
        std::thread::sleep(TICK);
    }
    if !thread.is_finished() {
        log::warn!(
            "parts of the machine wait for memory that never came, and are left as they are"
        );
    }
}
