//! What servers mark in the log of a migration, and when.

use std::collections::BTreeSet;
use std::sync::Arc;

use devices::Migratability;
use devices::testing::DriverQueue;
use devices::virtio::VirtioDevice;
use devices::virtio::vhost_user::VhostUser;
use migration::ports::DirtyTracker;
use migration::{DirtyBitmap, PageIndex};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::super::open_net;
use super::disk::{self, DATA, Daemon, HEADERS, OK, OUT};
use super::echo::Echo;
use super::net;
use super::rig::{Guest, directory, loss, reporter};
use super::script::{Fault, SET_LOG_BASE, Script};
use crate::config::{DiskConfig, MacAddress};
use crate::control::errors::chain;
use crate::migrate::ServerLogTracker;

const PAGE_BYTES: u64 = 4096;

fn tracker(guest: &Guest<VhostUser>) -> ServerLogTracker {
    ServerLogTracker::new(Arc::clone(&guest.memory), vec![guest.device.handle()])
}

/// Everything that is harvested, by page.
fn harvest(guest: &Guest<VhostUser>, tracker: &ServerLogTracker) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for region in guest.memory.iter() {
        let start = PageIndex::containing(region.start_addr().raw_value());
        let mut bitmap = DirtyBitmap::new(start, GuestMemoryRegion::len(region) / PAGE_BYTES);
        tracker.harvest(&mut bitmap).unwrap();
        found.extend(bitmap.runs().flat_map(|run| run.start.0..run.end().0));
    }
    found
}

/// Pages with any of `pieces`, each an address and a length.
fn pages(pieces: &[(u64, u64)]) -> BTreeSet<u64> {
    let of = |(at, len): &(u64, u64)| at / PAGE_BYTES..=(at + len - 1) / PAGE_BYTES;
    pieces.iter().flat_map(of).collect()
}

/// What is written to queue `index` when one request comes back.
fn used(index: u64) -> (u64, u64) {
    (index * DriverQueue::BYTES + 0x6000, 12)
}

const STATUS: (u64, u64) = (HEADERS + 32, 1);

#[test]
fn storage_daemon_marks_what_it_writes_and_nothing_else() {
    let Some(daemon) = Daemon::new(true) else {
        return;
    };
    let (mut guest, events) = daemon.disk();
    let tracker = tracker(&guest);
    assert_eq!(guest.device.migratability(), Migratability::Supported);
    disk::read(&mut guest, 0, 0, 0x1_0000);
    tracker.start().unwrap();
    assert_eq!(harvest(&guest, &tracker), pages(&[]), "before the start");
    for (queue, len) in [(0, 0x1_0000), (1, 512), (0, 0x3000)] {
        disk::read(&mut guest, queue, 8, len);
        let expected = pages(&[(DATA, len as u64), STATUS, used(queue as u64)]);
        assert_eq!(harvest(&guest, &tracker), expected, "{len} bytes");
        assert_eq!(harvest(&guest, &tracker), pages(&[]), "each once");
    }
    // What the server reads it does not mark.
    assert_eq!(disk::write(&mut guest, 1, 0, &[7; 0x4000]), OK);
    assert_eq!(harvest(&guest, &tracker), pages(&[STATUS, used(1)]));
    tracker.stop().unwrap();
    disk::read(&mut guest, 0, 0, 0x1_0000);
    assert_eq!(harvest(&guest, &tracker), pages(&[]));
    // Nor anything from then for the next migration.
    tracker.start().unwrap();
    assert_eq!(harvest(&guest, &tracker), pages(&[]));
    disk::read(&mut guest, 0, 0, 512);
    let expected = pages(&[(DATA, 512), STATUS, used(0)]);
    assert_eq!(harvest(&guest, &tracker), expected);
    tracker.stop().unwrap();
    assert!(events.try_recv().is_err());
}

#[test]
fn log_stays_on_over_a_pause_a_reset_and_a_new_connection() {
    let Some(mut daemon) = Daemon::new(true) else {
        return;
    };
    let (mut guest, events) = daemon.disk();
    let tracker = tracker(&guest);
    tracker.start().unwrap();
    let expected = pages(&[(DATA, 0x2000), STATUS, used(1)]);
    let check = |guest: &mut Guest<VhostUser>, when: &str| {
        harvest(guest, &tracker);
        disk::read(guest, 1, 0, 0x2000);
        assert_eq!(harvest(guest, &tracker), expected, "{when}");
    };
    let queues = guest.pause();
    guest.resume(queues);
    check(&mut guest, "after a pause");
    guest.reset();
    check(&mut guest, "after a reset");
    daemon.kill_and_restart();
    loss(&events);
    let blocked = guest.device.migratability();
    assert!(
        matches!(&blocked, Migratability::Blocked(why) if why.contains("is gone")),
        "{blocked:?}"
    );
    guest.reset();
    check(&mut guest, "after a new connection");
    // And begins with a device that was not at work when it was switched on.
    tracker.stop().unwrap();
    let queues = guest.pause();
    tracker.start().unwrap();
    guest.resume(queues);
    check(&mut guest, "after a pause in which it began");
    let queues = guest.pause();
    tracker.stop().unwrap();
    guest.resume(queues);
    disk::read(&mut guest, 1, 0, 0x2000);
    assert_eq!(harvest(&guest, &tracker), pages(&[]));
}

#[test]
fn log_that_is_switched_while_requests_are_in_flight_disturbs_none() {
    let Some(daemon) = Daemon::new(true) else {
        return;
    };
    let (mut guest, events) = daemon.disk();
    let log = tracker(&guest);
    for round in 0..100 {
        let data = disk::pattern(round, 4096);
        guest.write(DATA, &data);
        for slot in 0..8 {
            disk::offer(&mut guest, 0, slot, (OUT, slot * 8), 4096);
        }
        guest.lines[0].ring();
        match round % 2 {
            0 => log.start().unwrap(),
            _ => log.stop().unwrap(),
        }
        guest.lines[0].wait_all(8);
        for slot in 0..8 {
            assert_eq!(disk::status(&guest, slot), OK, "round {round} slot {slot}");
        }
    }
    assert!(events.try_recv().is_err());
}

/// As QEMU's, DPDK's and rust-vmm's servers answer the request that brings the log.
#[test]
fn servers_may_answer_with_a_payload_of_any_length() {
    for answer in [&[][..], &[0; 8], &[0; 16]] {
        let directory = directory();
        let socket = directory.as_path().join("net.sock");
        let server = Echo::listen_with_log(&socket, answer);
        let (device, _events) = net::interface(&socket, &net::config());
        let mut guest = Guest::new(device.unwrap());
        let tracker = tracker(&guest);
        net::echoes(&mut guest, 0, 100);
        tracker.start().unwrap();
        net::echoes(&mut guest, 1, 5000);
        let expected = pages(&[(net::RECEIVED, 5012), used(0), used(1)]);
        assert_eq!(harvest(&guest, &tracker), expected, "{answer:?}");
        tracker.stop().unwrap();
        net::echoes(&mut guest, 2, 5000);
        assert_eq!(harvest(&guest, &tracker), pages(&[]));
        drop((tracker, guest));
        assert_eq!(server.features() & 1 << 26, 0, "the log is off again");
    }
}

#[test]
fn answers_to_the_log_that_are_none_cost_the_connection() {
    for (fault, said) in [
        (Fault::Close, "has closed the connection"),
        (Fault::CutAt(11), "has closed the connection"),
        (Fault::CutAt(20), "has closed the connection"),
        (
            Fault::Header(5, 5, 16),
            "does not follow the vhost-user protocol",
        ),
        (
            Fault::Header(SET_LOG_BASE, 1, 16),
            "does not follow the vhost-user protocol",
        ),
        (
            Fault::Payload(vec![0; 17]),
            "does not follow the vhost-user protocol",
        ),
    ] {
        let directory = directory();
        let socket = directory.as_path().join("disk.sock");
        let mut script = Script::with_fault(SET_LOG_BASE, fault.clone());
        script.features |= 1 << 26;
        script.protocol_features |= 1 << 1;
        let server = script.listen(&socket);
        let config = DiskConfig {
            queues: 1,
            queue_size: 64,
            ..DiskConfig::default()
        };
        let disk = super::super::open_block(&socket, &config, reporter().0).unwrap();
        let guest = Guest::new(disk);
        let error = tracker(&guest).start().unwrap_err();
        let error = chain(&error);
        assert!(
            error.contains("test0: ") && error.contains("SET_LOG_BASE"),
            "{error}"
        );
        assert!(error.contains(said), "{fault:?}: {error}");
        drop(guest);
        server.join().unwrap();
    }
}

#[test]
fn server_without_a_log_is_not_asked_for_one() {
    let directory = directory();
    let socket = directory.as_path().join("net.sock");
    let _server = Echo::listen(&socket);
    let mac = MacAddress([2, 0, 0, 0, 0, 1]);
    let device = open_net(&socket, &net::config(), mac, reporter().0).unwrap();
    let mut guest = Guest::new(device);
    let Migratability::Blocked(reason) = guest.device.migratability() else {
        panic!("it would move with memory that nobody follows");
    };
    assert!(
        reason.contains("VHOST_USER_PROTOCOL_F_LOG_SHMFD and VHOST_F_LOG_ALL"),
        "{reason}"
    );
    let error = tracker(&guest).start().unwrap_err();
    assert!(
        chain(&error).contains("no log of what it writes"),
        "{error}"
    );
    net::echoes(&mut guest, 1, 100);
}
