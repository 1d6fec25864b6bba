mod guest;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use devices::DeviceId;
use devices::virtio::VirtioDevice;
use devices::virtio::vsock::testing::{GUEST_CID, GuestDriver, OP_RW, Packet};
use devices::virtio::vsock::{Vsock, VsockOptions};

use super::*;
use guest::Guest;

const DEADLINE: Duration = Duration::from_secs(60);

/// A folder of its own for each test, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("drover-vsock-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn config(&self) -> VsockConfig {
        VsockConfig {
            cid: u32::try_from(GUEST_CID).unwrap(),
            socket: self.0.join("vsock"),
        }
    }

    fn socket(&self) -> PathBuf {
        self.config().socket
    }

    fn port_socket(&self, port: u32) -> PathBuf {
        self.0.join(format!("vsock_{port}"))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running device over real sockets, and a guest with its driver.
fn start(folder: &Folder) -> (Vsock, Guest) {
    let host = UnixVsock::open(&folder.config()).unwrap();
    let id = DeviceId::new("vsock").unwrap();
    let mut vsock = Vsock::new(id, &VsockOptions::new(GUEST_CID), Box::new(host)).unwrap();
    let mut driver = GuestDriver::new();
    let queues = driver.queues();
    driver.activate(&mut vsock, queues);
    driver.offer_receive_buffers();
    (vsock, Guest::new(driver))
}

/// Bytes that tell where they belong.
fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Connects to the guest's `port`, says so, and reads the answer.
fn connect_to_guest(path: &Path, port: u32) -> (BufReader<UnixStream>, String) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    (reader, line)
}

#[test]
fn ten_megabytes_each_way_arrive_unharmed() {
    const LEN: usize = 10 << 20;
    let folder = Folder::new("bulk");
    let listener = UnixListener::bind(folder.port_socket(80)).unwrap();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut sender = stream.try_clone().unwrap();
        let sends = thread::spawn(move || {
            sender.write_all(&pattern(1, LEN)).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        sends.join().unwrap();
        received
    });
    let (mut vsock, mut guest) = start(&folder);
    let key = (1024, 80);
    guest.connect(key);
    guest.socket(key).outgoing = pattern(2, LEN);
    let mut received = Vec::new();
    let mut ended = false;
    guest.pump_until("data", |guest| {
        received.extend(guest.take(key));
        let socket = guest.socket(key);
        if socket.outgoing.is_empty() && !std::mem::replace(&mut ended, socket.outgoing.is_empty())
        {
            guest.shutdown(key, 2);
        }
        received.len() == LEN && ended && guest.socket(key).peer_ended & 2 != 0
    });
    assert!(received == pattern(1, LEN), "data of the host differs");
    guest.shutdown(key, 3);
    let taken = host.join().unwrap();
    assert!(taken == pattern(2, LEN), "data of the guest differs");
    vsock.deactivate();
    assert_eq!(vsock.counters().sent_bytes.get(), LEN as u64);
    assert_eq!(vsock.counters().received_bytes.get(), LEN as u64);
}

#[test]
fn a_hundred_connections_at_once_each_get_their_own_bytes() {
    const EACH_WAY: u32 = 50;
    const LEN: usize = 200 << 10;
    let folder = Folder::new("many");
    // The host's service and the guest's send back what they get.
    let listener = UnixListener::bind(folder.port_socket(7)).unwrap();
    let server = thread::spawn(move || {
        let clients: Vec<_> = (0..EACH_WAY)
            .map(|_| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(DEADLINE)).unwrap();
                thread::spawn(move || {
                    let mut buf = vec![0; 10_000];
                    loop {
                        let len = stream.read(&mut buf).unwrap();
                        if len == 0 {
                            break;
                        }
                        stream.write_all(&buf[..len]).unwrap();
                    }
                })
            })
            .collect();
        clients
            .into_iter()
            .for_each(|client| client.join().unwrap());
    });
    let (mut vsock, mut guest) = start(&folder);
    guest.echoes.push(9000);
    let clients: Vec<_> = (0..EACH_WAY)
        .map(|seed| {
            let path = folder.socket();
            thread::spawn(move || {
                let (mut reader, line) = connect_to_guest(&path, 9000);
                assert!(line.starts_with("OK "), "{line:?}");
                let mut writer = reader.get_ref().try_clone().unwrap();
                let sends = thread::spawn(move || writer.write_all(&pattern(seed, LEN)));
                let mut received = vec![0; LEN];
                reader.read_exact(&mut received).unwrap();
                sends.join().unwrap().unwrap();
                assert!(received == pattern(seed, LEN), "client {seed}");
            })
        })
        .collect();
    let keys: Vec<_> = (0..EACH_WAY).map(|index| (2000 + index, 7)).collect();
    for key in &keys {
        guest.connect(*key);
        guest.socket(*key).outgoing = pattern(key.0, LEN);
    }
    let mut received = vec![Vec::new(); keys.len()];
    guest.pump_until("all connections", |guest| {
        for (key, received) in keys.iter().zip(&mut received) {
            received.extend(guest.take(*key));
        }
        received.iter().all(|received| received.len() == LEN)
            && clients.iter().all(|client| client.is_finished())
    });
    for (key, received) in keys.iter().zip(received) {
        assert!(received == pattern(key.0, LEN), "{key:?}");
        guest.shutdown(*key, 3);
    }
    clients
        .into_iter()
        .for_each(|client| client.join().unwrap());
    server.join().unwrap();
    guest.pump_until("resets", |guest| {
        keys.iter().all(|key| guest.sockets[key].reset)
    });
    // The clients of the host are gone, too.
    guest.pump_until("ends", |_| vsock.counters().closed.get() == 100);
    assert_eq!(vsock.counters().opened.get(), 100);
    vsock.deactivate();
}

#[test]
fn host_that_does_not_read_stops_the_guest_and_nothing_is_lost() {
    const LEN: usize = 2 << 20;
    let folder = Folder::new("slow");
    let listener = UnixListener::bind(folder.port_socket(80)).unwrap();
    let (mut vsock, mut guest) = start(&folder);
    let (slow, quick) = ((1024, 80), (1025, 80));
    guest.connect(slow);
    guest.connect(quick);
    let (mut stream, _) = listener.accept().unwrap();
    let (mut other, _) = listener.accept().unwrap();
    guest.socket(slow).outgoing = pattern(1, LEN);
    // The quick connection gets through while the slow one has no credit left.
    guest.socket(quick).outgoing = pattern(2, LEN);
    let reader = thread::spawn(move || {
        let mut received = vec![0; LEN];
        other.read_exact(&mut received).unwrap();
        received
    });
    guest.pump_until("the quick connection", |_| reader.is_finished());
    assert!(reader.join().unwrap() == pattern(2, LEN));
    let stuck = guest.socket(slow).outgoing.len();
    assert!(stuck > LEN / 2, "{stuck} bytes are left");
    let reader = thread::spawn(move || {
        let mut received = vec![0; LEN];
        stream.read_exact(&mut received).unwrap();
        received
    });
    guest.pump_until("the slow connection", |_| reader.is_finished());
    assert!(reader.join().unwrap() == pattern(1, LEN));
    vsock.deactivate();
}

#[test]
fn ports_without_a_listener_and_with_a_full_backlog_are_refused_at_once() {
    let folder = Folder::new("refused");
    let (_vsock, mut guest) = start(&folder);
    guest.connect((1024, 81));
    guest.pump_until("reset", |guest| guest.socket((1024, 81)).reset);
    // Nobody ever accepts: connections up to the backlog succeed, one more must not wait.
    let _listener = UnixListener::bind(folder.port_socket(82)).unwrap();
    let filler: Vec<_> = std::iter::repeat_with(|| connect(&folder.port_socket(82)))
        .take(100_000)
        .take_while(Result::is_ok)
        .collect();
    assert!(filler.len() < 100_000);
    guest.connect((1025, 82));
    guest.pump_until("reset", |guest| guest.socket((1025, 82)).reset);
}

#[test]
fn guest_that_refuses_closes_the_clients_connection() {
    let folder = Folder::new("rst");
    let (_vsock, mut guest) = start(&folder);
    let path = folder.socket();
    let client = thread::spawn(move || connect_to_guest(&path, 5).1);
    guest.pump_until("refusal", |_| client.is_finished());
    assert_eq!(client.join().unwrap(), "");
}

#[test]
fn socket_is_the_owners_only_and_removed_at_the_end() {
    let folder = Folder::new("mode");
    let host = UnixVsock::open(&folder.config()).unwrap();
    let metadata = std::fs::metadata(folder.socket()).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let error = UnixVsock::open(&folder.config()).unwrap_err();
    assert!(matches!(error, VsockHostError::InUse(_)), "{error}");
    drop(host);
    assert!(!folder.socket().exists());
    // Somebody else's file in its place stays.
    let host = UnixVsock::open(&folder.config()).unwrap();
    std::fs::remove_file(folder.socket()).unwrap();
    std::fs::write(folder.socket(), "mine").unwrap();
    drop(host);
    assert_eq!(std::fs::read(folder.socket()).unwrap(), b"mine");
}

#[test]
fn stale_socket_is_replaced_and_other_files_are_not() {
    let folder = Folder::new("stale");
    drop(UnixListener::bind(folder.socket()).unwrap());
    assert!(folder.socket().exists());
    drop(UnixVsock::open(&folder.config()).unwrap());
    std::fs::write(folder.socket(), "data").unwrap();
    let error = UnixVsock::open(&folder.config()).unwrap_err();
    assert!(error.to_string().contains("vsock"), "{error}");
    assert_eq!(std::fs::read(folder.socket()).unwrap(), b"data");
    let nowhere = VsockConfig {
        socket: folder.0.join("no/such/folder"),
        ..folder.config()
    };
    assert!(UnixVsock::open(&nowhere).is_err());
    let long = VsockConfig {
        socket: folder.0.join("x".repeat(120)),
        ..folder.config()
    };
    assert!(UnixVsock::open(&long).is_err());
}

#[test]
fn pause_and_resume_in_the_middle_of_a_transfer_lose_nothing() {
    const LEN: usize = 4 << 20;
    let folder = Folder::new("pause");
    let listener = UnixListener::bind(folder.port_socket(80)).unwrap();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut received = vec![0; LEN];
        stream.read_exact(&mut received).unwrap();
        stream.write_all(&pattern(4, LEN)).unwrap();
        received
    });
    let (mut vsock, mut guest) = start(&folder);
    let key = (1024, 80);
    guest.connect(key);
    guest.socket(key).outgoing = pattern(3, LEN);
    let mut received = Vec::new();
    for pauses in 1.. {
        let step = 2 * LEN * pauses / 20;
        guest.pump_until("progress", |guest| {
            received.extend(guest.take(key));
            let done = LEN - guest.socket(key).outgoing.len() + received.len();
            done >= step.min(2 * LEN)
        });
        let queues = vsock.deactivate();
        guest.driver.activate(&mut vsock, queues);
        if received.len() == LEN {
            break;
        }
    }
    assert!(host.join().unwrap() == pattern(3, LEN));
    assert!(received == pattern(4, LEN));
    // The guest's own rules were never broken.
    guest.driver.send(&Packet::new(OP_RW, 1, 1));
    guest.driver.wait_sent();
    assert!(!guest.driver.needs_reset());
}
