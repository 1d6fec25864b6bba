//! Guest memory over sockets with buffers that hold next to nothing.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use devices::GuestRam;
use socket2::SockRef;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::pattern;
use crate::host::link::{receive_range, send_ranges};

const REGION: usize = 1 << 20;

/// Two adjacent regions, and one beyond a gap.
fn memory() -> GuestRam {
    let at = |mib: u64| (GuestAddress(mib << 20), REGION);
    GuestRam::from_ranges(&[at(0), at(1), at(3)]).unwrap()
}

fn filled() -> GuestRam {
    let memory = memory();
    memory
        .write_slice(&pattern(2 * REGION), GuestAddress(0))
        .unwrap();
    memory
        .write_slice(&pattern(REGION), GuestAddress(3 << 20))
        .unwrap();
    memory
}

fn bytes(memory: &GuestRam, (address, len): (GuestAddress, usize)) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, address).unwrap();
    bytes
}

/// The kernel rounds the size up to its least.
fn narrow_pair() -> (UnixStream, UnixStream) {
    let (one, two) = UnixStream::pair().unwrap();
    SockRef::from(&one).set_send_buffer_size(1).unwrap();
    (one, two)
}

#[test]
fn ranges_of_odd_sizes_arrive_behind_their_head() {
    let memory = filled();
    let odd = [1, 4095, 4097, 3, 65_537, 100_001, 7];
    let mut ranges: Vec<_> = odd.map(|len| (GuestAddress(len as u64 * 3), len)).into();
    // Over the border of two regions, to the end of the last, and nothing.
    ranges.push((GuestAddress((1 << 20) - 77), 1234));
    ranges.push((GuestAddress((4 << 20) - 99), 99));
    ranges.push((GuestAddress(5), 0));
    // More than one system call takes.
    ranges.extend((0..3000).map(|at| (GuestAddress(at * 11), 13)));
    for head in [&b"head"[..], b""] {
        let (one, mut two) = narrow_pair();
        let mut expected = head.to_vec();
        ranges
            .iter()
            .for_each(|range| expected.extend(bytes(&memory, *range)));
        thread::scope(|scope| {
            scope.spawn(|| {
                let one = one;
                send_ranges(one.as_fd(), head, &ranges, &memory).unwrap();
            });
            let mut received = Vec::new();
            two.read_to_end(&mut received).unwrap();
            assert!(received == expected);
        });
    }
}

#[test]
fn received_range_is_written_and_logged_and_nothing_else() {
    let source = filled();
    let target = memory();
    target
        .iter()
        .for_each(|region| region.get_mmap().bitmap().enable());
    let range = (GuestAddress((1 << 20) - 5000), 12_345);
    let (one, two) = narrow_pair();
    thread::scope(|scope| {
        scope.spawn(|| send_ranges(one.as_fd(), b"", &[range], &source).unwrap());
        receive_range(two.as_fd(), range.0, range.1, &target).unwrap();
    });
    let mut expected = vec![0; 2 * REGION];
    let start = (1 << 20) - 5000;
    expected[start..start + range.1].copy_from_slice(&bytes(&source, range));
    assert!(bytes(&target, (GuestAddress(0), 2 * REGION)) == expected);
    let logs = target.iter().map(|region| {
        let mut words = [0; 4];
        region.get_mmap().bitmap().harvest(&mut words);
        words
    });
    // The last two pages of the first region, the first two of the second.
    assert_eq!(
        logs.collect::<Vec<_>>(),
        [[0, 0, 0, 3 << 62], [3, 0, 0, 0], [0; 4]]
    );
}

#[test]
fn what_is_not_guest_memory_is_neither_sent_nor_received() {
    let memory = filled();
    let (one, mut two) = UnixStream::pair().unwrap();
    for (address, len) in [
        (GuestAddress(2 << 20), 1),
        (GuestAddress((2 << 20) - 1), 2),
        (GuestAddress(4 << 20), 1),
        (GuestAddress(u64::MAX), 2),
        (GuestAddress(0), usize::MAX),
    ] {
        let ranges = [(GuestAddress(0), 4096), (address, len)];
        let error = send_ranges(one.as_fd(), b"head", &ranges, &memory).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{address:?}");
        assert!(error.to_string().contains("not guest memory"), "{error}");
        let error = receive_range(one.as_fd(), address, len, &memory).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{address:?}");
    }
    drop(one);
    assert_eq!(two.read(&mut [0]).unwrap(), 0, "nothing was sent");
}

#[test]
fn peer_that_stops_is_a_time_out_and_one_that_ends_an_end() {
    let memory = filled();
    let (one, mut two) = narrow_pair();
    let limit = Some(Duration::from_millis(50));
    one.set_write_timeout(limit).unwrap();
    one.set_read_timeout(limit).unwrap();
    let ranges = [(GuestAddress(0), REGION)];
    let error = send_ranges(one.as_fd(), b"", &ranges, &memory).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    two.write_all(b"some").unwrap();
    let error = receive_range(one.as_fd(), GuestAddress(0), 5, &memory).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    two.write_all(b"more").unwrap();
    drop(two);
    // What was never read does not come first.
    let error = receive_range(one.as_fd(), GuestAddress(0), 5, &memory).unwrap_err();
    use io::ErrorKind::{ConnectionReset, UnexpectedEof};
    assert!(
        matches!(error.kind(), UnexpectedEof | ConnectionReset),
        "{error}"
    );
    let error = send_ranges(one.as_fd(), b"", &ranges, &memory).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}
