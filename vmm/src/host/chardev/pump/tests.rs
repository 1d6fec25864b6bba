use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::*;
use crate::config::CharTarget;
use crate::host::chardev::EndpointError;

/// A device with room for four bytes of input.
struct FakeDevice {
    event: EventFd,
    output: Mutex<Vec<u8>>,
    input: Mutex<Vec<u8>>,
}

const INPUT_ROOM: usize = 4;

impl FakeDevice {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            output: Mutex::default(),
            input: Mutex::default(),
        })
    }
    fn print(&self, text: &[u8]) {
        self.output.lock().extend_from_slice(text);
        self.event.write(1).unwrap();
    }
    fn read(&self) -> Vec<u8> {
        let taken = std::mem::take(&mut *self.input.lock());
        self.event.write(1).unwrap();
        taken
    }
}

impl CharDevice for FakeDevice {
    fn event(&self) -> &EventFd {
        &self.event
    }
    fn take_output(&self, buf: &mut [u8]) -> usize {
        let mut output = self.output.lock();
        let count = output.len().min(buf.len());
        buf[..count].copy_from_slice(&output[..count]);
        output.drain(..count);
        count
    }
    fn receive(&self, data: &[u8]) -> usize {
        let mut input = self.input.lock();
        let count = data.len().min(INPUT_ROOM - input.len());
        input.extend_from_slice(&data[..count]);
        count
    }
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("drover-pump-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir.join(name)
}

fn start(device: &Arc<FakeDevice>, target: &CharTarget) -> (CharPump, Option<PathBuf>) {
    let endpoint = Endpoint::open(target).unwrap();
    let path = endpoint.path().map(PathBuf::from);
    let pump = CharPump::start("test", device.clone(), endpoint, || {}).unwrap();
    (pump, path)
}

/// Collects input until it equals `expected`, as a guest that reads now and then.
fn expect_input(device: &FakeDevice, expected: &[u8]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut got = Vec::new();
    while got.len() < expected.len() {
        assert!(
            Instant::now() < deadline,
            "only {:?}",
            String::from_utf8_lossy(&got)
        );
        got.extend(device.read());
        std::thread::yield_now();
    }
    assert_eq!(got, expected);
}

#[test]
fn everything_printed_before_the_end_is_in_the_file() {
    let path = scratch("log");
    let _ = std::fs::remove_file(&path);
    let device = FakeDevice::new();
    let (pump, _) = start(&device, &CharTarget::File(path.clone()));
    let text = b"line\n".repeat(10_000);
    device.print(&text);
    drop(pump);
    assert_eq!(std::fs::read(&path).unwrap(), text);
}

#[test]
fn socket_carries_both_directions_and_takes_the_next_client() {
    let path = scratch("console.sock");
    let device = FakeDevice::new();
    let (pump, _) = start(&device, &CharTarget::Socket(path.clone()));
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = Endpoint::open(&CharTarget::Socket(path.clone()));
    assert!(matches!(again, Err(EndpointError::InUse(_))), "{again:?}");
    for word in [&b"first words"[..], b"second"] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(word).unwrap();
        expect_input(&device, word);
        device.print(b"answer");
        let mut answer = [0; 6];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
    }
    drop(pump);
    assert!(!path.exists());
}

#[test]
fn output_without_a_client_is_dropped_not_held() {
    let path = scratch("lonely.sock");
    let device = FakeDevice::new();
    let (_pump, _) = start(&device, &CharTarget::Socket(path));
    device.print(&vec![b'x'; 1 << 20]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !device.output.lock().is_empty() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

#[test]
fn stale_socket_is_replaced_and_other_files_are_not() {
    let path = scratch("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(Endpoint::open(&CharTarget::Socket(path)).unwrap());
    let file = scratch("precious");
    std::fs::write(&file, b"data").unwrap();
    assert!(Endpoint::open(&CharTarget::Socket(file.clone())).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"data");
}

#[test]
fn pseudo_terminal_carries_both_directions() {
    let device = FakeDevice::new();
    let (_pump, path) = start(&device, &CharTarget::Pty);
    let mut terminal = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path.unwrap())
        .unwrap();
    terminal.write_all(b"typed\r").unwrap();
    expect_input(&device, b"typed\r");
    device.print(b"shown");
    let mut shown = [0; 5];
    terminal.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"shown");
}
