//! The device as a whole, with its threads.

use std::time::Duration;

use virtio_bindings::virtio_net::*;

use super::super::shared::Announcement;
use super::super::state::NetStateV1;
use super::super::{Net, NetOptions};
use super::*;
use crate::state::{DeviceState, RestoreError};
use crate::virtio::device::{Activation, ActivationError, VirtioDevice};

const QUEUE_SIZE: u16 = 64;
const MRG: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const MQ: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

fn options() -> NetOptions {
    NetOptions {
        mac: MAC,
        mtu: Some(1500),
        queue_size: QUEUE_SIZE,
        offload: true,
        receive_limits: RateLimits::default(),
        transmit_limits: RateLimits::default(),
    }
}

/// A device with its driver's queues; buffers of queue `i` lie at `DATA + i * 0x10_0000`.
struct Guest {
    memory: Arc<GuestRam>,
    drivers: Vec<DriverQueue>,
    queues: Vec<Option<Virtqueue>>,
    doorbells: Vec<EventFd>,
    interrupt: Arc<VirtioInterrupt>,
    route: Arc<FakeRoute>,
    host: Arc<FakeNet>,
    net: Net,
    events: Arc<Events>,
}

impl Guest {
    fn new(pairs: u16) -> Self {
        Self::with(pairs, options())
    }

    fn with(pairs: u16, options: NetOptions) -> Self {
        let memory = ram(RAM_BYTES);
        let host = FakeNet::new(pairs);
        let events = Arc::<Events>::default();
        let backend = Arc::clone(&host) as Arc<dyn NetBackend>;
        let net = Net::new(backend, options, reporter(&events));
        let count = 2 * pairs + 1;
        let (interrupt, route) = interrupt(usize::from(count));
        let drivers: Vec<_> = (0..u64::from(count))
            .map(|i| DriverQueue::new(&memory, i * DriverQueue::BYTES, QUEUE_SIZE))
            .collect();
        let queues: Vec<_> = drivers
            .iter()
            .zip(0..)
            .map(|(driver, index)| virtqueue(driver, &memory, index, true, &interrupt))
            .collect();
        let doorbells = queues
            .iter()
            .map(|queue| queue.doorbell().try_clone().unwrap())
            .collect();
        Self {
            memory,
            drivers,
            queues: queues.into_iter().map(Some).collect(),
            doorbells,
            interrupt,
            route,
            host,
            net,
            events,
        }
    }

    fn try_activate(&mut self, features: u64, indices: &[u16]) -> Result<(), ActivationError> {
        let queues = indices
            .iter()
            .map(|i| self.queues[usize::from(*i)].take().unwrap());
        self.net.activate(Activation {
            memory: Arc::clone(&self.memory),
            queues: queues.collect(),
            features,
            interrupt: Arc::clone(&self.interrupt),
        })
    }

    /// All queues.
    fn activate(&mut self, features: u64) {
        let indices: Vec<u16> = (0..self.queues.len() as u16).collect();
        self.try_activate(features, &indices).unwrap();
    }

    fn deactivate(&mut self) {
        for queue in self.net.deactivate() {
            let index = usize::from(queue.index());
            self.queues[index] = Some(queue);
        }
    }

    fn at(queue: u16) -> u64 {
        DATA + u64::from(queue) * 0x10_0000
    }

    fn ring(&self, queue: u16) {
        self.doorbells[usize::from(queue)].write(1).unwrap();
    }

    fn offer_receive(&mut self, queue: u16, slot: u64) {
        let buffer = Buffer::writable(Self::at(queue) + slot * 2048, 2048);
        self.drivers[usize::from(queue)].offer(&[buffer]);
        self.ring(queue);
    }

    fn transmit(&mut self, queue: u16, packet: &[u8]) {
        let at = Self::at(queue);
        self.memory.write_slice(packet, GuestAddress(at)).unwrap();
        let buffer = Buffer::readable(at, packet.len() as u32);
        self.drivers[usize::from(queue)].offer(&[buffer]);
        self.ring(queue);
    }

    fn used(&mut self, queue: u16) -> Vec<(u16, u32)> {
        self.drivers[usize::from(queue)].used()
    }

    fn wait_for_used(&mut self, queue: u16) -> Vec<(u16, u32)> {
        wait_for(|| Some(self.used(queue)).filter(|used| !used.is_empty()))
    }

    fn command(&mut self, queue: u16, bytes: &[u8]) -> u8 {
        let at = Self::at(queue);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let len = bytes.len() as u32;
        self.drivers[usize::from(queue)]
            .offer(&[Buffer::readable(at, len), Buffer::writable(at + 256, 1)]);
        self.ring(queue);
        self.wait_for_used(queue);
        self.memory.read_obj(GuestAddress(at + 256)).unwrap()
    }

    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.net.read_config(offset, &mut bytes);
        bytes
    }

    fn status(&self) -> u8 {
        self.config::<1>(6)[0]
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.net.deactivate();
    }
}

/// Polls until there is a result; a test that waits this long has failed.
fn wait_for<T>(mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(result) = poll() {
            return result;
        }
        assert!(Instant::now() < deadline, "nothing happened");
        std::thread::yield_now();
    }
}

#[test]
fn packets_pass_both_ways() {
    let mut guest = Guest::new(1);
    guest.offer_receive(0, 0);
    guest.activate(MRG);
    let out = packet(100, 1);
    guest.transmit(1, &out);
    assert_eq!(wait_for(|| guest.host.sent(0)), out);
    guest.host.arrives(0, &packet(200, 2));
    assert_eq!(guest.wait_for_used(0), [(0, 200)]);
    guest.wait_for_used(1);
    assert!(guest.events.taken().is_empty());
}

/// One buffer at a time, so that the queue starves before every packet: a lost wake-up hangs.
#[test]
fn starving_queue_wakes_up_every_time() {
    let mut guest = Guest::new(1);
    guest.activate(MRG);
    for round in 0..2000_u32 {
        let len = 64 + (round % 50) as usize;
        // In turn, the packet or the buffer comes first.
        if round % 2 == 0 {
            guest.host.arrives(0, &packet(len, 0));
            guest.offer_receive(0, 0);
        } else {
            guest.offer_receive(0, 0);
            guest.host.arrives(0, &packet(len, 0));
        }
        let used = guest.wait_for_used(0);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].1, len as u32, "round {round}");
    }
}

#[test]
fn flood_without_buffers_neither_spins_nor_hangs() {
    let mut guest = Guest::new(1);
    guest.activate(MRG);
    let mut flood = 0;
    while guest.host.arrives(0, &packet(64, 0)) {
        flood += 1;
    }
    let counters = guest.net.handle().counters();
    wait_for(|| (counters.starved.get() > 0).then_some(()));
    let mut seen = 0;
    for slot in 0..flood {
        guest.offer_receive(0, slot % 64);
        seen += guest.wait_for_used(0).len() as u64;
        // What one buffer does not take leaves the queue starving again, once.
        assert!(counters.starved.get() <= slot + 2);
    }
    assert_eq!(seen, flood);
}

#[test]
fn blocked_transmitter_goes_on_when_the_network_drains() {
    let mut guest = Guest::new(1);
    guest.activate(MRG);
    let packet = packet(1400, 1);
    let counters = guest.net.handle().counters();
    let mut given = 0;
    while counters.blocked.get() == 0 {
        guest.transmit(1, &packet);
        given += 1;
        // Room in the ring, or the host end is full.
        let taken = || counters.transmit.packets.get() == given || counters.blocked.get() > 0;
        wait_for(|| taken().then_some(()));
    }
    for _ in 0..given {
        assert_eq!(wait_for(|| guest.host.sent(0)), packet);
    }
    wait_for(|| (counters.transmit.packets.get() == given).then_some(()));
}

/// Pausing at any moment loses and doubles nothing.
#[test]
fn packets_survive_pauses() {
    let mut guest = Guest::new(1);
    let (mut next_out, mut seen_out, mut next_in, mut seen_in) = (0_u32, 0_u32, 0_u32, 0_u32);
    for slot in 0..u64::from(QUEUE_SIZE) {
        guest.offer_receive(0, slot);
    }
    let numbered = |number: u32| [&packet(60, 0)[..], &number.to_le_bytes()].concat();
    for _ in 0..200 {
        guest.activate(MRG);
        for _ in 0..3 {
            guest.transmit(1, &numbered(next_out));
            next_out += 1;
            // The buffer is used again only when it is free.
            guest.wait_for_used(1);
            if guest.host.arrives(0, &numbered(next_in)) {
                next_in += 1;
            }
            while let Some(sent) = guest.host.sent(0) {
                assert_eq!(sent, numbered(seen_out));
                seen_out += 1;
            }
        }
        guest.deactivate();
        for (head, len) in guest.used(0) {
            assert_eq!(len, 64);
            let at = Guest::at(0) + u64::from(head) * 2048;
            let number: u32 = guest.memory.read_obj(GuestAddress(at + 60)).unwrap();
            assert_eq!(number, seen_in);
            seen_in += 1;
            guest.offer_receive(0, u64::from(head));
        }
    }
    assert_eq!(seen_out, next_out);
    assert!(
        seen_in > 0 && next_in - seen_in < 100,
        "the rest waits in the host end"
    );
}

#[test]
fn nothing_happens_while_inactive() {
    let mut guest = Guest::new(1);
    guest.offer_receive(0, 0);
    guest.activate(MRG);
    guest.deactivate();
    guest.host.arrives(0, &packet(64, 0));
    guest.transmit(1, &packet(64, 0));
    assert!(guest.net.deactivate().is_empty(), "twice is harmless");
    assert!(guest.host.sent(0).is_none() && guest.used(0).is_empty());
}

#[test]
fn queues_that_are_missing_refuse_activation() {
    for (pairs, indices, missing) in [
        (1, &[][..], 0),
        (1, &[0][..], 1),
        (1, &[1][..], 0),
        (2, &[0, 1, 2][..], 3),
        (2, &[0, 1, 3][..], 2),
    ] {
        let mut guest = Guest::new(pairs);
        let result = guest.try_activate(MQ, indices);
        let refused =
            matches!(result, Err(ActivationError::MissingQueue(queue)) if queue == missing);
        assert!(refused, "{indices:?}: {result:?}");
        guest.net.deactivate();
        assert!(guest.net.workers.is_empty());
    }
    // Pairs beyond the first, and the control queue, may be left out.
    let mut guest = Guest::new(2);
    guest.try_activate(MQ, &[0, 1]).unwrap();
}

#[test]
fn failing_host_end_refuses_activation() {
    let mut guest = Guest::new(1);
    guest.host.fail(1);
    let error = guest.try_activate(MRG, &[0, 1]).unwrap_err();
    assert!(!error.is_guest_caused(), "{error}");
}

#[test]
fn pairs_receive_only_after_the_driver_has_asked_for_them() {
    let mut guest = Guest::new(2);
    guest.offer_receive(2, 0);
    guest.activate(MRG | MQ);
    let calls = guest.host.calls();
    assert_eq!(calls[1..], [Call::Open(0, true), Call::Open(1, false)]);
    // A packet that a closed queue of the host still gave would not be delivered.
    guest.host.arrives(1, &packet(64, 1));
    // Sending works nevertheless.
    guest.transmit(3, &packet(64, 2));
    guest.wait_for_used(3);
    assert!(guest.used(2).is_empty());
    assert_eq!(guest.command(4, &[4, 0, 2, 0]), 0);
    assert_eq!(guest.host.calls(), [Call::Open(1, true)]);
    assert_eq!(guest.wait_for_used(2), [(0, 64)]);
    assert_eq!(guest.net.handle().active_pairs(), 2);
    // After the answer, nothing is delivered any more.
    guest.offer_receive(2, 1);
    assert_eq!(guest.command(4, &[4, 0, 1, 0]), 0);
    guest.host.arrives(1, &packet(64, 3));
    guest.transmit(3, &packet(64, 2));
    guest.wait_for_used(3);
    assert!(guest.used(2).is_empty());
    // Pausing keeps the number of pairs, a reset does not.
    assert_eq!(guest.command(4, &[4, 0, 2, 0]), 0);
    guest.deactivate();
    guest.host.calls();
    guest.activate(MRG | MQ);
    assert_eq!(guest.host.calls()[2], Call::Open(1, true));
    guest.deactivate();
    guest.net.reset();
    guest.activate(MRG | MQ);
    assert_eq!(
        guest.host.calls()[1..],
        [Call::Open(0, true), Call::Open(1, false)]
    );
}

/// Without multi-queue, the control queue is number 2 (section 5.1.2).
#[test]
fn control_queue_moves_when_multi_queue_is_not_negotiated() {
    let mut guest = Guest::new(2);
    guest.activate(1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR);
    assert_eq!(guest.command(2, &[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    assert_eq!(guest.config(0), [2, 0, 0, 0, 0, 9]);
    // Queues that the driver enabled without need come back as well.
    guest.deactivate();
    assert!(guest.queues.iter().all(Option::is_some));
}

#[test]
fn offloads_follow_negotiation_and_the_drivers_choice() {
    let negotiated = Offloads::CSUM.with(Offloads::TSO4);
    let features = MQ | negotiated.bits() | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
    let mut guest = Guest::new(1);
    let features = features & !(1 << VIRTIO_NET_F_MQ);
    guest.activate(features);
    assert_eq!(guest.host.calls()[0], Call::Offloads(negotiated));
    let command = [&[5, 0][..], &Offloads::CSUM.bits().to_le_bytes()].concat();
    assert_eq!(guest.command(2, &command), 0);
    guest.deactivate();
    guest.host.calls();
    guest.activate(features);
    assert_eq!(guest.host.calls()[0], Call::Offloads(Offloads::CSUM));
    guest.deactivate();
    guest.net.reset();
    guest.host.calls();
    guest.activate(0);
    assert_eq!(guest.host.calls()[0], Call::Offloads(Offloads::NONE));
}

#[test]
fn driver_error_asks_for_a_reset_and_stops_the_pair() {
    let mut guest = Guest::new(1);
    guest.activate(MRG);
    guest.drivers[1].set_avail_index(QUEUE_SIZE + 1);
    guest.ring(1);
    wait_for(|| guest.interrupt.needs_reset().then_some(()));
    guest.offer_receive(0, 0);
    guest.host.arrives(0, &packet(64, 0));
    guest.deactivate();
    assert!(guest.used(0).is_empty());
}

#[test]
fn announcement_is_asked_for_and_acknowledged() {
    let features = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
    let mut guest = Guest::new(1);
    let handle = guest.net.handle();
    assert_eq!(guest.status(), 1);
    assert_eq!(handle.announce(), Announcement::Deferred);
    assert_eq!(guest.status(), 1);
    guest.activate(features);
    assert_eq!(guest.status(), 3, "asked as soon as there is a driver");
    assert_eq!(guest.route.delivered().len(), 1);
    assert_eq!(guest.command(2, &[3, 0]), 0);
    assert_eq!(guest.status(), 1);
    assert_eq!(handle.announce(), Announcement::Asked);
    assert_eq!(guest.status(), 3);
    guest.deactivate();
    guest.net.reset();
    assert_eq!(guest.status(), 1);
    guest.activate(0);
    assert_eq!(handle.announce(), Announcement::Unsupported);
    assert_eq!(guest.status(), 1);
}

#[test]
fn host_end_announces_the_drivers_address_whatever_the_driver_can() {
    let mut guest = Guest::new(1);
    let handle = guest.net.handle();
    assert_eq!(handle.announce(), Announcement::Deferred);
    assert_eq!(guest.host.calls(), [Call::Announce(MAC)]);
    guest.activate(1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR);
    let own = [2, 0, 0, 0, 0, 9];
    assert_eq!(guest.command(2, &[&[1, 1][..], &own].concat()), 0);
    guest.host.calls();
    assert_eq!(handle.announce(), Announcement::Unsupported);
    assert_eq!(guest.host.calls(), [Call::Announce(own)]);
    // The driver is asked even where the host end cannot, and the operator hears of that.
    guest.deactivate();
    guest.activate(1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE);
    guest.host.fail(24);
    assert_eq!(handle.announce(), Announcement::Asked);
    assert_eq!(guest.status(), 3);
    let events = guest.events.taken();
    assert!(
        matches!(
            events.as_slice(),
            [DeviceEvent::IoError {
                operation: "announce",
                ..
            }]
        ),
        "{events:?}"
    );
}

/// A move between the request and its answer: the destination's driver still has to answer.
#[test]
fn unanswered_announcement_moves_with_the_device() {
    let features = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
    let mut guest = Guest::new(1);
    guest.activate(features);
    guest.net.handle().announce();
    guest.deactivate();
    let mut other = Guest::new(1);
    other.net.restore(&guest.net.save().unwrap()).unwrap();
    other.activate(features);
    assert_eq!(other.status(), 3);
    assert_eq!(other.net.handle().announce(), Announcement::Asked);
    assert_eq!(other.route.delivered().len(), 1, "interrupted once more");
    assert_eq!(other.command(2, &[3, 0]), 0);
    assert_eq!(other.status(), 1);
}

#[test]
fn configuration_is_read_only() {
    let mut guest = Guest::new(2);
    let before = guest.config::<16>(0);
    guest.net.write_config(0, &[9; 12]);
    assert_eq!(guest.config::<16>(0), before);
    assert_eq!(before[8..12], [2, 0, 0xdc, 5]);
}

#[test]
fn state_round_trips() {
    let mut guest = Guest::new(2);
    guest.activate(MQ | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE);
    guest.command(4, &[4, 0, 2, 0]);
    guest.command(4, &[1, 1, 2, 0, 0, 0, 0, 9]);
    guest.net.handle().announce();
    guest.deactivate();
    let state = guest.net.save().unwrap();
    assert_eq!(guest.net.save().unwrap(), state, "saving changes nothing");
    let mut other = Guest::new(2);
    other.net.restore(&state).unwrap();
    assert_eq!(other.net.save().unwrap(), state);
    assert_eq!(other.config(0), [2, 0, 0, 0, 0, 9]);
    assert_eq!(other.status(), 3);
    other.activate(MQ);
    assert_eq!(
        other.host.calls()[1..],
        [Call::Open(0, true), Call::Open(1, true)]
    );
    // A driver that did not negotiate multi-queue can only mean a state made up by hand.
    let mut other = Guest::new(2);
    other.net.restore(&state).unwrap();
    other.activate(0);
    assert_eq!(other.net.handle().active_pairs(), 1);
}

#[test]
fn impossible_states_are_refused() {
    let good = NetStateV1 {
        mac: MAC,
        mtu: Some(1500),
        announce: false,
        active_pairs: 1,
        offloads: None,
    };
    type Spoil = fn(&mut NetStateV1);
    let cases: [(&str, Spoil); 8] = [
        ("mac", |state| state.mac = [1, 0, 0, 0, 0, 1]),
        ("mac", |state| state.mac = [0; 6]),
        ("mtu", |state| state.mtu = None),
        ("mtu", |state| state.mtu = Some(9000)),
        ("active_pairs", |state| state.active_pairs = 0),
        ("active_pairs", |state| state.active_pairs = 3),
        ("offloads", |state| state.offloads = Some(1)),
        ("offloads", |state| state.offloads = Some(u64::MAX)),
    ];
    for (name, spoil) in cases {
        let mut guest = Guest::new(2);
        let before = guest.net.save().unwrap();
        let mut wire = good.clone();
        spoil(&mut wire);
        let state = DeviceState::encode("virtio-net", 1, &wire).unwrap();
        let error = guest.net.restore(&state).unwrap_err();
        assert!(
            matches!(&error, RestoreError::InvalidField { field, .. } if *field == name),
            "{error}"
        );
        assert_eq!(
            guest.net.save().unwrap(),
            before,
            "{name}: changed nevertheless"
        );
    }
    let mut guest = Guest::new(2);
    let state = |kind, version| DeviceState::encode(kind, version, &good).unwrap();
    guest.net.restore(&state("virtio-net", 1)).unwrap();
    assert!(guest.net.restore(&state("virtio-block", 1)).is_err());
    assert!(guest.net.restore(&state("virtio-net", 2)).is_err());
    // A device without offloads must not be restored into one that uses them.
    let offload = false;
    let mut plain = Guest::with(
        2,
        NetOptions {
            offload,
            ..options()
        },
    );
    let wire = NetStateV1 {
        offloads: Some(Offloads::CSUM.bits()),
        ..good
    };
    let state = DeviceState::encode("virtio-net", 1, &wire).unwrap();
    assert!(plain.net.restore(&state).is_err());
}

#[test]
fn rate_limited_device_goes_on_by_itself() {
    let limits = RateLimits {
        ops: limit(200, 2),
        bytes: None,
    };
    let mut guest = Guest::with(
        1,
        NetOptions {
            receive_limits: limits,
            transmit_limits: limits,
            ..options()
        },
    );
    for slot in 0..10 {
        guest.offer_receive(0, slot);
    }
    guest.activate(MRG);
    let counters = guest.net.handle().counters();
    for _ in 0..10 {
        guest.transmit(1, &packet(64, 0));
        guest.host.arrives(0, &packet(64, 0));
    }
    wait_for(|| (counters.transmit.packets.get() == 10).then_some(()));
    wait_for(|| (counters.receive.packets.get() == 10).then_some(()));
    assert!(counters.transmit.throttled.get() > 0 && counters.receive.throttled.get() > 0);
}

#[test]
fn counters_have_distinct_names() {
    use crate::counters::Counters;
    let counters = Guest::new(1).net.handle().counters();
    counters.receive.packets.add(7);
    let mut seen = std::collections::BTreeMap::new();
    counters.visit(&mut |name, help, value| {
        assert!(!help.is_empty() && name.starts_with("net_") && name.ends_with("_total"));
        assert!(seen.insert(name, value).is_none(), "{name} twice");
    });
    assert_eq!(seen["net_receive_packets_total"], 7);
    assert_eq!(seen.len(), 14);
}
