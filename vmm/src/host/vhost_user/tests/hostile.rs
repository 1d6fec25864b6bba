//! Servers that are away, refuse, answer nonsense or nothing: each ends with a message, in time.

use std::error::Error;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use devices::testing::{DriverQueue, ram};
use devices::virtio::vhost_user::{
    PeerError, PeerQueue, VhostUser, VhostUserBlockOptions, VhostUserPeer,
};
use devices::virtio::{DeviceType, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::super::{Limits, connect};
use super::rig::{DEADLINE, Guest, directory, loss, reporter, shared_ram};
use super::script::*;

/// For servers that are expected to answer, and for those that are not.
const PATIENCE: Duration = Duration::from_secs(20);
const IMPATIENCE: Duration = Duration::from_millis(500);

fn limits(limit: Duration) -> Limits {
    Limits {
        handshake: limit,
        start: limit,
        stop: limit,
    }
}

/// An error and what it came from, in one line.
fn explain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

fn dial(socket: &Path, limit: Duration) -> Result<Box<dyn VhostUserPeer>, PeerError> {
    Ok(connect(socket, DeviceType::Block, limits(limit))?)
}

/// Starts and stops two queues, on a peer that is connected.
fn start_and_stop(peer: &mut dyn VhostUserPeer) -> Result<(), PeerError> {
    let memory = shared_ram();
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    let queues = [0, 1].map(|index| {
        let driver = DriverQueue::new(&memory, u64::from(index) * DriverQueue::BYTES, 64);
        let [desc_table, avail_ring, used_ring] = driver.addresses();
        PeerQueue {
            index,
            size: 64,
            desc_table,
            avail_ring,
            used_ring,
            next_avail: 5,
            kick: &kick,
            call: &call,
        }
    });
    peer.start(&memory, 1 << 32, &queues)?;
    let positions = peer.stop(&[0, 1])?;
    // The scripted server gives back the position that it is asked with.
    assert_eq!(positions, [0, 0]);
    Ok(())
}

/// Everything that a device does with its peer.
fn whole_life(socket: &Path, limit: Duration) -> Result<(), PeerError> {
    let mut peer = dial(socket, limit)?;
    peer.read_config(&mut [0; 60])?;
    peer.write_config(32, &[1])?;
    start_and_stop(&mut *peer)
}

/// Runs a script that has a fault; the message that it leads to.
fn message_of(script: Script, limit: Duration) -> String {
    let directory = directory();
    let socket = directory.as_path().join("server.sock");
    let server = script.listen(&socket);
    let begin = Instant::now();
    let error = whole_life(&socket, limit).unwrap_err();
    // A drip-fed answer or a stuck one takes the limit, nothing takes longer.
    assert!(begin.elapsed() < limit + DEADLINE, "{:?}", begin.elapsed());
    server.join().unwrap();
    let message = explain(&*error);
    let path = socket.display().to_string();
    let rest = message.strip_prefix(&path).expect("the path comes first");
    rest.trim_start_matches(": ").to_owned()
}

#[test]
fn sound_server_is_asked_in_the_order_of_the_specification() {
    const HANDSHAKE: [u32; 5] = [
        SET_OWNER,
        GET_FEATURES,
        GET_PROTOCOL_FEATURES,
        SET_PROTOCOL_FEATURES,
        GET_QUEUE_NUM,
    ];
    const QUEUE: [u32; 5] = [
        SET_VRING_NUM,
        SET_VRING_BASE,
        SET_VRING_ADDR,
        SET_VRING_CALL,
        SET_VRING_KICK,
    ];
    const ENABLE: [u32; 2] = [SET_VRING_ENABLE, SET_VRING_ENABLE];
    const CONFIG: [u32; 2] = [GET_CONFIG, SET_CONFIG];
    const MEMORY: [u32; 2] = [SET_FEATURES, SET_MEM_TABLE];
    const STOP: [u32; 2] = [GET_VRING_BASE, GET_VRING_BASE];
    let begin = [MEMORY.as_slice(), &QUEUE, &QUEUE].concat();

    let acknowledging = Script::default();
    let expected = [&HANDSHAKE, &CONFIG[..], &begin, &ENABLE, &STOP, &ENABLE].concat();
    assert_eq!(requests(acknowledging, true), expected);

    // Without acknowledgements, one more answer shows that the others were understood.
    let silent = Script {
        protocol_features: PROTOCOL_FEATURES & !(1 << 3),
        ..Script::default()
    };
    let barrier = [GET_FEATURES];
    let expected = [
        &HANDSHAKE[..],
        &CONFIG,
        &begin,
        &ENABLE,
        &barrier,
        &STOP,
        &ENABLE,
    ]
    .concat();
    assert_eq!(requests(silent, true), expected);

    let plain = Script {
        features: FEATURES & !(1 << 30),
        ..Script::default()
    };
    let expected = [&HANDSHAKE[..2], &begin, &barrier, &STOP].concat();
    assert_eq!(requests(plain, false), expected);
}

/// What a server without a fault is asked.
fn requests(script: Script, has_config: bool) -> Vec<u32> {
    let directory = directory();
    let socket = directory.as_path().join("server.sock");
    let server = script.listen(&socket);
    if has_config {
        whole_life(&socket, PATIENCE).unwrap();
    } else {
        let mut peer = dial(&socket, PATIENCE).unwrap();
        assert!(!peer.offer().config);
        assert_eq!(peer.offer().queues, 1);
        start_and_stop(&mut *peer).unwrap();
    }
    server.join().unwrap()
}

#[test]
fn sockets_that_lead_nowhere_are_told_apart() {
    let directory = directory();
    let at = |name: &str| directory.as_path().join(name);
    std::fs::write(at("file"), "").unwrap();
    drop(UnixListener::bind(at("dead")).unwrap());
    symlink(at("absent"), at("link")).unwrap();
    let long = at(&"n".repeat(200));
    let table = [
        (at("absent"), "there is no such socket"),
        (at("link"), "there is no such socket"),
        (at("file"), "no vhost-user server listens there"),
        (at("dead"), "no vhost-user server listens there"),
        (directory.as_path().to_owned(), "no vhost-user server"),
        (at("file/below"), "cannot be connected"),
        (long, "cannot be connected"),
    ];
    for (socket, expected) in table {
        let error = dial(&socket, PATIENCE).err().expect(expected);
        let message = explain(&*error);
        assert!(message.contains(expected), "{message}, not {expected}");
        let path = socket.display().to_string();
        assert!(message.starts_with(&path), "{message}");
    }
}

#[test]
fn server_that_takes_no_connection_is_given_up() {
    let directory = directory();
    let socket = directory.as_path().join("server.sock");
    let listener = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None);
    let listener = listener.unwrap();
    let address = socket2::SockAddr::unix(&socket).unwrap();
    listener.bind(&address).unwrap();
    listener.listen(0).unwrap();
    let _first = UnixStream::connect(&socket).unwrap();
    let error = dial(&socket, IMPATIENCE).err().unwrap();
    let message = explain(&*error);
    assert!(
        message.ends_with("takes no connection within 500ms"),
        "{message}"
    );
}

#[test]
fn server_that_ends_the_connection_is_named_with_the_request() {
    let faults = [
        (SET_OWNER, "GET_FEATURES"),
        (GET_FEATURES, "GET_FEATURES"),
        (GET_PROTOCOL_FEATURES, "GET_PROTOCOL_FEATURES"),
        (SET_PROTOCOL_FEATURES, "GET_QUEUE_NUM"),
        (GET_QUEUE_NUM, "GET_QUEUE_NUM"),
        (GET_CONFIG, "GET_CONFIG"),
        (SET_CONFIG, "SET_CONFIG"),
        (SET_FEATURES, "SET_FEATURES"),
        (SET_MEM_TABLE, "SET_MEM_TABLE"),
        (SET_VRING_NUM, "SET_VRING_NUM"),
        (SET_VRING_BASE, "SET_VRING_BASE"),
        (SET_VRING_ADDR, "SET_VRING_ADDR"),
        (SET_VRING_KICK, "SET_VRING_KICK"),
        (SET_VRING_CALL, "SET_VRING_CALL"),
        (SET_VRING_ENABLE, "SET_VRING_ENABLE"),
        (GET_VRING_BASE, "GET_VRING_BASE"),
    ];
    for (request, name) in faults {
        let message = message_of(Script::with_fault(request, Fault::Close), PATIENCE);
        let expected = format!("vhost-user request {name}: the server has closed the connection");
        assert_eq!(message, expected);
    }
    for (request, len) in [(GET_FEATURES, 5), (GET_FEATURES, 12), (GET_CONFIG, 20)] {
        let message = message_of(Script::with_fault(request, Fault::CutAt(len)), PATIENCE);
        assert!(message.ends_with("closed the connection"), "{message}");
    }
    // The `vhost` crate looks at what came of an answer of no fixed length before it looks at
    // whether it is whole.
    let cut = Script::with_fault(GET_CONFIG, Fault::CutAt(70));
    let message = message_of(cut, PATIENCE);
    assert!(
        message.ends_with("does not follow the vhost-user protocol"),
        "{message}"
    );
}

#[test]
fn server_that_does_not_answer_is_given_up_in_time() {
    let faults = [
        (GET_FEATURES, Fault::Silence),
        (GET_FEATURES, Fault::StopAt(5)),
        (GET_FEATURES, Fault::StopAt(19)),
        (GET_FEATURES, Fault::Drip),
        (GET_FEATURES, Fault::Payload(vec![0; 4])),
        (GET_CONFIG, Fault::Silence),
        // As libvhost-user says that it cannot.
        (GET_CONFIG, Fault::Payload(Vec::new())),
        (SET_MEM_TABLE, Fault::Silence),
        (SET_VRING_KICK, Fault::Silence),
        (GET_VRING_BASE, Fault::Silence),
    ];
    for (request, fault) in faults {
        let label = format!("{request} {fault:?}");
        let message = message_of(Script::with_fault(request, fault), IMPATIENCE);
        let expected = "the server does not answer within 500ms";
        assert!(message.ends_with(expected), "{label}: {message}");
    }
}

#[test]
fn answers_that_break_the_protocol_are_refused() {
    const OK: u32 = 5;
    let config = |offset: u32, size: u32, len: usize| {
        let words = [offset, size, 0].map(u32::to_le_bytes);
        Fault::Payload([words.as_flattened(), &vec![0; len]].concat())
    };
    let number = |value: u64| Fault::Payload(value.to_le_bytes().to_vec());
    let http = b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec();
    let table = [
        (GET_FEATURES, Fault::Raw(http), "GET_FEATURES"),
        (GET_FEATURES, Fault::Raw(vec![0; 64]), "GET_FEATURES"),
        (GET_FEATURES, Fault::Raw(vec![0xff; 64]), "GET_FEATURES"),
        // Another request, no reply, another version, unknown flags, too long.
        (GET_FEATURES, Fault::Header(2, OK, 8), "GET_FEATURES"),
        (GET_FEATURES, Fault::Header(1, 1, 8), "GET_FEATURES"),
        (GET_FEATURES, Fault::Header(1, OK + 1, 8), "GET_FEATURES"),
        (GET_FEATURES, Fault::Header(1, 0, 8), "GET_FEATURES"),
        (GET_FEATURES, Fault::Header(1, OK, 0x1001), "GET_FEATURES"),
        (GET_FEATURES, Fault::Header(0, OK, 8), "GET_FEATURES"),
        (GET_FEATURES, Fault::Header(999, OK, 8), "GET_FEATURES"),
        // The rest of one answer is taken for the next.
        (
            GET_FEATURES,
            Fault::Payload([FEATURES.to_le_bytes(), [0xee; 8]].concat()),
            "GET_PROTOCOL_FEATURES",
        ),
        (GET_QUEUE_NUM, number(0x8001), "GET_QUEUE_NUM"),
        (GET_QUEUE_NUM, number(u64::MAX), "GET_QUEUE_NUM"),
        (GET_CONFIG, config(0, 59, 60), "GET_CONFIG"),
        (GET_CONFIG, config(1, 60, 60), "GET_CONFIG"),
        (GET_CONFIG, config(0, u32::MAX, 60), "GET_CONFIG"),
        (SET_MEM_TABLE, Fault::Header(6, OK, 8), "SET_MEM_TABLE"),
        (GET_VRING_BASE, Fault::Header(1, OK, 8), "GET_VRING_BASE"),
    ];
    for (request, fault, name) in table {
        let label = format!("{fault:?}");
        let message = message_of(Script::with_fault(request, fault), PATIENCE);
        let expected = format!(
            "vhost-user request {name}: the server's answer does not follow the vhost-user protocol"
        );
        assert_eq!(message, expected, "{label}");
    }
}

#[test]
fn impossible_position_of_a_queue_is_refused() {
    let answer = [0, 0x1_0000_u32].map(u32::to_le_bytes);
    let fault = Fault::Payload(answer.as_flattened().to_vec());
    let message = message_of(Script::with_fault(GET_VRING_BASE, fault), PATIENCE);
    assert_eq!(
        message,
        "vhost-user request GET_VRING_BASE: the server reports position 0x10000 of a queue with \
         16-bit positions"
    );
}

#[test]
fn requests_that_the_server_cannot_do_are_named() {
    let refusal = || Fault::Payload(1_u64.to_le_bytes().to_vec());
    let table = [
        (SET_CONFIG, "SET_CONFIG"),
        (SET_FEATURES, "SET_FEATURES"),
        (SET_MEM_TABLE, "SET_MEM_TABLE"),
        (SET_VRING_NUM, "SET_VRING_NUM"),
        (SET_VRING_ADDR, "SET_VRING_ADDR"),
        (SET_VRING_ENABLE, "SET_VRING_ENABLE"),
    ];
    for (request, name) in table {
        let message = message_of(Script::with_fault(request, refusal()), PATIENCE);
        let expected = format!("vhost-user request {name}: the server refuses");
        assert_eq!(message, expected);
    }
}

#[test]
fn memory_that_cannot_be_shared_is_not_sent() {
    let directory = directory();
    let socket = directory.as_path().join("server.sock");
    let server = Script::default().listen(&socket);
    let mut peer = dial(&socket, PATIENCE).unwrap();
    let error = peer.start(&ram(0x1_0000), 1 << 32, &[]).unwrap_err();
    let message = explain(&*error);
    assert!(
        message.ends_with("guest memory has no file behind it that the server could map"),
        "{message}"
    );
    drop(peer);
    assert!(!server.join().unwrap().contains(&SET_MEM_TABLE));
}

#[test]
fn refusal_leaves_the_connection_usable_and_a_failure_does_not() {
    let directory = directory();
    let socket = directory.as_path().join("server.sock");
    let refusal = Fault::Payload(1_u64.to_le_bytes().to_vec());
    let server = Script::with_fault(SET_CONFIG, refusal).listen(&socket);
    let mut peer = dial(&socket, PATIENCE).unwrap();
    peer.write_config(32, &[1]).unwrap_err();
    peer.write_config(32, &[1]).unwrap();
    assert!(peer.connection().is_ok());
    drop(peer);
    server.join().unwrap();

    std::fs::remove_file(&socket).unwrap();
    let server = Script::with_fault(GET_CONFIG, Fault::Close).listen(&socket);
    let mut peer = dial(&socket, PATIENCE).unwrap();
    peer.read_config(&mut [0; 60]).unwrap_err();
    server.join().unwrap();
    let again = explain(&*peer.read_config(&mut [0; 60]).unwrap_err());
    assert!(again.ends_with("server is not connected"), "{again}");
    assert!(peer.connection().is_err());
    let gone = explain(&*peer.reconnect().unwrap_err());
    assert!(
        gone.ends_with("no vhost-user server listens there"),
        "{gone}"
    );

    std::fs::remove_file(&socket).unwrap();
    let server = Script::default().listen(&socket);
    peer.reconnect().unwrap();
    peer.read_config(&mut [0; 60]).unwrap();
    peer.disconnect();
    server.join().unwrap();
}

/// A running disk over the scripted server, and the server.
fn running_disk(
    script: Script,
    socket: &Path,
    limit: Duration,
) -> (
    Guest<VhostUser>,
    std::sync::mpsc::Receiver<devices::events::DeviceEvent>,
    std::thread::JoinHandle<Vec<u32>>,
) {
    let server = script.listen(socket);
    let (reporter, events) = reporter();
    let options = VhostUserBlockOptions {
        queues: 2,
        queue_size: 64,
    };
    let peer = dial(socket, limit).unwrap();
    let disk = VhostUser::block(peer, options, reporter).unwrap();
    (Guest::new(disk), events, server)
}

#[test]
fn server_that_closes_or_falls_silent_while_the_disk_runs_is_lost() {
    for fault in [Fault::Close, Fault::Silence] {
        let directory = directory();
        let socket = directory.as_path().join("server.sock");
        let script = Script::with_fault(SET_CONFIG, fault);
        // Enough for the server to answer what it answers.
        let limit = 4 * IMPATIENCE;
        let (mut guest, events, server) = running_disk(script, &socket, limit);
        let interrupt = {
            guest.device.write_config(32, &[1]);
            assert_eq!(loss(&events), "it closed the connection");
            guest.pause()[0].interrupt().shared().clone()
        };
        assert!(interrupt.needs_reset());
        server.join().unwrap();
        // The next server takes over with the driver's reset.
        std::fs::remove_file(&socket).unwrap();
        let server = Script::default().listen(&socket);
        guest.reset();
        assert_eq!(guest.pause().len(), 2);
        drop(guest);
        assert!(server.join().unwrap().contains(&GET_VRING_BASE));
    }
}

#[test]
fn server_that_cannot_be_stopped_is_lost_and_the_queues_come_back() {
    let directory = directory();
    let socket = directory.as_path().join("server.sock");
    let script = Script::with_fault(GET_VRING_BASE, Fault::Silence);
    let (mut guest, events, server) = running_disk(script, &socket, 4 * IMPATIENCE);
    assert_eq!(guest.pause().len(), 2);
    let reason = loss(&events);
    assert!(
        reason.ends_with("GET_VRING_BASE: the server does not answer within 2s"),
        "{reason}"
    );
    server.join().unwrap();
}
