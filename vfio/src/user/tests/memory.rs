//! Servers that reach guest memory by message.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::super::UserFunction;
use super::super::protocol::{
    Command, DmaAccess as Access, Header, MAX_MESSAGE_BYTES, Payload, flags,
};
use super::script::{Fault, Script, VECTORS};
use super::{PATIENCE, limits, map, range};
use crate::backend::{BackendError, IrqKind, RegionIndex, VfioBackend};
use crate::dma::{DmaAccess, Iova};
use crate::testing::shared_page;

type Replies = Vec<(Header, Vec<u8>)>;
type Writes = Vec<(Iova, u64)>;

/// A request of a server's.
fn request(id: u16, command: Command, address: u64, count: u64, data: &[u8]) -> Vec<u8> {
    let payload = Access { address, count }.encode(data);
    Header::request(id, command, payload.len()).encode(&payload)
}

/// The answers to requests that come while the function reads a register.
fn answers(requests: Vec<Vec<u8>>, waits: bool) -> (Replies, Writes) {
    let asks = requests.into_iter().map(|ask| (Command::RegionRead, ask));
    let script = Script {
        asks: asks.collect(),
        waits,
        ..Script::default()
    };
    let (stream, server) = script.start();
    let function = UserFunction::from_stream(stream, "test.sock", limits(PATIENCE)).unwrap();
    let written = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&written);
    function.set_dma_write_hook(Some(Arc::new(move |iova, len| {
        noted.lock().push((iova, len));
    })));
    let (file, _page) = shared_page().unwrap();
    file.write_all_at(b"guest", 0x100).unwrap();
    map(&function, 0x1_0000, 0x1000, DmaAccess::ReadWrite, &file).unwrap();
    map(&function, 0x2_0000, 0x1000, DmaAccess::Read, &file).unwrap();
    let mut data = [0; 4];
    function.read(RegionIndex::Config, 0, &mut data).unwrap();
    assert_eq!(data, [0x5a; 4]);
    // What came before the answer has been handled: a second exchange is behind it.
    function.write(RegionIndex::Config, 0, &data).unwrap();
    assert_eq!(function.lost(), None);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0x200).unwrap();
    drop(function);
    let seen = server.join().unwrap();
    let written = written.lock().clone();
    assert_eq!(byte[0], if written.is_empty() { 0 } else { b'D' });
    (seen.replies, written)
}

#[test]
fn memory_is_read_and_written_while_a_reply_is_awaited() {
    for waits in [true, false] {
        let requests = vec![
            request(7, Command::DmaRead, 0x2_0100, 5, &[]),
            request(7, Command::DmaWrite, 0x1_0200, 2, b"DM"),
            request(9, Command::DmaRead, 0x1_01ff, 4, &[]),
        ];
        let (replies, written) = answers(requests, waits);
        assert_eq!(written, [(Iova(0x1_0200), 2)]);
        let data: Vec<_> = replies.iter().map(|(_, payload)| &payload[16..]).collect();
        assert_eq!(data, [&b"guest"[..], b"", b"\0DM\0"]);
        let ids: Vec<_> = replies.iter().map(|(header, _)| header.id).collect();
        assert_eq!(ids, [7, 7, 9]);
        assert!(
            replies
                .iter()
                .all(|(header, _)| header.flags == flags::REPLY)
        );
    }
}

#[test]
fn requests_outside_of_what_is_mapped_are_refused() {
    let mut other = request(1, Command::DmaRead, 0x1_0000, 1, &[]);
    other[2..4].copy_from_slice(&999_u16.to_ne_bytes());
    let table = [
        (request(1, Command::DmaRead, 0, 1, &[]), libc::EFAULT),
        (request(1, Command::DmaRead, 0x1_0fff, 2, &[]), libc::EFAULT),
        (
            request(1, Command::DmaWrite, u64::MAX, 2, b"DM"),
            libc::EFAULT,
        ),
        (
            request(1, Command::DmaWrite, 0x2_0200, 2, b"DM"),
            libc::EACCES,
        ),
        (request(1, Command::DmaRead, 0x1_0000, 0, &[]), libc::EINVAL),
        (
            request(1, Command::DmaRead, 0x1_0000, u64::MAX, &[]),
            libc::EINVAL,
        ),
        (
            request(1, Command::DmaRead, 0x1_0000, 1, b"x"),
            libc::EINVAL,
        ),
        (
            request(1, Command::DmaWrite, 0x1_0200, 3, b"DM"),
            libc::EINVAL,
        ),
        (
            request(1, Command::DmaWrite, 0x1_0200, 1, b"DM"),
            libc::EINVAL,
        ),
        (
            Header::request(1, Command::DmaRead, 0).encode(&[]),
            libc::EINVAL,
        ),
        (other, libc::EOPNOTSUPP),
        (request(1, Command::RegionRead, 0, 4, &[]), libc::EOPNOTSUPP),
    ];
    let (requests, expected): (Vec<_>, Vec<_>) = table.into_iter().unzip();
    let (replies, written) = answers(requests, true);
    assert_eq!(written, []);
    let errors: Vec<_> = replies
        .iter()
        .map(|(header, _)| header.error as i32)
        .collect();
    assert_eq!(errors, expected);
    for (header, payload) in replies {
        assert_eq!(header.flags, flags::REPLY | flags::ERROR);
        assert!(payload.is_empty());
    }
}

#[test]
fn requests_that_want_no_reply_get_none() {
    let mut write = request(1, Command::DmaWrite, 0x1_0200, 2, b"DM");
    write[8..12].copy_from_slice(&flags::NO_REPLY.to_ne_bytes());
    let (replies, written) = answers(vec![write], false);
    assert_eq!((replies.len(), written.len()), (0, 1));
}

#[test]
fn memory_that_is_taken_away_is_out_of_reach() {
    let script = Script {
        asks: vec![
            (
                Command::RegionWrite,
                request(1, Command::DmaRead, 0x1_0000, 1, &[]),
            ),
            (
                Command::RegionRead,
                request(2, Command::DmaRead, 0x1_0000, 1, &[]),
            ),
        ],
        waits: true,
        ..Script::default()
    };
    let (stream, server) = script.start();
    let function = UserFunction::from_stream(stream, "test.sock", limits(PATIENCE)).unwrap();
    let (file, _page) = shared_page().unwrap();
    map(&function, 0x1_0000, 0x1000, DmaAccess::ReadWrite, &file).unwrap();
    function.write(RegionIndex::Config, 0, &[0]).unwrap();
    function
        .dma()
        .unmap(super::range(0x1_0000, 0x1000))
        .unwrap();
    function.read(RegionIndex::Config, 0, &mut [0]).unwrap();
    drop(function);
    let replies = server.join().unwrap().replies;
    let errors: Vec<_> = replies
        .iter()
        .map(|(header, _)| header.error as i32)
        .collect();
    assert_eq!(errors, [0, libc::EFAULT]);
}

/// What the server can take at a time is never exceeded: it is not even asked.
#[test]
fn limits_of_the_server_are_kept() {
    let json = r#"{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":16,"max_dma_maps":2,"pgsizes":65536}}"#;
    let version = [b"\0\0\x01\0", json.as_bytes(), b"\0"].concat();
    let script = Script::with_fault(Command::Version, Fault::Payload(version));
    let (stream, server) = script.start();
    let function = UserFunction::from_stream(stream, "test.sock", limits(PATIENCE)).unwrap();
    let (file, _page) = shared_page().unwrap();
    file.set_len(0x10_0000).unwrap();
    let map = |iova, len| map(&function, iova, len, DmaAccess::ReadWrite, &file);
    let refusal = |result: Result<(), BackendError>| {
        let Err(BackendError::Refused { source, .. }) = result else {
            panic!("{result:?}");
        };
        source.to_string()
    };
    for (iova, len) in [(0x1_0000, 0x1000), (0x1000, 0x1_0000), (0x1_0000, 0x1_f000)] {
        let expected = "the server's pages have 0x10000 bytes";
        assert_eq!(refusal(map(iova, len)), expected, "{len:#x} at {iova:#x}");
    }
    for iova in [0x1_0000, 0x4_0000] {
        map(iova, 0x2_0000).unwrap();
    }
    let expected = "the server takes no more than 2";
    assert_eq!(refusal(map(0x8_0000, 0x1_0000)), expected);
    function.dma().unmap(range(0x4_0000, 0x2_0000)).unwrap();
    map(0x8_0000, 0x1_0000).unwrap();
    let bar = RegionIndex::Bar(0);
    let mut data = [0; 40];
    function.read(bar, 8, &mut data).unwrap();
    assert_eq!(data, [0x5a; 40]);
    function.write(bar, 8, &data[..33]).unwrap();
    let event = EventFd::new(0).unwrap();
    let events = [&event; VECTORS as usize];
    function.set_irqs(IrqKind::MsiX, &events).unwrap();
    drop(function);
    let requests = server.join().unwrap().requests;
    let count = |command| requests.iter().filter(|asked| **asked == command).count();
    assert_eq!(count(Command::DmaMap), 3);
    assert_eq!(count(Command::RegionRead), 3);
    assert_eq!(count(Command::RegionWrite), 3);
    assert_eq!(count(Command::DeviceSetIrqs), 4);
}

#[test]
fn request_of_an_absurd_length_ends_the_connection() {
    let mut write = Header::request(1, Command::DmaWrite, 16);
    write.size = MAX_MESSAGE_BYTES + 1;
    let script = Script {
        asks: vec![(Command::RegionRead, write.encode(&[]))],
        ..Script::default()
    };
    let (stream, server) = script.start();
    let function = UserFunction::from_stream(stream, "test.sock", limits(PATIENCE)).unwrap();
    let lost = function.read(RegionIndex::Config, 0, &mut [0]).unwrap_err();
    assert!(lost.to_string().contains("a message's size"), "{lost}");
    drop(function);
    server.join().unwrap();
}
