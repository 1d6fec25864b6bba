//! Drivers and clients that ask for what cannot be.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use drover_guest::gpu::{
    COMMAND_BYTES, Command, Error, FENCE_INTERRUPT, FENCE_WRITE, RING_MAX, control, registers,
    status,
};

use super::driver::{DATA, Driver, MEMORY, MEMORY_BYTES, MIB, RING_SIZE, Stand};

/// Has a command carried out that must stop the device, and sees that a reset helps.
fn refused(driver: &mut Driver, bytes: [u8; COMMAND_BYTES]) -> (Error, u64) {
    driver.enable();
    driver.put(bytes);
    driver.ring_doorbell();
    let outcome = driver.wait_error();
    let stopped = status::ENABLED | status::FAILED;
    assert_eq!(driver.register(registers::STATUS), stopped);
    assert!(!driver.has_interrupt(0), "nothing behind it is done");
    driver.set(registers::CONTROL, control::RESET);
    outcome
}

#[test]
fn addresses_outside_of_video_memory_stop_the_device() {
    let stand = Stand::new();
    let mut driver = Driver::new(&stand);
    let vram = stand.vram_bytes;
    for (offset, len) in [
        (vram, 8),
        (0, vram + 8),
        (vram - 8, 16),
        (u64::MAX - 7, 8),
        (8, u64::MAX - 7),
        (u64::MAX - 7, u64::MAX - 7),
        (4, 8),
        (0, 12),
    ] {
        let address = MEMORY + DATA;
        for command in [
            Command::Fill {
                offset,
                len,
                word: 1,
            },
            Command::CopyIn {
                offset,
                len,
                address,
            },
            Command::CopyOut {
                offset,
                len,
                address,
            },
            Command::Compute {
                offset,
                len,
                seed: 1,
                rounds: u32::MAX,
            },
        ] {
            let outcome = refused(&mut driver, command.encode());
            assert_eq!(outcome, (Error::Vram, offset), "{command:?}");
        }
    }
    driver.enable();
    driver.run(&[Command::Nop]);
}

#[test]
fn guest_memory_that_is_not_mapped_stops_the_device() {
    let stand = Stand::new();
    let mut driver = Driver::new(&stand);
    let end = MEMORY + MEMORY_BYTES;
    // A piece of a file that is shorter: no mapping comes of it.
    let fd = driver.memory.as_raw_fd();
    driver
        .client
        .dma_map(MEMORY_BYTES, 2 * end, 4096, fd)
        .unwrap();
    for address in [
        0,
        MEMORY - 8,
        end - 8,
        end,
        2 * end,
        u64::MAX - 7,
        MEMORY + 4,
    ] {
        let len = 16;
        for command in [
            Command::CopyIn {
                offset: 0,
                len,
                address,
            },
            Command::CopyOut {
                offset: 0,
                len,
                address,
            },
        ] {
            let (error, about) = refused(&mut driver, command.encode());
            assert_eq!((error, about), (Error::Dma, address), "{command:?}");
        }
    }
    for address in [end, u64::MAX, MEMORY + 4] {
        let fence = Command::Fence {
            address,
            value: 1,
            flags: FENCE_WRITE | FENCE_INTERRUPT,
        };
        let outcome = refused(&mut driver, fence.encode());
        assert_eq!(outcome, (Error::Dma, address));
    }
}

#[test]
fn a_device_that_is_no_bus_master_reaches_no_memory() {
    let stand = Stand::new();
    let mut driver = Driver::new(&stand);
    driver.set_bus_master(false);
    let (error, about) = refused(&mut driver, Command::Nop.encode());
    assert_eq!((error, about), (Error::Dma, MEMORY));
}

#[test]
fn memory_is_gone_once_it_is_unmapped() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    driver.run(&[Command::Nop]);
    driver.put(Command::Nop.encode());
    driver.client.dma_unmap(MEMORY, MEMORY_BYTES).unwrap();
    driver.ring_doorbell();
    assert_eq!(driver.wait_error().0, Error::Dma);
}

#[test]
fn what_is_no_command_stops_the_device() {
    let stand = Stand::new();
    let mut driver = Driver::new(&stand);
    let outcome = refused(&mut driver, [0xff; COMMAND_BYTES]);
    assert_eq!(outcome, (Error::Command, 0));
    let mut odd = Command::Nop.encode();
    odd[31] = 1;
    assert_eq!(refused(&mut driver, odd).0, Error::Command);
}

#[test]
fn rings_that_are_none_stop_the_device() {
    let stand = Stand::new();
    let mut driver = Driver::new(&stand);
    for (base, size) in [
        (MEMORY, 0),
        (MEMORY, 1),
        (MEMORY, 3),
        (MEMORY, RING_MAX * 2),
        (MEMORY, u32::MAX),
        (MEMORY, 1 << 31),
        (MEMORY + 8, 8),
        (u64::MAX - 4095, RING_MAX),
    ] {
        driver.enable_with(base, size);
        assert_eq!(driver.wait_error(), (Error::Ring, base), "{size}");
        // Neither a doorbell nor switching it off and on brings it back.
        driver.set(registers::RING_TAIL, 1);
        driver.set(registers::CONTROL, 0);
        driver.set(registers::CONTROL, control::ENABLE);
        assert_ne!(driver.register(registers::STATUS) & status::FAILED, 0);
        driver.set(registers::CONTROL, control::RESET);
    }
    // One where there is no memory fails when it is used.
    driver.enable_with(u64::MAX - 0xffff, 8);
    driver.set(registers::RING_TAIL, 1);
    assert_eq!(driver.wait_error().0, Error::Dma);
    driver.set(registers::CONTROL, control::RESET);
    for tail in [RING_SIZE, u32::MAX] {
        driver.enable();
        driver.set(registers::RING_TAIL, tail);
        assert_eq!(driver.wait_error(), (Error::Ring, tail.into()));
        driver.set(registers::CONTROL, control::RESET);
    }
}

#[test]
fn odd_accesses_change_nothing() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    let client = &mut driver.client;
    for (offset, data) in [
        (registers::CONTROL, &[2][..]),
        (registers::CONTROL + 1, &[2; 4][..]),
        (registers::CONTROL - 2, &[2; 6][..]),
        (registers::ID, &[0; 8][..]),
        (4092, &[2; 4][..]),
    ] {
        client.region_write(0, offset, data).unwrap();
    }
    let mut odd = [0; 3];
    client.region_read(0, 1, &mut odd).unwrap();
    assert_eq!(&odd, b"GPU");
    driver.run(&[Command::Nop]);
}

#[test]
fn an_interrupt_that_nobody_reads_holds_nothing_up() {
    let stand = Stand::new();
    let mut driver = Driver::enabled(&stand);
    // An event's counter at its end would block a writer for ever.
    let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    driver
        .client
        .set_irqs(super::MSIX, 1 << 2 | 1 << 5, 0, 1, &[full.as_raw_fd()])
        .unwrap();
    driver.submit(&[]);
    driver.wait_register(registers::FENCE, |fence| fence == 1);
    assert_eq!(driver.register(registers::STATUS), status::ENABLED);
}

/// A client that sends what it likes.
struct Raw {
    socket: UnixStream,
}

impl Raw {
    fn connect(stand: &Stand) -> Self {
        let socket = UnixStream::connect(stand.server.path()).unwrap();
        let limit = Some(Duration::from_secs(20));
        socket.set_read_timeout(limit).unwrap();
        Self { socket }
    }

    /// One that has exchanged versions.
    fn new(stand: &Stand) -> Self {
        let mut raw = Self::connect(stand);
        assert!(raw.ask(1, b"\0\0\x01\0{}\0").is_ok());
        raw
    }

    fn send(&mut self, command: u16, len: u32, flags: u32, body: &[u8]) {
        let mut bytes = 7_u16.to_le_bytes().to_vec();
        bytes.extend(command.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        self.socket.write_all(&bytes).unwrap();
    }

    fn reply(&mut self) -> Result<Vec<u8>, u32> {
        let mut header = [0; 16];
        self.socket.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(header[..2], [7, 0]);
        let mut body = vec![0; word(4) as usize - 16];
        self.socket.read_exact(&mut body).unwrap();
        match word(8) {
            1 => Ok(body),
            0x21 => Err(word(12)),
            flags => panic!("flags {flags:#x}"),
        }
    }

    fn ask(&mut self, command: u16, body: &[u8]) -> Result<Vec<u8>, u32> {
        let len = u32::try_from(body.len()).unwrap() + 16;
        self.send(command, len, 0, body);
        self.reply()
    }

    /// Whether the next that comes is the end, as it must within the limit of [`Raw::connect`].
    fn is_hung_up(&mut self) -> bool {
        match self.socket.read(&mut [0; 16]) {
            Ok(len) => len == 0,
            // What was left unread may become a reset instead of an end.
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

const EINVAL: u32 = 22;
const ENOENT: u32 = 2;
const ENOTTY: u32 = 25;
const EEXIST: u32 = 17;
const EOPNOTSUPP: u32 = 95;
const EOVERFLOW: u32 = 75;
const ENOSPC: u32 = 28;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn access(offset: u64, region: u32, count: u32) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend(words(&[region, count]));
    body
}

#[test]
fn nothing_is_answered_before_versions_are_exchanged() {
    let stand = Stand::new();
    let mut raw = Raw::connect(&stand);
    assert_eq!(raw.ask(4, &words(&[16, 0, 0, 0])), Err(EINVAL));
    for hello in [
        &b""[..],
        b"\0",
        b"\x01\0\0\0{}\0",
        b"\0\0\0\0{\0",
        b"\0\0\0\0\xff\xff",
    ] {
        assert_eq!(raw.ask(1, hello), Err(EINVAL), "{hello:?}");
    }
    let answer = raw.ask(1, b"\0\0\0\0").unwrap();
    let text = answer[4..].strip_suffix(&[0]).unwrap();
    let told: serde_json::Value = serde_json::from_slice(text).unwrap();
    assert_eq!(told["capabilities"]["max_data_xfer_size"], 1 << 20);
    assert!(raw.ask(4, &words(&[16, 0, 0, 0])).is_ok());
}

#[test]
fn messages_that_cannot_be_are_refused_and_the_next_is_heard() {
    let stand = Stand::new();
    let mut raw = Raw::new(&stand);
    for command in [0, 6, 11, 12, 14, 15, 19, u16::MAX] {
        assert_eq!(raw.ask(command, &[0; 32]), Err(EOPNOTSUPP), "{command}");
    }
    // Bodies that are too short, of every command.
    for command in [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 18] {
        assert_eq!(raw.ask(command, &[]), Err(EINVAL), "{command}");
    }
    for region in [6, 8, 9, u32::MAX] {
        assert_eq!(raw.ask(9, &access(0, region, 4)), Err(EINVAL), "{region}");
    }
    for (offset, count) in [(4096, 1), (4093, 4), (u64::MAX, 4), (0, 8192)] {
        assert_eq!(raw.ask(9, &access(offset, 0, count)), Err(EINVAL));
    }
    // More than may be transferred at once, of a region that has it; less than was said.
    assert_eq!(raw.ask(9, &access(0, 4, u32::MAX)), Err(EINVAL));
    assert_eq!(raw.ask(9, &access(0, 4, 2 << 20)), Err(EINVAL));
    let mut short = access(0, 4, 5);
    short.extend([1; 4]);
    assert_eq!(raw.ask(10, &short), Err(EINVAL));
    assert_eq!(raw.ask(5, &words(&[32, 0, 9, 0, 0, 0, 0, 0])), Err(EINVAL));
    assert_eq!(raw.ask(7, &words(&[16, 0, 5, 0])), Err(EINVAL));
    migration_that_cannot_be_is_refused(&mut raw);
    let answer = raw.ask(9, &access(0, 0, 4)).unwrap();
    assert_eq!(&answer[16..], b"DGPU");
}

fn migration_that_cannot_be_is_refused(raw: &mut Raw) {
    const GET: u32 = 1 << 16;
    const SET: u32 = 1 << 17;
    // Features that there are not, or that are not set, or neither.
    for (flags, errno) in [
        (GET, ENOTTY),
        (GET | 5, ENOTTY),
        (GET | 6, EINVAL),
        (SET | 7, EINVAL),
        (SET | 8, EINVAL),
        (GET | 8, EINVAL),
        (SET | 1, EINVAL),
        (GET | SET | 1, EINVAL),
        (1, EINVAL),
    ] {
        assert_eq!(
            raw.ask(16, &words(&[16, flags, 0, 0])),
            Err(errno),
            "{flags:#x}"
        );
    }
    // States that it has not, and data where there is none.
    for state in [0, 5, 6, 7, 8, u32::MAX] {
        let set = words(&[16, SET | 2, state, 0]);
        assert_eq!(raw.ask(16, &set), Err(EINVAL), "{state}");
    }
    assert_eq!(raw.ask(17, &words(&[16, 8])), Err(EINVAL));
    assert_eq!(raw.ask(18, &words(&[8, 4, 0])), Err(EINVAL));
    assert!(raw.ask(16, &words(&[16, SET | 2, 4, 0])).is_ok());
    assert_eq!(
        raw.ask(18, &words(&[8, 5, 0])),
        Err(EINVAL),
        "fewer bytes than said"
    );
    assert!(raw.ask(13, &[]).is_ok(), "a reset");
}

#[test]
fn interrupts_that_there_are_not_are_refused() {
    let stand = Stand::new();
    let mut raw = Raw::new(&stand);
    let trigger = 1 << 5;
    for (flags, index, start, count) in [
        (1 | trigger, 2, 0, 5),
        (1 | trigger, 2, 4, 1),
        (1 | trigger, 2, u32::MAX, 2),
        (1 | trigger, 0, 0, 1),
        (1 | trigger, 9, 0, 1),
        (1 | 1 << 3, 2, 0, 1),
        (3 | trigger, 2, 0, 1),
    ] {
        let body = words(&[20, flags, index, start, count]);
        assert_eq!(raw.ask(8, &body), Err(EINVAL), "{flags:#x} {start} {count}");
    }
}

#[test]
fn mappings_that_cannot_be_are_refused() {
    let stand = Stand::new();
    let mut raw = Raw::new(&stand);
    let map = |flags: u32, offset: u64, address: u64, len: u64| {
        let mut body = words(&[32, flags]);
        for value in [offset, address, len] {
            body.extend(value.to_le_bytes());
        }
        body
    };
    for (body, error) in [
        (map(3, 0, 0, 0), EINVAL),
        (map(3, 0, 1, 4096), EINVAL),
        (map(3, 1, 0, 4096), EINVAL),
        (map(3, 0, 0, 4095), EINVAL),
        (map(4, 0, 0, 4096), EINVAL),
        (map(3, 0, u64::MAX - 4095, 8192), EOVERFLOW),
        (map(3, u64::MAX - 4095, 0, 8192), EOVERFLOW),
    ] {
        assert_eq!(raw.ask(2, &body), Err(error), "{body:?}");
    }
    assert!(raw.ask(2, &map(3, 0, MIB, MIB)).is_ok());
    for (address, len) in [(MIB, 4096), (0, MIB + 4096), (2 * MIB - 4096, MIB)] {
        assert_eq!(raw.ask(2, &map(3, 0, address, len)), Err(EEXIST));
    }
    let unmap = |flags: u32, address: u64, len: u64| {
        let mut body = words(&[24, flags]);
        body.extend(address.to_le_bytes());
        body.extend(len.to_le_bytes());
        body
    };
    assert_eq!(raw.ask(3, &unmap(0, 0, MIB)), Err(ENOENT));
    assert_eq!(raw.ask(3, &unmap(0, MIB, 4096)), Err(EINVAL));
    assert_eq!(raw.ask(3, &unmap(0, u64::MAX, 2)), Err(EOVERFLOW));
    assert_eq!(raw.ask(3, &unmap(1, MIB, MIB)), Err(EINVAL));
    assert!(raw.ask(3, &unmap(0, MIB, MIB)).is_ok());
    // Not without end.
    let mut mapped = 0;
    let full = loop {
        match raw.ask(2, &map(1, 0, mapped * 4096, 4096)) {
            Ok(_) => mapped += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((full, mapped), (ENOSPC, 256));
    assert!(raw.ask(3, &unmap(1 << 1, 0, 0)).is_ok());
    assert!(raw.ask(2, &map(1, 0, 0, 4096)).is_ok());
}

#[test]
fn a_stream_without_sense_is_closed_and_the_next_client_served() {
    let stand = Stand::new();
    // Too long, too short, a reply, and one that ends in the middle.
    for (len, flags) in [(u32::MAX, 0), (2 << 20, 0), (15, 0), (0, 0), (16, 1)] {
        let mut raw = Raw::new(&stand);
        raw.send(4, len, flags, &[]);
        assert!(raw.is_hung_up(), "{len} {flags}");
    }
    let mut raw = Raw::new(&stand);
    raw.send(4, 32, 0, &[1; 8]);
    drop(raw);
    Driver::enabled(&stand).run(&[Command::Nop]);
}

#[test]
fn who_wants_no_reply_gets_none() {
    let stand = Stand::new();
    let mut raw = Raw::new(&stand);
    let mut write = access(0x1000, 4, 4);
    write.extend(b"data");
    let len = u32::try_from(write.len()).unwrap() + 16;
    raw.send(10, len, 1 << 4, &write);
    // An error neither.
    raw.send(10, 32, 1 << 4, &access(0, 0, 9));
    let answer = raw.ask(9, &access(0x1000, 4, 4)).unwrap();
    assert_eq!(&answer[16..], b"data");
}
