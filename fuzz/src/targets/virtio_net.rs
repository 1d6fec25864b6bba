//! The network device with two queue pairs, from a driver that is ready.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use devices::GuestRam;
use devices::rate::RateLimits;
use devices::virtio::net::{
    HEADER_BYTES, Net, NetBackend, NetInfo, NetOptions, NetQueue, Offloads,
};

use devices::virtio::{Segment, VirtioDevice, buffers};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::{Input, Script};
use crate::rig::{self, Subject};

const PAIRS: usize = 2;
/// Packets that wait in the host end at most.
const WAITING: usize = 64;

pub fn run(data: &[u8]) {
    rig::run::<Network>(data, true);
}

/// The host's network.
pub struct Network(Arc<Host>);

#[derive(Default)]
struct Host(Mutex<State>);

#[derive(Default)]
struct State {
    pairs: [Pair; PAIRS],
    failures: VecDeque<io::ErrorKind>,
}

#[derive(Default)]
struct Pair {
    /// Lengths of packets for the guest, headers included.
    waiting: VecDeque<usize>,
    closed: bool,
    /// Of the queue opened last.
    event: Option<EventFd>,
}

impl Pair {
    fn wake(&self) {
        if let Some(event) = &self.event {
            event.write(1).expect("the counter cannot overflow");
        }
    }
}

impl Host {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("a panic ends everything")
    }
}

struct Backend(Arc<Host>);

impl NetBackend for Backend {
    fn info(&self) -> NetInfo {
        NetInfo {
            queue_pairs: PAIRS as u16,
            offloads: Offloads::ALL,
        }
    }

    fn open_queue(&self, pair: u16) -> io::Result<Box<dyn NetQueue>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let mut state = self.0.state();
        let place = &mut state.pairs[usize::from(pair)];
        place.event = Some(event.try_clone()?);
        if !place.waiting.is_empty() {
            place.wake();
        }
        Ok(Box::new(Queue {
            host: Arc::clone(&self.0),
            pair: pair.into(),
            event,
        }))
    }

    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_queue_open(&self, pair: u16, open: bool) -> io::Result<()> {
        let mut state = self.0.state();
        let pair = &mut state.pairs[usize::from(pair)];
        pair.closed = !open;
        if !open {
            pair.waiting.clear();
        }
        Ok(())
    }

    fn announce(&self, _mac: [u8; 6]) -> io::Result<()> {
        Ok(())
    }
}

struct Queue {
    host: Arc<Host>,
    pair: usize,
    event: EventFd,
}

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl NetQueue for Queue {
    fn receive(
        &mut self,
        memory: &GuestRam,
        segments: &[Segment],
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        let mut state = self.host.state();
        let pair = &mut state.pairs[self.pair];
        assert!(!pair.closed || pair.waiting.is_empty());
        let Some(len) = pair.waiting.pop_front() else {
            let _ = self.event.read();
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let packet = vec![0x77; len];
        let placed = buffers::write(memory, segments, 0, &packet).expect("segments are RAM");
        let beyond = &packet[placed..packet.len().min(placed + overflow.len())];
        overflow[..beyond.len()].copy_from_slice(beyond);
        Ok(placed + beyond.len())
    }

    fn send(&mut self, memory: &GuestRam, segments: &[Segment]) -> io::Result<()> {
        let len = buffers::total_len(segments);
        assert!(len > HEADER_BYTES, "{len} bytes are no packet");
        let mut packet = vec![0; usize::try_from(len).expect("a chain is short")];
        let read = buffers::read(memory, segments, 0, &mut packet).expect("segments are RAM");
        assert_eq!(read, packet.len());
        self.host
            .state()
            .failures
            .pop_front()
            .map_or(Ok(()), |kind| Err(kind.into()))
    }

    fn is_gone(&self, error: &io::Error) -> bool {
        error.kind() == io::ErrorKind::NotConnected
    }
}

impl Subject for Network {
    const QUEUES: u16 = 2 * PAIRS as u16 + 1;
    const RECEIVES: &'static [u16] = &[0];

    /// The second pair may not be in use, and where the control queue is depends on features.
    fn answers_all(&self, queue: u16) -> bool {
        queue == 1
    }

    fn new() -> Self {
        Self(Arc::default())
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let options = NetOptions {
            mac: [0x52, 0x54, 0, 1, 2, 3],
            mtu: Some(9000),
            queue_size: 64,
            offload: true,
            receive_limits: RateLimits::default(),
            transmit_limits: RateLimits::default(),
        };
        Box::new(Net::new(
            Arc::new(Backend(self.0.clone())),
            options,
            rig::reporter(),
        ))
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let mut state = self.0.state();
        if input.below(4) == 0 {
            use io::ErrorKind::{InvalidInput, NotConnected, WouldBlock};
            state
                .failures
                .push_back(input.choose(&[WouldBlock, InvalidInput, NotConnected]));
            return;
        }
        let len =
            input.choose(&[12, 64, 1526, 9012, 65_600, 0, 1000, 70_000]) + input.u8() as usize;
        let pair = &mut state.pairs[usize::from(input.u8()) % PAIRS];
        if !pair.closed && pair.waiting.len() < WAITING {
            pair.waiting.push_back(len);
            pair.wake();
        }
    }

    fn release(&mut self) {
        let mut state = self.0.state();
        state.failures.clear();
        state.pairs.iter().for_each(Pair::wake);
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let packet = |queue: u8, len: u8| {
        Script::new()
            .u8(queue)
            .u8(0)
            .u8(2)
            .u8(len)
            .u8(100)
            .blob(&[0; 12])
    };
    let room = |queue: u8, len: u8| Script::new().u8(queue).u8(0).u8(1).u8(len).u8(0);
    // Class, command and data, then room for the answer.
    let command = |class: u8, command: u8, data: &[u8]| {
        let bytes = [&[class, command], data].concat();
        let len = u8::try_from(bytes.len() - 1).expect("a short command");
        Script::new()
            .u8(4)
            .u8(1)
            .u8(2)
            .u8(0)
            .u8(len)
            .blob(&bytes)
            .u8(0x81)
            .u8(0)
            .u8(0)
    };
    let arrival = |len: u8, pair: u8| Script::new().u8(10).u8(1).u8(len).u8(0).u8(pair);
    let mut seeds = rig::seeds(&[
        room(0, 6),
        packet(1, 2),
        room(2, 6),
        packet(3, 1),
        command(4, 0, &[2, 0]),
        command(1, 1, &[0x52, 0x54, 0, 9, 9, 9]),
        command(0, 0, &[1]),
        command(1, 0, &[0; 8]),
        command(5, 0, &[1, 0, 0, 0, 0, 0, 0, 0]),
        command(3, 0, &[]),
    ]);
    // Packets of every size into many small buffers, with and without merging.
    for features in [u64::MAX, !(1 << 15)] {
        let start = Script::new().u8(12).u64(features).u8(5);
        let offered = (0..20).fold(start, |script, index| {
            script
                .u8(3)
                .bytes(&room(0, if index < 4 { 2 } else { 6 }).done())
        });
        let script = (0..8).fold(offered, |script, len| script.bytes(&arrival(len, 0).done()));
        seeds.push(script.u8(9).u8(9).u8(13).u8(2).u8(9).done());
    }
    seeds
}
