//! Activation, pause and resume, reset, configuration writes.

use std::thread;

use super::*;
use crate::virtio::ActivationError;

#[test]
fn activation_hands_queues_over_and_kicks_each_once() {
    let mut rig = Rig::new();
    let mut queues = rig.queues();
    queues[1].set_positions(0xfffe, 0xfffe);
    rig.set_used_index(1, 0xfffe);
    rig.resume(queues).unwrap();
    let state = rig.peer.0.lock();
    // Only what both sides know; bit 63 is none of the peer's business.
    let expected = mask(&[VIRTIO_F_VERSION_1, VIRTIO_BLK_F_FLUSH]);
    assert_eq!(state.features, expected);
    let given = |index, next_avail| GivenQueue {
        index,
        size: 64,
        addresses: [0, 0x4000, 0x6000].map(|at| base(index) + at),
        next_avail,
    };
    assert_eq!(state.given, [given(0, 0), given(1, 0xfffe)]);
    for kick in &state.kicks {
        assert_eq!(kick.read().unwrap(), 1);
    }
}

#[test]
fn peer_signals_the_route_of_the_queues_vector() {
    let mut rig = Rig::new();
    rig.activate();
    rig.peer
        .with(|state| state.event_calls[1].write(5).unwrap());
    use crate::interrupt::MsiRoute;
    assert_eq!(rig.routes[1].eventfd().read().unwrap(), 5);
}

#[test]
fn queue_without_a_vector_is_signalled_where_nobody_listens() {
    let mut rig = Rig::new();
    let driver = DriverQueue::new(&rig.memory, 0, 64);
    let (queue, route) = driver.device_side(0);
    // An interrupt side that knows no queue at all, as after a driver that polls.
    let id = DeviceId::new("disk0").unwrap();
    let interrupt = Arc::new(crate::virtio::VirtioInterrupt::for_test(
        id,
        Arc::clone(&route) as Arc<dyn crate::interrupt::MsiRoute>,
        0,
    ));
    let queue = Virtqueue::new(
        0,
        driver.queue(false),
        Arc::clone(&rig.memory),
        queue.doorbell().try_clone().unwrap(),
        crate::virtio::QueueInterrupt::new(interrupt, 0),
    );
    rig.resume(vec![queue]).unwrap();
    rig.peer
        .with(|state| state.event_calls[0].write(1).unwrap());
    rig.device.deactivate();
    assert!(route.delivered().is_empty());
}

#[test]
fn device_without_queues_is_the_drivers_mistake() {
    let mut rig = Rig::new();
    let queues = rig.queues();
    let mut activation = rig.activation(queues);
    activation.queues.clear();
    let error = rig.device.activate(activation).unwrap_err();
    assert!(matches!(error, ActivationError::MissingQueue(0)), "{error}");
    assert!(rig.peer.calls().is_empty());
}

#[test]
fn queues_come_back_with_the_positions_of_the_peer_and_an_interrupt() {
    let mut rig = Rig::new();
    rig.activate();
    rig.peer.with(|state| state.positions = vec![7, 0]);
    rig.set_used_index(0, 7);
    let queues = rig.device.deactivate();
    let positions: Vec<_> = queues
        .iter()
        .map(|queue| (queue.state().next_avail, queue.state().next_used))
        .collect();
    assert_eq!(positions, [(7, 7), (0, 0)]);
    for route in &rig.routes {
        assert_eq!(route.delivered().len(), 1);
    }
    assert_eq!(rig.peer.calls(), ["start", "stop"]);
    assert!(rig.device.deactivate().is_empty());
    assert!(rig.peer.calls().is_empty());

    rig.resume(queues).unwrap();
    rig.peer
        .with(|state| assert_eq!(state.given[0].next_avail, 7));
}

#[test]
fn peer_is_stopped_when_it_has_answered_what_the_driver_offered() {
    let mut rig = Rig::new();
    rig.device.finish_limit = Duration::from_secs(3600);
    rig.activate();
    let doorbell = rig.peer.with(|state| state.kicks[0].try_clone().unwrap());
    assert_eq!(doorbell.read().unwrap(), 1, "the one of the start");
    rig.set_available_index(0, 3);
    rig.peer.with(|state| state.positions = vec![3, 0]);
    let peer = rig.peer.clone();
    let memory = Arc::clone(&rig.memory);
    let server = thread::spawn(move || {
        // The driver has not rung; the device does, and then waits for every answer.
        while doorbell.read().is_err() {
            thread::yield_now();
        }
        for used in [1, 2, 3] {
            assert!(!peer.calls().contains(&"stop"), "stopped at {used}");
            set_used_index(&memory, 0, used);
        }
    });
    let queues = rig.device.deactivate();
    server.join().unwrap();
    let state = queues[0].state();
    assert_eq!((state.next_avail, state.next_used), (3, 3));
}

#[test]
fn peer_that_is_lost_meanwhile_is_not_waited_for() {
    let mut rig = Rig::new();
    rig.device.finish_limit = Duration::from_secs(3600);
    rig.activate();
    rig.set_available_index(0, 3);
    rig.peer.hang_up();
    assert_eq!(rig.device.deactivate().len(), 2);
    assert_eq!(rig.losses(), 1);
}

#[test]
fn pause_waits_for_requests_that_end_after_the_stop() {
    let mut rig = Rig::new();
    rig.device.finish_limit = Duration::from_millis(20);
    rig.activate();
    rig.set_available_index(0, 2);
    rig.set_used_index(0, 0xffff);
    let memory = Arc::clone(&rig.memory);
    rig.peer.with(|state| {
        state.positions = vec![2, 0];
        state.on_stop = Some(Box::new(move || {
            // The last three requests, two of them across the end of the index.
            thread::spawn(move || {
                for used in [0, 1, 2] {
                    set_used_index(&memory, 0, used);
                }
            });
        }));
    });
    let queues = rig.device.deactivate();
    let state = queues[0].state();
    assert_eq!((state.next_avail, state.next_used), (2, 2));
    // The peer that kept its word is not connected anew by a reset.
    rig.peer.calls();
    rig.device.reset();
    assert!(rig.peer.calls().is_empty());
}

#[test]
fn requests_that_do_not_end_go_on_after_a_pause_and_are_cut_off_by_a_reset() {
    let mut rig = Rig::new();
    rig.device.finish_limit = Duration::from_millis(20);
    rig.device.drain_limit = Duration::from_millis(20);
    rig.activate();
    rig.set_available_index(0, 3);
    rig.peer.with(|state| state.positions = vec![3, 0]);
    rig.set_used_index(0, 1);
    let queues = rig.device.deactivate();
    let state = queues[0].state();
    assert_eq!((state.next_avail, state.next_used), (3, 1));
    assert_eq!(rig.losses(), 0);
    rig.resume(queues).unwrap();
    rig.peer
        .with(|state| assert_eq!(state.given[0].next_avail, 3));
    rig.device.deactivate();
    rig.peer.calls();
    rig.device.reset();
    assert_eq!(rig.peer.calls(), ["reconnect", "read_config"]);
    rig.device.reset();
    assert!(rig.peer.calls().is_empty());
}

#[test]
fn impossible_indices_are_not_waited_for() {
    let mut rig = Rig::new();
    rig.device.finish_limit = Duration::from_secs(3600);
    rig.device.drain_limit = Duration::from_secs(3600);
    rig.activate();
    rig.set_available_index(0, 3);
    rig.peer.with(|state| state.positions = vec![3, 0]);
    // 65 requests cannot be in a queue of 64.
    rig.set_used_index(0, 3_u16.wrapping_sub(65));
    rig.device.deactivate();
}

#[test]
fn driver_changes_the_cache_mode_through_the_peer() {
    let mut rig = Rig::new();
    let read = |device: &VhostUser| {
        let mut value = [0];
        device.read_config(32, &mut value);
        value[0]
    };
    rig.device.write_config(32, &[1]);
    assert_eq!(read(&rig.device), 1);
    rig.peer.with(|state| assert_eq!(state.config[32], 1));
    rig.peer.fail("write_config", "no");
    rig.device.write_config(32, &[0]);
    assert_eq!(read(&rig.device), 1);
    rig.peer.with(|state| state.failing = None);
    rig.peer.calls();
    // Other fields, other values, other sizes.
    rig.device.write_config(0, &[1]);
    rig.device.write_config(32, &[2]);
    rig.device.write_config(32, &[1, 0]);
    rig.device.write_config(u64::MAX, &[1]);
    assert!(rig.peer.calls().is_empty());
    // The next driver finds the disk as the first one did.
    rig.device.reset();
    assert_eq!(rig.peer.calls(), ["write_config"]);
    assert_eq!(read(&rig.device), 0);
}
