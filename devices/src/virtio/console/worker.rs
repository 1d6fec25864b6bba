//! The thread that serves both queues.

use std::sync::Arc;

use event_manager::EventOps;

use super::device::ConsoleCounters;
use super::port::ConsolePort;
use crate::virtio::buffers;
use crate::virtio::queue::{QueueError, Virtqueue};
use crate::virtio::worker::{Handler, watch};

const RECEIVE_DOORBELL: u32 = 0;
const TRANSMIT_DOORBELL: u32 = 1;
const PORT: u32 = 2;

/// Chains per queue before the thread looks at its events again, and bytes of one chain.
const BATCH: usize = 32;
const CHUNK_BYTES: usize = 16 << 10;

/// Serves the queues on a thread of its own.
pub(super) struct ConsoleWorker {
    receive: Virtqueue,
    transmit: Virtqueue,
    port: Arc<ConsolePort>,
    counters: Arc<ConsoleCounters>,
    /// Bytes of the next transmit chain that have been sent already.
    transmitted: u64,
    chunk: Vec<u8>,
    /// The driver broke the rules; nothing more is taken from the queues.
    broken: bool,
    /// Work is left that the last batch did not get to.
    more: bool,
}

impl ConsoleWorker {
    pub(super) fn new(
        [receive, transmit]: [Virtqueue; 2],
        port: Arc<ConsolePort>,
        counters: Arc<ConsoleCounters>,
        transmitted: u64,
    ) -> Self {
        Self {
            receive,
            transmit,
            port,
            counters,
            transmitted,
            chunk: vec![0; CHUNK_BYTES],
            broken: false,
            more: false,
        }
    }

    /// The queues and how much of the next transmit chain has been sent.
    pub(super) fn into_parts(self) -> ([Virtqueue; 2], u64) {
        ([self.receive, self.transmit], self.transmitted)
    }

    fn serve(&mut self) {
        self.more = false;
        if self.broken {
            return;
        }
        let transmitted = self.send_output();
        let result = transmitted.and_then(|more| Ok(self.deliver_input()? | more));
        match result {
            Ok(more) => self.more = more,
            Err(error) => {
                self.broken = true;
                self.receive.interrupt().device_error(&error);
            }
        }
    }

    /// Moves guest output to the port; true when there may be more that has room.
    fn send_output(&mut self) -> Result<bool, QueueError> {
        let mut more = true;
        let mut answered = false;
        self.transmit.disable_doorbell()?;
        for _ in 0..BATCH {
            let Some(chain) = self.transmit.pop()? else {
                more = self.transmit.enable_doorbell()?;
                break;
            };
            let memory = self.transmit.memory();
            let chunk = self.chunk.as_mut_slice();
            // `pop` has checked that the buffers are RAM.
            let count = buffers::read(memory, chain.readable(), self.transmitted, chunk);
            let count = count.unwrap_or(0);
            let data = self.chunk.get(..count).unwrap_or_default();
            let accepted = self.port.transmit(data);
            self.counters.output_bytes.add(accepted as u64);
            self.transmitted = self.transmitted.saturating_add(accepted as u64);
            if accepted < count {
                // The port wakes this thread when the host has taken some.
                self.counters.output_waits.add(1);
                self.transmit.unpop();
                more = false;
                break;
            }
            if self.transmitted < buffers::total_len(chain.readable()) && count > 0 {
                self.transmit.unpop();
                continue;
            }
            self.transmitted = 0;
            self.transmit.push(&chain, 0)?;
            answered = true;
        }
        if answered {
            self.transmit.signal()?;
        }
        Ok(more)
    }

    /// Moves input to the guest; true when there may be more that has room.
    fn deliver_input(&mut self) -> Result<bool, QueueError> {
        let mut more = true;
        let mut answered = false;
        self.receive.disable_doorbell()?;
        for _ in 0..BATCH {
            if !self.port.has_input() {
                more = false;
                break;
            }
            let Some(chain) = self.receive.pop()? else {
                more = self.receive.enable_doorbell()?;
                break;
            };
            let room = buffers::total_len(chain.writable());
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            if room == 0 {
                self.counters.refused.add(1);
            }
            let room = room.min(self.chunk.len());
            let chunk = self.chunk.get_mut(..room).unwrap_or_default();
            let count = self.port.take_input(chunk);
            let data = self.chunk.get(..count).unwrap_or_default();
            let written = buffers::write(self.receive.memory(), chain.writable(), 0, data);
            let written = written.unwrap_or(0);
            self.counters.input_bytes.add(written as u64);
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            self.receive.push(&chain, written)?;
            answered = true;
        }
        if answered {
            self.receive.signal()?;
        }
        Ok(more)
    }
}

impl Handler for ConsoleWorker {
    fn start(&mut self, events: &mut EventOps) {
        watch(events, self.receive.doorbell(), RECEIVE_DOORBELL);
        watch(events, self.transmit.doorbell(), TRANSMIT_DOORBELL);
        watch(events, self.port.wake(), PORT);
        self.serve();
    }

    fn ready(&mut self, token: u32, _events: &mut EventOps) {
        let event = match token {
            RECEIVE_DOORBELL => self.receive.doorbell(),
            TRANSMIT_DOORBELL => self.transmit.doorbell(),
            _ => self.port.wake(),
        };
        let _ = event.read();
        self.serve();
    }

    fn before_sleep(&mut self) -> bool {
        if self.more {
            self.serve();
        }
        self.more
    }

    fn drain(&mut self) {}
}
