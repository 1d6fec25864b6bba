//! A driver for a device over a real TAP.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::GuestRam;
use devices::device::DeviceId;
use devices::events::{DeviceEvent, EventSink, Reporter};
use devices::rate::RateLimits;
use devices::testing::{Buffer, DriverQueue, ram};
use devices::virtio::net::{Net, NetBackend, NetOptions};
use devices::virtio::{Activation, VirtioDevice, Virtqueue};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::frame::{GUEST_MAC, HEADER, Header};
use super::*;

const QUEUE_SIZE: u16 = 64;
/// Receive buffers of pair 0; each further pair's lie 1 MiB later.
const RECEIVE: u64 = 0x40_0000;
const TRANSMIT: u64 = 0x20_0000;
pub(super) const BUFFER: u32 = 4096;

#[derive(Default)]
pub(super) struct Events(Mutex<Vec<DeviceEvent>>);

impl EventSink for Events {
    fn report(&self, _device: &DeviceId, event: DeviceEvent) {
        self.0.lock().push(event);
    }
}

impl Events {
    pub(super) fn seen(&self) -> Vec<DeviceEvent> {
        self.0.lock().clone()
    }
}

struct Queue {
    driver: DriverQueue,
    doorbell: EventFd,
}

pub(super) struct Guest {
    pub(super) memory: Arc<GuestRam>,
    pub(super) net: Net,
    pub(super) events: Arc<Events>,
    queues: Vec<Queue>,
    lent: Vec<Virtqueue>,
    /// Receive buffers by queue and head.
    buffers: HashMap<(usize, u16), u64>,
}

impl Guest {
    pub(super) fn new(tap: Tap, offload: bool) -> Self {
        let memory = ram(16 << 20);
        let events = Arc::<Events>::default();
        let sink = Arc::clone(&events) as Arc<dyn EventSink>;
        let options = NetOptions {
            mac: GUEST_MAC,
            mtu: None,
            queue_size: QUEUE_SIZE,
            offload,
            receive_limits: RateLimits::default(),
            transmit_limits: RateLimits::default(),
        };
        let reporter = Reporter::new(DeviceId::new("net0").unwrap(), sink);
        let net = Net::new(Arc::new(tap) as Arc<dyn NetBackend>, options, reporter);
        let count = net.identity().queue_sizes.len();
        let (mut queues, mut lent) = (Vec::new(), Vec::new());
        for index in 0..count {
            let base = index as u64 * DriverQueue::BYTES;
            let driver = DriverQueue::new(&memory, base, QUEUE_SIZE);
            let (queue, _route) = driver.device_side(index as u16);
            let doorbell = queue.doorbell().try_clone().unwrap();
            lent.push(queue);
            queues.push(Queue { driver, doorbell });
        }
        let mut guest = Self {
            memory,
            net,
            events,
            queues,
            lent,
            buffers: HashMap::new(),
        };
        for index in (0..count - 1).step_by(2) {
            for slot in 0..u64::from(QUEUE_SIZE) {
                let at = RECEIVE + index as u64 * 0x8_0000 + slot * u64::from(BUFFER);
                guest.offer(index, at);
            }
        }
        guest
    }

    /// With all features that the device offers.
    pub(super) fn activate(&mut self) {
        self.activate_with(self.net.identity().features);
    }

    pub(super) fn activate_with(&mut self, features: u64) {
        let queues = std::mem::take(&mut self.lent);
        let interrupt = Arc::clone(queues[0].interrupt().shared());
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features,
            interrupt,
        };
        self.net.activate(activation).unwrap();
    }

    pub(super) fn deactivate(&mut self) {
        self.lent = self.net.deactivate();
        self.lent.sort_by_key(Virtqueue::index);
    }

    fn offer(&mut self, index: usize, at: u64) {
        let queue = &mut self.queues[index];
        let head = queue.driver.offer(&[Buffer::writable(at, BUFFER)]);
        self.buffers.insert((index, head), at);
        queue.doorbell.write(1).unwrap();
    }

    /// Sends a frame and waits until the host has taken it.
    pub(super) fn send(&mut self, pair: usize, header: Header, frame: &[u8]) {
        let packet = [&header.bytes(), frame].concat();
        let at = GuestAddress(TRANSMIT);
        self.memory.write_slice(&packet, at).unwrap();
        let queue = &mut self.queues[2 * pair + 1];
        // In pieces, as Linux gives it: header, protocol headers, data.
        let len = packet.len() as u32;
        let cut = 12 + 42.min(len - 12);
        queue.driver.offer(&[
            Buffer::readable(TRANSMIT, 12),
            Buffer::readable(TRANSMIT + 12, cut - 12),
            Buffer::readable(TRANSMIT + u64::from(cut), len - cut),
        ]);
        queue.doorbell.write(1).unwrap();
        let driver = &mut queue.driver;
        wait_for(|| (!driver.used().is_empty()).then_some(()));
    }

    /// A control command's answer.
    pub(super) fn command(&mut self, bytes: &[u8]) -> u8 {
        let at = TRANSMIT + 0x10_0000;
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let queue = self.queues.last_mut().unwrap();
        let command = Buffer::readable(at, bytes.len() as u32);
        queue.driver.offer(&[command, Buffer::writable(at + 64, 1)]);
        queue.doorbell.write(1).unwrap();
        let driver = &mut queue.driver;
        wait_for(|| (!driver.used().is_empty()).then_some(()));
        self.memory.read_obj(GuestAddress(at + 64)).unwrap()
    }

    /// The packets received since the last call: header and frame.
    pub(super) fn received(&mut self, pair: usize) -> Vec<(Header, Vec<u8>)> {
        let index = 2 * pair;
        let mut packets: Vec<(Header, Vec<u8>)> = Vec::new();
        let mut left = 0;
        for (head, len) in self.queues[index].driver.used() {
            let at = self.buffers.remove(&(index, head)).expect("it was offered");
            let mut bytes = vec![0; len as usize];
            self.memory
                .read_slice(&mut bytes, GuestAddress(at))
                .unwrap();
            self.offer(index, at);
            if left > 0 {
                let (_, frame) = packets.last_mut().unwrap();
                frame.extend(bytes);
                left -= 1;
                continue;
            }
            let header = Header::parse(&bytes);
            assert!(header.num_buffers > 0);
            left = header.num_buffers - 1;
            packets.push((header, bytes.split_off(HEADER)));
        }
        assert_eq!(left, 0, "a packet appeared in part");
        packets
    }

    /// Waits for a packet that `wanted` accepts; others are passed over.
    pub(super) fn wait_for_packet(
        &mut self,
        pair: usize,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> (Header, Vec<u8>) {
        wait_for(|| {
            let mut packets = self.received(pair).into_iter();
            packets.find(|(_, frame)| wanted(frame))
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.net.deactivate();
    }
}

/// Polls until there is a result; a test that waits this long has failed.
pub(super) fn wait_for<T>(mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(result) = poll() {
            return result;
        }
        assert!(Instant::now() < deadline, "nothing happened");
        std::thread::yield_now();
    }
}
