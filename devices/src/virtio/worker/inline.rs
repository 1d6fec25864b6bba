//! Workers without threads: a test decides when they run, so that equal inputs take equal paths.

use std::cell::RefCell;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::{EventLoop, Handler};

/// A loop that its worker owns; taken out when the worker stops.
pub(super) type Shared<H> = Arc<Mutex<Option<EventLoop<H>>>>;

thread_local! {
    /// The loops of this thread; `None`: workers get threads, as usual.
    static LOOPS: RefCell<Option<Vec<Weak<dyn Turn>>>> = const { RefCell::new(None) };
}

trait Turn {
    /// Handles what is ready.
    fn turn(&self);
}

impl<H: Handler> Turn for Mutex<Option<EventLoop<H>>> {
    fn turn(&self) {
        if let Some(events) = &mut *self.lock() {
            events.turn(false);
        }
    }
}

/// Workers started on this thread from now on get no threads of their own.
pub(crate) fn enable() {
    LOOPS.with_borrow_mut(|loops| {
        loops.get_or_insert_default();
    });
}

/// Lets each worker of this thread handle what is ready, once, in the order they were started.
pub(crate) fn run() {
    let mut loops = LOOPS.with_borrow_mut(|loops| {
        let loops = loops.get_or_insert_default();
        loops.retain(|events| events.strong_count() > 0);
        loops.clone()
    });
    for events in loops.drain(..).filter_map(|events| events.upgrade()) {
        events.turn();
    }
}

pub(super) fn is_wanted() -> bool {
    LOOPS.with_borrow(Option::is_some)
}

pub(super) fn share<H: Handler>(events: EventLoop<H>) -> Shared<H> {
    let shared = Arc::new(Mutex::new(Some(events)));
    let weak: Weak<dyn Turn> = Arc::downgrade(&(Arc::clone(&shared) as Arc<dyn Turn>));
    LOOPS.with_borrow_mut(|loops| loops.get_or_insert_default().push(weak));
    shared
}

pub(super) fn take<H: Handler>(shared: &Shared<H>) -> EventLoop<H> {
    let events = shared.lock().take();
    events.expect("only a worker's end takes it")
}
