//! Peers that go away, and come back.

use super::*;
use crate::device::Device;
use crate::events::DeviceEvent;
use crate::pci::PciFunction;
use crate::testing::FakeRouter;
use crate::virtio::{ActivationError, VirtioPci};

#[test]
fn peer_that_hangs_up_is_reported_once_and_the_device_asks_for_a_reset() {
    let mut rig = Rig::new();
    let interrupt = rig.activate();
    rig.peer.hang_up();
    assert_eq!(rig.loss(), "it closed the connection");
    let queues = rig.device.deactivate();
    assert!(interrupt.needs_reset());
    assert_eq!(queues.len(), 2);
    assert_eq!(rig.peer.calls(), ["start", "disconnect"]);
    assert_eq!(rig.losses(), 1);
    assert!(rig.events.try_recv().is_err());
}

#[test]
fn reset_connects_to_a_lost_peer_again() {
    let mut rig = Rig::new();
    rig.activate();
    rig.peer.hang_up();
    rig.loss();
    rig.device.deactivate();
    rig.peer.with(|state| state.config[0] = 0x77);
    rig.peer.calls();
    rig.device.reset();
    assert_eq!(rig.peer.calls(), ["reconnect", "read_config"]);
    let mut capacity = [0];
    rig.device.read_config(0, &mut capacity);
    assert_eq!(capacity, [0x77]);
    let interrupt = rig.activate();
    assert!(!interrupt.needs_reset());
    assert_eq!(rig.device.counters().reconnects.get(), 1);
    // And the new connection is watched as the first was.
    rig.peer.hang_up();
    rig.loss();
    rig.device.deactivate();
    assert_eq!(rig.losses(), 2);
}

#[test]
fn reset_without_a_peer_leaves_the_connection_to_the_activation() {
    let mut rig = Rig::new();
    rig.activate();
    rig.peer.hang_up();
    rig.loss();
    rig.device.deactivate();
    rig.peer.fail("reconnect", "nobody there");
    rig.device.reset();
    let queues = rig.queues();
    let error = rig.resume(queues).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "nobody there");
    assert!(!error.is_guest_caused());
    rig.peer.with(|state| state.failing = None);
    rig.activate();
    // The loss was reported once, not each time that the peer was still away.
    assert!(rig.events.try_recv().is_err());
}

#[test]
fn peer_lost_while_paused_is_connected_again_by_the_resume() {
    let mut rig = Rig::new();
    let interrupt = rig.activate();
    let queues = rig.device.deactivate();
    rig.peer.fail("start", "connection closed");
    rig.resume(queues).unwrap_err();
    assert_eq!(rig.loss(), "connection closed");
    rig.peer.with(|state| {
        state.failing = None;
        state.config[0] = 0x77;
    });
    rig.peer.calls();
    let queues = rig.queues();
    let resumed = Arc::clone(queues[0].interrupt().shared());
    rig.resume(queues).unwrap();
    assert_eq!(rig.peer.calls(), ["reconnect", "read_config", "start"]);
    assert!(!interrupt.needs_reset() && !resumed.needs_reset());
    // The driver hears that the new peer's disk has another size.
    assert_eq!(resumed.raised(), 1);
}

#[test]
fn resume_with_lost_requests_in_flight_asks_for_a_reset() {
    let mut rig = Rig::new();
    rig.activate();
    rig.peer.with(|state| state.positions = vec![0, 4]);
    rig.set_used_index(1, 4);
    let mut queues = rig.device.deactivate();
    rig.peer.fail("start", "connection closed");
    let again = rig.queues();
    rig.resume(again).unwrap_err();
    rig.peer.with(|state| state.failing = None);
    // Meanwhile it had taken one request.
    queues[1].set_positions(5, 4);
    let error = rig.resume(queues).unwrap_err();
    assert!(
        matches!(error, ActivationError::Queue { queue: 1, .. }),
        "{error}"
    );
    assert!(error.is_guest_caused());
}

#[test]
fn peer_that_comes_back_with_less_is_refused() {
    let mut rig = Rig::new();
    rig.activate();
    rig.peer.hang_up();
    rig.loss();
    rig.device.deactivate();
    rig.peer.calls();
    let full = offer();
    let cases = [
        (
            PeerOffer {
                features: full.features & !(1 << VIRTIO_BLK_F_FLUSH),
                ..full
            },
            "no longer offers features 0x200",
        ),
        (
            PeerOffer {
                features: full.features & !(1 << VIRTIO_RING_F_INDIRECT_DESC),
                ..full
            },
            "no longer offers features 0x10000000",
        ),
        (PeerOffer { queues: 1, ..full }, "works on 1 queues"),
    ];
    for (less, expected) in cases {
        rig.peer.with(|state| state.offer = less);
        let queues = rig.queues();
        let error = rig.resume(queues).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains(expected), "{source}");
        assert_eq!(rig.peer.calls(), ["reconnect", "disconnect"]);
    }
    // More than before is welcome, and not shown to a driver that did not know of it.
    rig.peer.with(|state| state.offer.queues = 4);
    rig.peer.with(|state| state.offer.features = u64::MAX);
    rig.device.reset();
    assert_eq!(rig.peer.calls(), ["reconnect", "read_config"]);
    assert_eq!(rig.device.identity().ring_features, 1 << 28);
}

#[test]
fn peer_that_cannot_be_stopped_is_lost() {
    let mut rig = Rig::new();
    let interrupt = rig.activate();
    rig.peer.fail("stop", "no answer");
    let queues = rig.device.deactivate();
    assert_eq!(queues.len(), 2);
    assert_eq!(rig.loss(), "no answer");
    assert!(interrupt.needs_reset());
    assert_eq!(rig.peer.calls(), ["start", "stop", "disconnect"]);
}

#[test]
fn peer_without_a_connection_to_watch_is_stopped_again() {
    let mut rig = Rig::new();
    rig.peer.with(|state| state.client_end = None);
    let queues = rig.queues();
    let error = rig.resume(queues).unwrap_err();
    assert!(matches!(error, ActivationError::Host { .. }), "{error}");
    assert_eq!(rig.peer.calls(), ["start", "stop"]);
}

#[test]
fn configuration_of_a_lost_peer_cannot_be_written() {
    let mut rig = Rig::new();
    rig.activate();
    rig.peer.hang_up();
    rig.loss();
    rig.peer.calls();
    rig.device.write_config(32, &[1]);
    assert!(rig.peer.calls().is_empty());
}

#[test]
fn link_is_down_while_an_interfaces_peer_is_gone() {
    let peer = FakePeer::new(offer());
    let (reporter, events) = reporter();
    let options = VhostUserNetOptions {
        mac: [2; 6],
        mtu: None,
        offload: true,
        queue_pairs: 1,
        queue_size: 64,
    };
    let mut device = VhostUser::net(Box::new(peer.clone()), options, reporter).unwrap();
    let status = |device: &VhostUser| {
        let mut status = [0; 2];
        device.read_config(6, &mut status);
        u16::from_le_bytes(status)
    };
    assert_eq!(status(&device), 1);
    let memory = ram(0x2_0000);
    let (queue, _route) = DriverQueue::new(&memory, 0, 64).device_side(0);
    let activation = Activation {
        memory,
        interrupt: Arc::clone(queue.interrupt().shared()),
        queues: vec![queue],
        features: 1 << VIRTIO_F_VERSION_1,
    };
    device.activate(activation).unwrap();
    peer.hang_up();
    let lost = events.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(lost, DeviceEvent::BackendLost { .. }), "{lost:?}");
    assert_eq!(status(&device), 0);
    device.deactivate();
    device.reset();
    assert_eq!(status(&device), 1);
}

/// Registers of the common configuration structure at the start of the BAR.
struct Driver(VirtioPci);

impl Driver {
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_bar(0, offset, data);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.0.read_bar(0, 0x14, &mut status);
        status[0]
    }

    fn initialize(&self, memory: &Arc<GuestRam>) {
        for status in [0, 1, 3] {
            self.write(0x14, &[status]);
        }
        self.write(0x08, &1_u32.to_le_bytes());
        self.write(0x0c, &1_u32.to_le_bytes());
        self.write(0x14, &[11]);
        let addresses = DriverQueue::new(memory, 0, 64).addresses();
        for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(addresses) {
            self.write(register, &address.to_le_bytes());
        }
        self.write(0x1c, &1_u16.to_le_bytes());
        self.write(0x14, &[15]);
    }
}

#[test]
fn vm_whose_server_is_away_cannot_be_resumed_until_it_is_back() {
    let peer = FakePeer::new(offer());
    let (reporter, _events) = reporter();
    let device = VhostUser::block(Box::new(peer.clone()), block_options(1), reporter).unwrap();
    let memory = ram(0x2_0000);
    let id = DeviceId::new("disk0").unwrap();
    let router = FakeRouter::default();
    let pci = VirtioPci::new(id, Box::new(device), Arc::clone(&memory), &router).unwrap();
    let driver = Driver(pci);
    driver.0.start().unwrap();
    driver.initialize(&memory);
    assert_eq!(driver.status(), 15);
    driver.0.pause().unwrap();
    peer.fail("start", "connection closed");
    driver.0.start().unwrap_err();
    peer.fail("reconnect", "nobody there");
    driver.0.start().unwrap_err();
    assert_eq!(driver.status(), 15);
    peer.with(|state| state.failing = None);
    driver.0.start().unwrap();
    assert_eq!(driver.status(), 15);
    // A driver that starts the device meets the same trouble as a device that needs a reset.
    driver.0.pause().unwrap();
    peer.fail("start", "connection closed");
    driver.initialize(&memory);
    assert_eq!(driver.status(), 15 | 64);
    peer.with(|state| state.failing = None);
    driver.initialize(&memory);
    assert_eq!(driver.status(), 15);
}
