//! What is saved, what is taken over, and what stays where it is.

use super::super::state::{FORMAT, VhostUserStateV1};
use super::*;
use crate::device::Migratability;
use crate::state::{DeviceState, RestoreError, SaveError};

fn blocked(device: &VhostUser) -> String {
    match device.migratability() {
        Migratability::Blocked(reason) => reason,
        Migratability::Supported => String::new(),
    }
}

/// A disk whose peer has made `offer` and has `config`.
fn disk(offer: PeerOffer, config: Vec<u8>) -> (VhostUser, FakePeer) {
    let peer = FakePeer::new(offer);
    peer.with(|state| state.config = config);
    let device = VhostUser::block(Box::new(peer.clone()), block_options(QUEUES), reporter().0);
    (device.unwrap(), peer)
}

fn interface(mac: [u8; 6], mtu: u16) -> VhostUser {
    let options = VhostUserNetOptions {
        mac,
        mtu: Some(mtu),
        offload: true,
        queue_pairs: 1,
        queue_size: 64,
    };
    let peer = Box::new(FakePeer::new(offer()));
    VhostUser::net(peer, options, reporter().0).unwrap()
}

fn space(device: &VhostUser, bytes: usize) -> Vec<u8> {
    let mut space = vec![0; bytes];
    device.read_config(0, &mut space);
    space
}

fn wire(device: &VhostUser) -> VhostUserStateV1 {
    FORMAT.decode(&device.save().unwrap()).unwrap()
}

#[test]
fn disk_goes_on_with_the_cache_mode_that_its_driver_has_chosen() {
    let (mut here, _) = disk(offer(), config_bytes());
    assert_eq!(blocked(&here), "");
    here.write_config(32, &[1]);
    let (mut there, peer) = disk(offer(), config_bytes());
    there.restore(&here.save().unwrap()).unwrap();
    assert_eq!(space(&there, 60), space(&here, 60));
    peer.with(|state| assert_eq!(state.config[32], 1));
    // A new driver finds what the peer has by itself.
    there.reset();
    assert_eq!(space(&there, 60)[32], 0);
    peer.with(|state| assert_eq!(state.config[32], 0));

    let (mut refusing, peer) = disk(offer(), config_bytes());
    peer.fail("write_config", "never");
    let error = refusing.restore(&here.save().unwrap()).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("writeback is 1: the vhost-user server does not take it: never"),
        "{error}"
    );
    assert_eq!(space(&refusing, 60)[32], 0);
}

#[test]
fn device_offers_no_more_than_where_it_was() {
    let (here, _) = disk(offer(), config_bytes());
    let mut more = offer();
    more.features |= mask(&[virtio_bindings::virtio_blk::VIRTIO_BLK_F_DISCARD]);
    let (mut there, _) = disk(more, config_bytes());
    there.restore(&here.save().unwrap()).unwrap();
    assert_eq!(there.identity().features, here.identity().features);
    assert_eq!(
        there.identity().ring_features,
        here.identity().ring_features
    );
    // Nor does it move on as more, or need more of the next peer.
    assert_eq!(there.save().unwrap(), here.save().unwrap());
}

#[test]
fn interface_keeps_its_address() {
    let here = interface([2, 0, 0, 0, 0, 1], 9000);
    let mut there = interface([2, 0, 0, 0, 0, 7], 9000);
    there.restore(&here.save().unwrap()).unwrap();
    assert_eq!(space(&there, 12), space(&here, 12));
    there.reset();
    assert_eq!(space(&there, 12), space(&here, 12));
    let mut smaller = interface([2, 0, 0, 0, 0, 1], 1500);
    let error = smaller.restore(&here.save().unwrap()).unwrap_err();
    assert!(error.to_string().contains("at offset 10"), "{error}");
}

#[test]
fn state_that_does_not_fit_the_peer_is_refused_by_field() {
    let (mut device, _) = disk(offer(), config_bytes());
    let good = wire(&device);
    let change = |change: fn(&mut VhostUserStateV1)| {
        let mut wire = good.clone();
        change(&mut wire);
        wire
    };
    for (wire, said) in [
        (
            change(|wire| wire.device_type = 1),
            "device_type is 1: this device is of type 2",
        ),
        (
            change(|wire| wire.features |= 1 << 14),
            "does not offer 0x4000 of them",
        ),
        (change(|wire| wire.features = u64::MAX), "does not offer"),
        (
            change(|wire| wire.config.truncate(59)),
            "config is 59 bytes: it has 60 bytes here",
        ),
        (change(|wire| wire.config.clear()), "config is 0 bytes"),
        (change(|wire| wire.config[0] = 1), "has a disk of"),
        (
            change(|wire| wire.config[32] = 2),
            "writeback is 2: it is 0 or 1",
        ),
        (
            change(|wire| wire.config[59] = 7),
            "0x7 at offset 59: the vhost-user server here has 0x3b",
        ),
    ] {
        let check = device.handle().check(&wire).unwrap_err().to_string();
        let error = device.restore(&FORMAT.encode(&wire).unwrap()).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!(check, error.to_string(), "both look at the same");
    }
    assert_eq!(wire(&device), good, "nothing was taken over");
    let mut net = interface([2, 0, 0, 0, 0, 1], 9000);
    let mut wire = wire(&net);
    wire.config[0] = 0xff;
    let error = net.restore(&FORMAT.encode(&wire).unwrap()).unwrap_err();
    assert!(
        error.to_string().contains("not a unicast address"),
        "{error}"
    );
}

#[test]
fn bytes_that_are_no_state_are_refused() {
    let (mut device, _) = disk(offer(), config_bytes());
    for (kind, version) in [
        ("virtio-vhost-user", 1),
        ("virtio-vhost-user", 2),
        ("virtio-block", 1),
    ] {
        let state = DeviceState {
            kind: kind.to_owned(),
            version,
            bytes: vec![0xf6],
        };
        assert!(device.restore(&state).is_err(), "{kind} {version}");
    }
}

#[test]
fn peer_without_a_log_says_what_it_lacks() {
    let none = PeerOffer {
        log: false,
        ..offer()
    };
    let (device, _) = disk(none, config_bytes());
    assert_eq!(
        blocked(&device),
        "its vhost-user server does not offer VHOST_USER_PROTOCOL_F_LOG_SHMFD: what it writes to \
         guest memory cannot be followed"
    );
    let error = device.save().unwrap_err();
    assert!(matches!(error, SaveError::Blocked { .. }), "{error}");
    let mut neither = none;
    neither.features &= !mask(&[LOG_ALL]);
    let reason = blocked(&disk(neither, config_bytes()).0);
    assert!(
        reason.contains("LOG_SHMFD and VHOST_F_LOG_ALL:"),
        "{reason}"
    );
}

#[test]
fn file_system_stays_with_its_server() {
    let options = VhostUserFsOptions {
        tag: "t".to_owned(),
        queues: 1,
        queue_size: 64,
    };
    let peer = Box::new(FakePeer::new(offer()));
    let mut fs = VhostUser::fs(peer, &options, reporter().0).unwrap();
    assert!(blocked(&fs).contains("VHOST_USER_PROTOCOL_F_DEVICE_STATE"));
    assert_eq!(fs.state_format(), None);
    let error = fs.save().unwrap_err();
    assert!(matches!(error, SaveError::Blocked { .. }), "{error}");
    let (disk, _) = disk(offer(), config_bytes());
    let error = fs.restore(&disk.save().unwrap()).unwrap_err();
    assert!(
        matches!(error, RestoreError::InvalidField { .. }),
        "{error}"
    );
}

#[test]
fn lost_peer_or_one_with_requests_in_flight_stays() {
    let mut rig = Rig::new();
    rig.device.finish_limit = Duration::from_millis(20);
    rig.device.drain_limit = Duration::from_millis(20);
    rig.activate();
    rig.peer.with(|state| state.positions = vec![3, 0]);
    rig.set_used_index(0, 1);
    let queues = rig.device.deactivate();
    let reason = "its vhost-user server has requests in flight that do not end";
    assert_eq!(blocked(&rig.device), reason);
    assert!(rig.device.save().is_err());
    // They end after all.
    rig.resume(queues).unwrap();
    rig.set_used_index(0, 3);
    rig.device.deactivate();
    assert_eq!(blocked(&rig.device), "");
    rig.activate();
    rig.peer.hang_up();
    rig.loss();
    assert!(blocked(&rig.device).contains("is gone"));
    assert!(rig.device.save().is_err());
}

#[test]
fn log_reaches_the_peer_and_used_rings_are_marked_at_each_stop() {
    let mut rig = Rig::new();
    let handle = rig.device.handle();
    let log = PeerLog {
        file: Arc::new(std::fs::File::open("/dev/null").unwrap()),
        bytes: 4096,
    };
    rig.peer.fail("set_log", "no");
    assert_eq!(handle.set_log(Some(&log)).unwrap_err().to_string(), "no");
    rig.peer.with(|state| state.failing = None);
    handle.set_log(Some(&log)).unwrap();
    rig.peer.with(|state| assert_eq!(state.log, Some(4096)));
    let marks = |rig: &Rig| {
        let region = vm_memory::GuestMemoryBackend::iter(&*rig.memory)
            .next()
            .unwrap();
        let mut marks = [0];
        region.get_mmap().bitmap().harvest(&mut marks);
        marks[0]
    };
    for region in vm_memory::GuestMemoryBackend::iter(&*rig.memory) {
        region.get_mmap().bitmap().enable();
    }
    rig.activate();
    marks(&rig);
    rig.device.deactivate();
    let pages = (0..QUEUES).map(|index| (base(index) + 0x6000) / 4096);
    assert_eq!(marks(&rig), pages.fold(0, |marks, page| marks | 1 << page));
    handle.set_log(None).unwrap();
    rig.peer.with(|state| assert_eq!(state.log, None));
}
