//! The thread that serves the queues and the host's sockets.

use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::EventOps;
use vmm_sys_util::timerfd::TimerFd;
use zerocopy::{FromZeros, IntoBytes};

use super::connection::BUFFER_BYTES;
use super::device::VsockCounters;
use super::muxer::Muxer;
use super::packet::{HEADER_BYTES, Header};
use crate::virtio::buffers;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};
use crate::virtio::worker::{Handler, watch};
use crate::warn_limited;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const EVENT: u32 = 2;
const HOST: u32 = 3;
const TIMER: u32 = 4;

/// Packets per queue before the thread looks at its events again.
const BATCH: usize = 64;
/// How often the muxer looks for what has waited too long, while anything waits.
const TICK: Duration = Duration::from_millis(500);
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as `struct virtio_vsock_event`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Serves the queues on a thread of its own.
pub(super) struct VsockWorker {
    /// Packets for the guest.
    receive: Virtqueue,
    /// Packets from the guest.
    transmit: Virtqueue,
    event: Virtqueue,
    muxer: Muxer,
    counters: Arc<VsockCounters>,
    /// The driver must still hear that its connections are gone.
    transport_reset: bool,
    timer: TimerFd,
    ticking: bool,
    data: Vec<u8>,
    /// The driver broke the rules; nothing more is taken from the queues.
    broken: bool,
    /// Work is left that the last batch did not get to.
    more: bool,
}

/// What a worker leaves behind.
pub(super) struct Remains {
    pub(super) queues: [Virtqueue; 3],
    pub(super) muxer: Muxer,
    pub(super) transport_reset: bool,
}

impl VsockWorker {
    pub(super) fn new(remains: Remains, timer: TimerFd, counters: Arc<VsockCounters>) -> Self {
        let Remains {
            queues: [receive, transmit, event],
            muxer,
            transport_reset,
        } = remains;
        Self {
            receive,
            transmit,
            event,
            muxer,
            counters,
            transport_reset,
            timer,
            ticking: false,
            data: vec![0; BUFFER_BYTES as usize],
            broken: false,
            more: false,
        }
    }

    pub(super) fn into_remains(mut self) -> Remains {
        self.muxer.pause();
        Remains {
            queues: [self.receive, self.transmit, self.event],
            muxer: self.muxer,
            transport_reset: self.transport_reset,
        }
    }

    fn work(&mut self) {
        self.more = false;
        if self.broken {
            return;
        }
        match self.serve_queues() {
            Ok(more) => self.more = more,
            Err(error) => {
                self.broken = true;
                self.receive.interrupt().device_error(&error);
            }
        }
        if self.muxer.needs_tick() && !self.ticking {
            match self.timer.reset(TICK, None) {
                Ok(()) => self.ticking = true,
                Err(error) => {
                    warn_limited!(error:% = error; "vsock timer, connections do not time out");
                }
            }
        }
    }

    /// True when there is more to do that need not wait.
    fn serve_queues(&mut self) -> Result<bool, QueueError> {
        self.announce_reset()?;
        let mut more = self.take_packets()?;
        let stalled = !self.muxer.takes_packets();
        more |= self.give_packets()?;
        Ok(more || (stalled && self.muxer.takes_packets()))
    }

    /// Tells the driver of a restored device that its connections are gone (section 5.10.6.7).
    fn announce_reset(&mut self) -> Result<(), QueueError> {
        while self.transport_reset {
            let Some(chain) = self.event.pop()? else {
                if self.event.enable_doorbell()? {
                    continue;
                }
                break;
            };
            let memory = self.event.memory();
            let written = buffers::write(memory, chain.writable(), 0, &TRANSPORT_RESET);
            if written.unwrap_or(0) < TRANSPORT_RESET.len() {
                return Err(malformed(&self.event, &chain, "has no room for an event"));
            }
            self.event.push(&chain, 4)?;
            self.event.signal()?;
            self.transport_reset = false;
        }
        Ok(())
    }

    /// Takes packets from the guest; true when there may be more.
    fn take_packets(&mut self) -> Result<bool, QueueError> {
        let mut more = true;
        let mut answered = false;
        self.transmit.disable_doorbell()?;
        for _ in 0..BATCH {
            if !self.muxer.takes_packets() {
                // Goes on when the guest has made room for the answers that wait.
                more = false;
                break;
            }
            let Some(chain) = self.transmit.pop()? else {
                more = self.transmit.enable_doorbell()?;
                break;
            };
            self.take_packet(&chain);
            self.transmit.push(&chain, 0)?;
            answered = true;
        }
        if answered {
            self.transmit.signal()?;
        }
        Ok(more)
    }

    fn take_packet(&mut self, chain: &Chain) {
        let memory = self.transmit.memory();
        let segments = chain.readable();
        let mut header = Header::new_zeroed();
        // `pop` has checked that the buffers are RAM.
        let read = buffers::read(memory, segments, 0, header.as_mut_bytes()).unwrap_or(0);
        if read < HEADER_BYTES as usize {
            self.counters.refused_packets.add(1);
            return;
        }
        let len = header.len.get() as usize;
        let data = self.data.get_mut(..len).unwrap_or_default();
        let read = buffers::read(memory, segments, HEADER_BYTES.into(), data).unwrap_or(0);
        if read < len {
            // More than the buffers hold, or than any connection has room for.
            return self.muxer.refuse_packet(&header);
        }
        self.counters.received_packets.add(1);
        self.counters.received_bytes.add(len as u64);
        self.muxer.take_packet(&header, data);
    }

    /// Gives packets to the guest; true when there may be more.
    fn give_packets(&mut self) -> Result<bool, QueueError> {
        let mut more = true;
        let mut answered = false;
        self.receive.disable_doorbell()?;
        for _ in 0..BATCH {
            if !self.muxer.has_packets() {
                more = false;
                break;
            }
            let Some(chain) = self.receive.pop()? else {
                more = self.receive.enable_doorbell()?;
                break;
            };
            let Some(len) = self.give_packet(&chain)? else {
                self.receive.unpop();
                more = false;
                break;
            };
            self.receive.push(&chain, len)?;
            answered = true;
        }
        if answered {
            self.receive.signal()?;
        }
        Ok(more)
    }

    /// Fills a buffer with a packet; returns its length, or `None` when there was no packet.
    fn give_packet(&mut self, chain: &Chain) -> Result<Option<u32>, QueueError> {
        let segments = chain.writable();
        let room = buffers::total_len(segments).saturating_sub(HEADER_BYTES.into());
        if room == 0 {
            return Err(malformed(&self.receive, chain, "has no room for a packet"));
        }
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let room = room.min(self.data.len());
        let data = self.data.get_mut(..room).unwrap_or_default();
        let Some(header) = self.muxer.next_packet(data) else {
            return Ok(None);
        };
        let len = header.len.get();
        let data = data.get(..len as usize).unwrap_or_default();
        let memory = self.receive.memory();
        // `pop` has checked that the buffers are RAM, and their length was checked above.
        let _ = buffers::write(memory, segments, 0, header.as_bytes());
        let _ = buffers::write(memory, segments, HEADER_BYTES.into(), data);
        self.counters.sent_packets.add(1);
        self.counters.sent_bytes.add(len.into());
        Ok(Some(len.saturating_add(HEADER_BYTES)))
    }
}

fn malformed(queue: &Virtqueue, chain: &Chain, what: &'static str) -> QueueError {
    QueueError::Malformed {
        queue: queue.index(),
        head: chain.head(),
        what,
    }
}

impl Handler for VsockWorker {
    fn start(&mut self, events: &mut EventOps) {
        watch(events, self.receive.doorbell(), RECEIVE);
        watch(events, self.transmit.doorbell(), TRANSMIT);
        watch(events, self.event.doorbell(), EVENT);
        watch(events, &self.muxer, HOST);
        watch(events, &self.timer, TIMER);
        self.work();
    }

    fn ready(&mut self, token: u32, _events: &mut EventOps) {
        let doorbell = match token {
            RECEIVE => Some(&self.receive),
            TRANSMIT => Some(&self.transmit),
            EVENT => Some(&self.event),
            HOST => {
                self.muxer.poll_host();
                None
            }
            // Set only while it is not running, so that reading it here does not wait.
            _ => {
                self.ticking &= self.timer.wait().is_err();
                self.muxer.tick(Instant::now());
                None
            }
        };
        if let Some(queue) = doorbell {
            let _ = queue.doorbell().read();
        }
        self.work();
    }

    fn before_sleep(&mut self) -> bool {
        if self.more {
            self.work();
        }
        self.more
    }

    fn drain(&mut self) {}
}
