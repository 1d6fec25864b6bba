//! Threads on which devices work.

use std::io;
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;
use std::time::Instant;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use polling::Polling;

/// Token of the worker's own stop descriptor; handlers use others.
const STOP: u32 = u32::MAX;

/// What a device does on its thread.
pub trait Handler: Send + 'static {
    /// Registers descriptors with tokens of the handler's choice, below `u32::MAX`, and does the
    /// work that waits already.
    fn start(&mut self, events: &mut EventOps);

    /// A registered descriptor is ready.
    fn ready(&mut self, token: u32, events: &mut EventOps);

    /// Whether [`Handler::poll`] finds anything; else nobody looks.
    const POLLS: bool = false;

    /// Looks for work and does it, at no cost when there is none: no system call, no doorbell
    /// turned on. True: there was some. Called again and again before the thread sleeps, as long
    /// as work is likely to come soon.
    fn poll(&mut self) -> bool {
        false
    }

    /// Called before the thread sleeps. True: call again instead of sleeping.
    fn before_sleep(&mut self) -> bool;

    /// Finishes what is in flight; the last call on this thread.
    fn drain(&mut self);
}

/// Registers `source` for reading under `token`. A failure is logged: it can only be the host
/// running out of memory.
pub fn watch(events: &mut EventOps, source: &impl AsRawFd, token: u32) {
    let registration = Events::with_data(source, token, EventSet::IN);
    if let Err(error) = events.add(registration) {
        log::error!(error:? = error; "descriptor could not be watched");
    }
}

/// A thread that owns a handler until it is stopped. Dropping a worker stops it, too.
pub struct Worker<H: Handler> {
    running: Option<Running<H>>,
    stop: EventFd,
}

enum Running<H: Handler> {
    Thread(JoinHandle<H>),
    /// On whichever thread calls [`crate::testing::run_workers`].
    #[cfg(any(test, feature = "testing"))]
    Inline(inline::Shared<H>),
}

impl<H: Handler> Worker<H> {
    /// Starts a thread named `name` (at most 15 bytes are visible) that runs `handler`.
    ///
    /// # Errors
    /// The host has no thread or descriptor left; the handler comes back.
    pub fn spawn(name: &str, handler: H) -> Result<Self, (io::Error, H)> {
        let prepare = || -> io::Result<_> {
            let stop = EventFd::new(EFD_NONBLOCK)?;
            let manager = EventManager::new().map_err(|e| io::Error::other(format!("{e:?}")))?;
            Ok((stop.try_clone()?, stop, manager))
        };
        let (stop, stop_in_thread, manager) = match prepare() {
            Ok(parts) => parts,
            Err(error) => return Err((error, handler)),
        };
        #[cfg(any(test, feature = "testing"))]
        if inline::is_wanted() {
            let events = EventLoop::new(handler, stop_in_thread, manager);
            let running = Some(Running::Inline(inline::share(events)));
            return Ok(Self { running, stop });
        }
        // The handler crosses in a slot, so that it is not lost when the thread cannot start.
        let slot = std::sync::Arc::new(parking_lot::Mutex::new(Some(handler)));
        let for_thread = std::sync::Arc::clone(&slot);
        let builder = std::thread::Builder::new().name(name.to_owned());
        let spawned = builder.spawn(move || {
            let handler = for_thread.lock().take().expect("only this thread takes it");
            let mut events = EventLoop::new(handler, stop_in_thread, manager);
            while events.turn(true) {}
            events.finish()
        });
        match spawned {
            Ok(thread) => Ok(Self {
                running: Some(Running::Thread(thread)),
                stop,
            }),
            Err(error) => Err((error, slot.lock().take().expect("no thread took it"))),
        }
    }

    /// Lets the handler drain, ends the thread and returns the handler.
    #[must_use]
    pub fn stop(mut self) -> H {
        match self
            .join()
            .expect("only here and in drop is the thread taken")
        {
            Ok(handler) => handler,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn join(&mut self) -> Option<std::thread::Result<H>> {
        let running = self.running.take()?;
        // The counter cannot overflow: this is its only write.
        let _ = self.stop.write(1);
        match running {
            Running::Thread(thread) => Some(thread.join()),
            #[cfg(any(test, feature = "testing"))]
            Running::Inline(events) => Some(Ok(inline::take(&events).finish())),
        }
    }
}

impl<H: Handler> Drop for Worker<H> {
    fn drop(&mut self) {
        if let Some(Err(_)) = self.join() {
            log::error!("a device thread has panicked");
        }
    }
}

struct Subscriber<H> {
    handler: H,
    stop: EventFd,
    stopping: bool,
}

impl<H: Handler> MutEventSubscriber for Subscriber<H> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            STOP => self.stopping = true,
            token => self.handler.ready(token, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.stop, STOP);
        self.handler.start(ops);
    }
}

/// A handler and the descriptors that it waits for.
struct EventLoop<H: Handler> {
    manager: EventManager<Subscriber<H>>,
    id: SubscriberId,
    polling: Polling,
}

impl<H: Handler> EventLoop<H> {
    fn new(handler: H, stop: EventFd, mut manager: EventManager<Subscriber<H>>) -> Self {
        let id = manager.add_subscriber(Subscriber {
            handler,
            stop,
            stopping: false,
        });
        Self {
            manager,
            id,
            polling: Polling::default(),
        }
    }

    /// Handles what is ready; with `may_sleep`, waits for something. False once it shall end.
    fn turn(&mut self, may_sleep: bool) -> bool {
        const SLEEP: i32 = -1;
        const DO_NOT_SLEEP: i32 = 0;
        let subscriber = self
            .manager
            .subscriber_mut(self.id)
            .expect("it is removed only by `finish`");
        if subscriber.stopping {
            return false;
        }
        if H::POLLS && may_sleep {
            self.polling.spin(|| subscriber.handler.poll());
        } else {
            subscriber.handler.poll();
        }
        let busy = subscriber.handler.before_sleep();
        let timeout = if busy || !may_sleep {
            DO_NOT_SLEEP
        } else {
            SLEEP
        };
        let asleep_since = (H::POLLS && timeout == SLEEP).then(Instant::now);
        if let Err(error) = self.manager.run_with_timeout(timeout) {
            // Interrupted by a signal, or a descriptor that epoll no longer likes: look again.
            log::debug!(error:? = error; "device event loop");
        }
        if let Some(since) = asleep_since {
            self.polling.woken_after(since.elapsed());
        }
        true
    }

    fn finish(mut self) -> H {
        let subscriber = self.manager.remove_subscriber(self.id);
        let mut subscriber = subscriber.expect("it was added by `new`");
        subscriber.handler.drain();
        subscriber.handler
    }
}

#[cfg(any(test, feature = "testing"))]
pub(crate) mod inline;
mod polling;

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter {
        doorbell: EventFd,
        done: EventFd,
        count: u64,
        drained: bool,
    }

    impl Handler for Counter {
        fn start(&mut self, events: &mut EventOps) {
            watch(events, &self.doorbell, 7);
        }
        fn ready(&mut self, token: u32, _events: &mut EventOps) {
            assert_eq!(token, 7);
            self.count += self.doorbell.read().unwrap();
            self.done.write(1).unwrap();
        }
        fn before_sleep(&mut self) -> bool {
            false
        }
        fn drain(&mut self) {
            self.drained = true;
        }
    }

    #[test]
    fn worker_handles_events_and_gives_its_handler_back_drained() {
        let doorbell = EventFd::new(0).unwrap();
        let done = EventFd::new(0).unwrap();
        let counter = Counter {
            doorbell: doorbell.try_clone().unwrap(),
            done: done.try_clone().unwrap(),
            count: 0,
            drained: false,
        };
        let worker = Worker::spawn("counter", counter)
            .map_err(|(e, _)| e)
            .unwrap();
        doorbell.write(3).unwrap();
        done.read().unwrap();
        let counter = worker.stop();
        assert_eq!((counter.count, counter.drained), (3, true));
    }
}
