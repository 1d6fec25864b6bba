//! A network interface behind a server in another thread, over a real socket.

use std::path::Path;
use std::sync::mpsc::Receiver;

use devices::events::DeviceEvent;
use devices::testing::Buffer;
use devices::virtio::VirtioDevice;
use devices::virtio::vhost_user::VhostUser;

use super::super::{VhostUserError, open_net};
use super::echo::{ECHO_FEATURES, Echo};
use super::rig::{Guest, directory, loss, reporter};
use crate::config::{MacAddress, NetConfig};

const RX: usize = 0;
const TX: usize = 1;
const HEADER_BYTES: usize = 12;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const LINK_UP: u16 = 1;

pub(super) const RECEIVED: u64 = 0x10_0000;
pub(super) const SENT: u64 = 0x20_0000;
const BUFFER_BYTES: u64 = 0x4000;

pub(super) fn config() -> NetConfig {
    let toml = "queue-size = 64\nmtu = 9000\n";
    toml::from_str(toml).unwrap()
}

pub(super) fn interface(
    socket: &Path,
    config: &NetConfig,
) -> (Result<VhostUser, VhostUserError>, Receiver<DeviceEvent>) {
    let (reporter, events) = reporter();
    (open_net(socket, config, MacAddress(MAC), reporter), events)
}

fn frame(number: usize, len: usize) -> Vec<u8> {
    let bytes = (0..len).map(|at| (number * 31 + at * 7) as u8);
    [vec![0; HEADER_BYTES], bytes.collect()].concat()
}

/// Gives the device room for a frame, in two pieces.
fn offer_room(guest: &mut Guest<VhostUser>, slot: usize) {
    let at = RECEIVED + slot as u64 * BUFFER_BYTES;
    let room = [
        Buffer::writable(at, HEADER_BYTES as u32),
        Buffer::writable(at + HEADER_BYTES as u64, BUFFER_BYTES as u32 / 2),
    ];
    guest.lines[RX].driver.offer(&room);
}

fn send(guest: &mut Guest<VhostUser>, slot: usize, frame: &[u8]) {
    let at = SENT + slot as u64 * BUFFER_BYTES;
    guest.write(at, frame);
    let (header, rest) = (HEADER_BYTES as u32, (frame.len() - HEADER_BYTES) as u32);
    let pieces = [
        Buffer::readable(at, header),
        Buffer::readable(at + u64::from(header), rest),
    ];
    guest.lines[TX].driver.offer(&pieces);
}

/// Waits for the frame in buffer `slot`, the next that comes, and compares.
fn expect(guest: &mut Guest<VhostUser>, slot: usize, sent: &[u8]) {
    let written = guest.lines[RX].wait() as usize;
    assert_eq!(written, sent.len());
    let at = RECEIVED + slot as u64 * BUFFER_BYTES;
    let found = guest.read(at, written);
    assert!(found[HEADER_BYTES..] == sent[HEADER_BYTES..], "slot {slot}");
    guest.lines[TX].wait();
}

pub(super) fn echoes(guest: &mut Guest<VhostUser>, number: usize, len: usize) {
    let sent = frame(number, len);
    offer_room(guest, 0);
    send(guest, 0, &sent);
    guest.lines[TX].ring();
    // The server may have seen the frame before the room.
    guest.lines[RX].ring();
    expect(guest, 0, &sent);
}

fn link_status(device: &VhostUser) -> u16 {
    let mut status = [0; 2];
    device.read_config(6, &mut status);
    u16::from_le_bytes(status)
}

#[test]
fn frames_come_back_from_the_server() {
    let directory = directory();
    let socket = directory.as_path().join("net.sock");
    let server = Echo::listen(&socket);
    let (device, _events) = interface(&socket, &config());
    let device = device.unwrap();
    let mut space = [0; 12];
    device.read_config(0, &mut space);
    assert_eq!(space[..6], MAC);
    assert_eq!(u16::from_le_bytes([space[10], space[11]]), 9000, "MTU");
    assert_eq!(link_status(&device), LINK_UP);
    let mut guest = Guest::new(device);
    for (number, len) in [14, 60, 1514, 4096, 8192, 1].into_iter().enumerate() {
        echoes(&mut guest, number, len);
    }
    drop(guest.pause());
    drop(guest);
    assert_eq!(
        server.features(),
        ECHO_FEATURES,
        "nothing it has not offered"
    );
}

#[test]
fn without_offloads_the_server_is_not_asked_for_any() {
    let directory = directory();
    let socket = directory.as_path().join("net.sock");
    let server = Echo::listen(&socket);
    let plain = NetConfig {
        offload: false,
        ..config()
    };
    let mut guest = Guest::new(interface(&socket, &plain).0.unwrap());
    echoes(&mut guest, 1, 1514);
    drop(guest);
    let offloads = 1 << 0 | 1 << 11;
    assert_eq!(server.features(), ECHO_FEATURES & !offloads);
}

#[test]
fn frames_on_both_sides_of_a_pause_arrive_once_and_in_order() {
    const ROUNDS: usize = 50;
    const BATCH: usize = 10;
    let directory = directory();
    let socket = directory.as_path().join("net.sock");
    let _server = Echo::listen(&socket);
    let (device, events) = interface(&socket, &config());
    let mut guest = Guest::new(device.unwrap());
    for round in 0..ROUNDS {
        let frames: Vec<_> = (0..2 * BATCH)
            .map(|slot| frame(round * 100 + slot, 64 + slot * 50))
            .collect();
        for slot in 0..2 * BATCH {
            offer_room(&mut guest, slot);
        }
        for (slot, frame) in frames.iter().enumerate().take(BATCH) {
            send(&mut guest, slot, frame);
        }
        guest.lines.iter().for_each(|line| line.ring());
        let queues = guest.pause();
        for queue in &queues {
            assert_eq!(queue.used_index().unwrap(), queue.state().next_avail);
        }
        for (slot, frame) in frames.iter().enumerate().skip(BATCH) {
            send(&mut guest, slot, frame);
        }
        guest.resume(queues);
        let received = guest.lines[RX].wait_all(2 * BATCH);
        guest.lines[TX].wait_all(2 * BATCH);
        for (slot, (_, len)) in received.into_iter().enumerate() {
            let at = RECEIVED + slot as u64 * BUFFER_BYTES;
            let found = guest.read(at, len as usize);
            let same = found[HEADER_BYTES..] == frames[slot][HEADER_BYTES..];
            assert!(same, "round {round} slot {slot}");
        }
    }
    assert!(events.try_recv().is_err());
}

#[test]
fn interface_goes_on_at_another_server_with_what_was_left_in_its_queues() {
    let directory = directory();
    let sockets = ["here", "there"].map(|name| directory.as_path().join(name));
    let _servers = sockets
        .each_ref()
        .map(|socket| Echo::listen_with_log(socket, &[]));
    let mut guest = Guest::new(interface(&sockets[0], &config()).0.unwrap());
    for number in 0..70 {
        echoes(&mut guest, number, 100 + number);
    }
    // Room that the first server has, and a frame that only the second one sees.
    offer_room(&mut guest, 0);
    guest.lines[RX].ring();
    let queues = guest.pause();
    let sent = frame(71, 1514);
    send(&mut guest, 0, &sent);
    let state = guest.device.save().unwrap();
    let mut there = interface(&sockets[1], &config()).0.unwrap();
    there.restore(&state).unwrap();
    guest.device = there;
    guest.resume(queues);
    expect(&mut guest, 0, &sent);
    echoes(&mut guest, 72, 8000);
}

#[test]
fn lost_server_takes_the_link_down_until_the_next_one_is_there() {
    let directory = directory();
    let socket = directory.as_path().join("net.sock");
    let server = Echo::listen(&socket);
    let (device, events) = interface(&socket, &config());
    let mut guest = Guest::new(device.unwrap());
    echoes(&mut guest, 1, 100);
    server.crash();
    assert_eq!(loss(&events), "it closed the connection");
    assert_eq!(link_status(&guest.device), 0);
    std::fs::remove_file(&socket).unwrap();
    let _server = Echo::listen(&socket);
    guest.reset();
    assert_eq!(link_status(&guest.device), LINK_UP);
    echoes(&mut guest, 2, 100);
}

#[test]
fn more_than_a_pair_of_queues_is_refused() {
    let directory = directory();
    let socket = directory.as_path().join("net.sock");
    let _server = Echo::listen(&socket);
    let many = NetConfig {
        queues: 2,
        ..config()
    };
    let Err(VhostUserError::Unfit { source, .. }) = interface(&socket, &many).0 else {
        panic!("it has one pair of queues");
    };
    assert_eq!(
        source.to_string(),
        "a vhost-user network device has 1 queue pair, not 2"
    );
}
