//! Guest memory through real sockets.

use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use migration::PageIndex;
use vm_memory::Bytes;

use super::super::{Layout, RamOptions, allocate};
use super::*;

const HEAD: &[u8] = b"a frame's header and table";
/// On both sides of the hole below 4 GiB.
const HIGH_PAGE: u64 = 4 << 18;

fn ram() -> GuestRam {
    let layout = Layout::new(4 << 30, 4096, 40).unwrap();
    allocate(&layout, &RamOptions::default()).unwrap()
}

fn run(start: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex(start), count).unwrap()
}

fn runs() -> Vec<PageRun> {
    vec![run(0, 1), run(7, 61), run(HIGH_PAGE + 3, 2)]
}

fn fill(ram: &GuestRam) -> Vec<u8> {
    let mut all = Vec::new();
    for run in runs() {
        for page in run.start.0..run.end().0 {
            let bytes = [(page % 251) as u8 + 1; 4096];
            ram.write_slice(&bytes, GuestAddress(page << 12)).unwrap();
            all.extend_from_slice(&bytes);
        }
    }
    all
}

#[test]
fn pages_go_from_memory_to_memory_behind_their_head() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let unix = UnixStream::pair().unwrap();
    let pairs = [
        (tcp.as_fd(), accepted.as_fd()),
        (unix.0.as_fd(), unix.1.as_fd()),
    ];
    for (ours, theirs) in pairs {
        let (source, destination) = (ram(), ram());
        destination
            .iter()
            .for_each(|region| region.get_mmap().bitmap().enable());
        let sent = fill(&source);
        std::thread::scope(|scope| {
            // More than the socket holds, so in several pieces.
            scope.spawn(|| send_pages(&source, HEAD, &runs(), ours).unwrap());
            let mut head = [0; HEAD.len()];
            let mut file = std::fs::File::from(theirs.try_clone_to_owned().unwrap());
            file.read_exact(&mut head).unwrap();
            assert_eq!(head, HEAD);
            receive_pages(&destination, &runs(), theirs).unwrap();
        });
        let mut found = Vec::new();
        for run in runs() {
            let mut pages = vec![0; usize::try_from(run.bytes()).unwrap()];
            let start = GuestAddress(run.start.0 << 12);
            destination.read_slice(&mut pages, start).unwrap();
            found.append(&mut pages);
        }
        assert!(found == sent);
        let marked = |page: u64| {
            let region = destination.find_region(GuestAddress(page << 12)).unwrap();
            let mut words = [0; 2];
            region.get_mmap().bitmap().harvest(&mut words);
            words
        };
        assert_eq!(marked(0), [!0x7e, 0xf]);
        assert_eq!(marked(HIGH_PAGE), [0x18, 0]);
    }
}

#[test]
fn pages_that_are_not_memory_move_nothing() {
    let ram = ram();
    let (ours, theirs) = UnixStream::pair().unwrap();
    // The hole, into the hole, past the end, past everything.
    for start in [3 << 18, (3 << 18) - 1, 5 << 18, 1 << 40] {
        let runs = [run(0, 1), run(start, 2)];
        let refused = send_pages(&ram, HEAD, &runs, ours.as_fd()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{start:#x}");
        let refused = receive_pages(&ram, &runs, ours.as_fd()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{start:#x}");
    }
    theirs.set_nonblocking(true).unwrap();
    let nothing = (&theirs).read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_peer_that_ends_or_falls_silent_is_an_error() {
    let ram = ram();
    let pages = [run(0, 64)];
    let (ours, theirs) = UnixStream::pair().unwrap();
    for socket in [&ours, &theirs] {
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        socket
            .set_write_timeout(Some(Duration::from_millis(20)))
            .unwrap();
    }
    let silent = receive_pages(&ram, &pages, ours.as_fd()).unwrap_err();
    assert_eq!(silent.kind(), ErrorKind::TimedOut);
    let full = loop {
        match send_pages(&ram, HEAD, &pages, ours.as_fd()) {
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), ErrorKind::TimedOut);
    drop(theirs);
    let gone = send_pages(&ram, HEAD, &pages, ours.as_fd()).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::BrokenPipe);
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_pages(&ram, HEAD, &[run(0, 1)], theirs.as_fd()).unwrap();
    drop(theirs);
    let cut = receive_pages(&ram, &pages, ours.as_fd()).unwrap_err();
    assert_eq!(cut.kind(), ErrorKind::UnexpectedEof);
}
