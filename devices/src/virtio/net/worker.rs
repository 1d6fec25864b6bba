//! The thread of a queue pair.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};

use super::backend::NetQueue;
use super::control::ControlQueue;
use super::receive::Receiver;
use super::shared::{Gate, Shared};
use super::transmit::Transmitter;
use crate::virtio::queue::{QueueError, Virtqueue};
use crate::virtio::worker::Handler;

const HOST: u32 = 0;
const RECEIVE: u32 = 1;
const TRANSMIT: u32 = 2;
const CONTROL: u32 = 3;
const GATE: u32 = 4;
const RECEIVE_TIMER: u32 = 5;
const TRANSMIT_TIMER: u32 = 6;

/// Serves both directions of a pair.
///
/// All descriptors are watched for edges: what an edge tells is remembered until a look at the
/// queue or the host end finds nothing, so that no system call is spent on resetting doorbells.
pub(super) struct PairWorker {
    io: Box<dyn NetQueue>,
    receiver: Receiver,
    transmitter: Transmitter,
    control: Option<ControlQueue>,
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    /// The thread is woken by packets in the host end.
    watching: bool,
    /// The driver broke the rules; nothing more is done.
    broken: bool,
}

impl PairWorker {
    pub(super) fn new(
        io: Box<dyn NetQueue>,
        receiver: Receiver,
        transmitter: Transmitter,
        gate: Arc<Gate>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            io,
            receiver,
            transmitter,
            control: None,
            gate,
            shared,
            watching: true,
            broken: false,
        }
    }

    /// Also answers the control queue.
    pub(super) fn with_control(mut self, control: Option<ControlQueue>) -> Self {
        self.control = control;
        self
    }

    /// Returns the queues.
    pub(super) fn into_queues(self) -> impl Iterator<Item = Virtqueue> {
        let control = self.control.map(ControlQueue::into_queue);
        let pair = [
            self.receiver.into_queue(&self.shared),
            self.transmitter.into_queue(),
        ];
        pair.into_iter().chain(control)
    }

    fn round(&mut self) -> Result<bool, QueueError> {
        let mut more = match &mut self.control {
            Some(control) => control.serve()?,
            None => false,
        };
        more |= self.transmitter.serve(self.io.as_mut(), &self.shared)?;
        let open = self.gate.lock();
        if *open {
            more |= self.receiver.serve(self.io.as_mut(), &self.shared)?;
        }
        Ok(more)
    }

    /// Watches the host end for packets only while they are of use; a flood of them would
    /// otherwise wake the thread again and again for nothing.
    fn update_watch(&mut self, host_event: bool, events: &EventOps) {
        let waiting = self.receiver.is_waiting();
        if host_event && waiting && self.watching {
            self.watching = false;
        } else if !waiting && !self.watching {
            self.watching = true;
            self.receiver.readable();
        } else {
            return;
        }
        if let Err(error) = events.modify(self.host_events()) {
            log::error!(error:? = error; "host end of a network device could not be watched");
        }
    }

    fn host_events(&self) -> Events {
        let mut set = EventSet::OUT | EventSet::EDGE_TRIGGERED;
        if self.watching {
            set |= EventSet::IN;
        }
        Events::with_data_raw(self.io.as_raw_fd(), HOST, set)
    }
}

fn watch_edges(events: &mut EventOps, source: &impl AsRawFd, token: u32) {
    let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
    add(events, Events::with_data(source, token, set));
}

/// A failure is logged: it can only be the host running out of memory.
fn add(events: &mut EventOps, registration: Events) {
    if let Err(error) = events.add(registration) {
        log::error!(error:? = error; "descriptor could not be watched");
    }
}

impl Handler for PairWorker {
    fn start(&mut self, events: &mut EventOps) {
        add(events, self.host_events());
        watch_edges(events, self.receiver.queue().doorbell(), RECEIVE);
        watch_edges(events, self.transmitter.queue().doorbell(), TRANSMIT);
        watch_edges(events, self.gate.wake(), GATE);
        if let Some(control) = &self.control {
            watch_edges(events, control.queue().doorbell(), CONTROL);
        }
        if let Some(throttle) = self.receiver.throttle() {
            watch_edges(events, throttle.timer(), RECEIVE_TIMER);
        }
        if let Some(throttle) = self.transmitter.throttle() {
            watch_edges(events, throttle.timer(), TRANSMIT_TIMER);
        }
    }

    fn ready(&mut self, token: u32, events: &mut EventOps) {
        match token {
            HOST => {
                self.receiver.readable();
                self.transmitter.writable();
            }
            RECEIVE => self.receiver.doorbell(),
            TRANSMIT => self.transmitter.doorbell(),
            GATE => self.receiver.readable(),
            RECEIVE_TIMER => {
                if let Some(throttle) = self.receiver.throttle() {
                    throttle.expired();
                }
            }
            TRANSMIT_TIMER => {
                if let Some(throttle) = self.transmitter.throttle() {
                    throttle.expired();
                }
            }
            _ => {
                if let Some(control) = &mut self.control {
                    control.doorbell();
                }
            }
        }
        self.update_watch(token == HOST, events);
    }

    /// All work is done here: once per wake-up, whatever it was that woke the thread.
    fn before_sleep(&mut self) -> bool {
        if self.broken {
            return false;
        }
        self.round().unwrap_or_else(|error| {
            self.broken = true;
            let interrupt = self.transmitter.queue().interrupt();
            interrupt.device_error(&error);
            false
        })
    }

    /// Nothing is in flight between calls.
    fn drain(&mut self) {}
}
