//! Data connections that are sockets: pages go from memory to memory.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migration::PageIndex;
use migration::destination::{DestinationError, DestinationOptions, Received, receive};
use migration::handoff::Outcome;
use migration::ports::{Accept, Breaker, Channel, Dial};
use migration::source::{EncodingChoice, Parts, SourceReport, migrate};
use migration::testing::machine::Guest;
use migration::testing::pair;
use migration::wire::Versions;

use crate::good::beside_a_guest;
use crate::world::{PATIENCE, World, new_handle, run};

struct Socket(UnixStream);

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Channel for Socket {
    fn set_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        self.0.set_read_timeout(Some(timeout))
    }

    fn breaker(&self) -> Arc<dyn Breaker> {
        Arc::new(SocketBreaker(self.0.try_clone().expect("a descriptor")))
    }

    fn is_congested(&self) -> bool {
        false
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

struct SocketBreaker(UnixStream);

impl Breaker for SocketBreaker {
    fn break_off(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Breaks off all connections of a migration.
type Breakers = Arc<Mutex<Vec<Arc<dyn Breaker>>>>;

struct Dialer {
    door: Sender<UnixStream>,
    breakers: Breakers,
}

impl Dial for Dialer {
    fn dial(&mut self, _: Option<&str>, _: &dyn Fn() -> bool) -> io::Result<Box<dyn Channel>> {
        let (ours, theirs) = UnixStream::pair()?;
        let sent = self.door.send(theirs);
        sent.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        let ours = Socket(ours);
        self.breakers.lock().expect("no panic").push(ours.breaker());
        Ok(Box::new(ours))
    }
}

struct Door(Receiver<UnixStream>);

impl Accept for Door {
    fn url(&self) -> Option<String> {
        None
    }

    fn accept(&mut self, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        let socket = self.0.recv_timeout(timeout);
        let socket = Socket(socket.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?);
        Ok(Box::new(socket))
    }
}

/// Moves the machine to a destination that speaks `versions`. All data connections break when the
/// source has read so many batches, each time.
fn move_over_sockets(
    world: &mut World,
    versions: Versions,
    break_at: &[u64],
) -> (SourceReport, Result<Received, DestinationError>) {
    let (ours, theirs) = pair(Default::default(), Default::default());
    let (dial, arriving) = channel();
    let mut door = Door(arriving);
    let breakers = Breakers::default();
    let mut dial = Dialer {
        door: dial,
        breakers: Arc::clone(&breakers),
    };
    let options = DestinationOptions {
        versions,
        token: b"a token".to_vec(),
        patience: PATIENCE,
        max_streams: 8,
        linger: PATIENCE,
    };
    let guest = world.guest();
    let (mut batches, break_at) = (0, break_at.to_vec());
    guest.memory.after_read(move |_| {
        batches += 1;
        if break_at.contains(&batches) {
            let breakers = breakers.lock().expect("no panic");
            breakers.iter().for_each(|breaker| breaker.break_off());
        }
    });
    let cancelled = Arc::clone(&world.destination_cancelled);
    let mut parts = Parts {
        machine: &mut world.machine,
        pages: &*guest.memory,
        tracker: &*guest.tracker,
    };
    let host = &mut world.host;
    std::thread::scope(|scope| {
        let destination =
            scope.spawn(|| receive(Box::new(theirs), &mut door, host, &options, &cancelled));
        let report = migrate(
            &mut parts,
            Box::new(ours),
            &mut dial,
            &world.options,
            &world.handle,
        );
        (report, destination.join().expect("no panic"))
    })
}

fn noise(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for byte in bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = state.to_be_bytes()[0];
    }
}

#[test]
fn pages_arrive_intact_beside_a_guest_that_writes() {
    let touched: Vec<u64> = (0..3000)
        .chain(10_000..12_000)
        .filter(|page| page % 3 != 0)
        .collect();
    for encoding in [
        EncodingChoice::Raw,
        EncodingChoice::Auto,
        EncodingChoice::Delta,
    ] {
        let mut world = World::new(&[run(0, 3000), run(10_000, 2000)], true);
        world.options.encoding = encoding;
        let guest = world.guest();
        for page in touched.iter().filter(|page| *page % 7 != 0) {
            guest.write(PageIndex(*page), |bytes| noise(bytes, *page));
        }
        let (report, _received) =
            beside_a_guest(&guest, &touched, Duration::from_micros(20), || {
                move_over_sockets(&mut world, Versions::OURS, &[])
            });
        assert_eq!(report.outcome, Outcome::Surrendered, "{:?}", report.error);
        world.check_arrived("over sockets");
        assert!(report.pages.raw > 0, "{:?}", report.pages);
        let live = guest.memory.live_batches();
        if encoding == EncodingChoice::Raw {
            assert_eq!(report.pages.lz4 + report.pages.delta, 0);
            assert!(live > 0, "no page was sent in place");
        }
        if encoding == EncodingChoice::Delta {
            assert_eq!(live, 0, "a delta needs a copy of what went before");
        }
    }
}

/// 313 batches of up to 64 pages, by two streams.
fn world_of_20_000_pages() -> (World, Vec<u64>) {
    let mut world = World::new(&[run(0, 20_000)], true);
    world.options.encoding = EncodingChoice::Raw;
    let guest = world.guest();
    let touched: Vec<_> = (0..20_000).collect();
    for page in &touched {
        guest.write(PageIndex(*page), |bytes| noise(bytes, *page));
    }
    (world, touched)
}

#[test]
fn sockets_that_break_are_opened_again() {
    // Early enough that neither has done its part of a round: it would not notice before the last.
    for break_at in [&[1][..], &[2], &[30], &[90], &[20, 90]] {
        let (mut world, touched) = world_of_20_000_pages();
        let guest = world.guest();
        let (report, _received) =
            beside_a_guest(&guest, &touched, Duration::from_micros(100), || {
                move_over_sockets(&mut world, Versions::OURS, break_at)
            });
        let what = format!("batch {break_at:?}: {:?}", report.error);
        assert_eq!(report.outcome, Outcome::Surrendered, "{what}");
        assert!(guest.memory.live_batches() > 313, "{what}");
        world.check_arrived(&what);
        // What is sent once more is no reason to slow the guest down.
        let mut speeds = world.machine.throttled.iter();
        assert!(speeds.all(|percent| *percent == 100), "{what}");
    }
}

/// After each round the guest writes so many pages, the last number first.
fn write_before_harvests(guest: Guest, mut counts: Vec<u64>) {
    let tracker = Arc::clone(&guest.tracker);
    tracker.before_harvest(move || {
        if let Some(count) = counts.pop() {
            for page in 0..count {
                guest.write(PageIndex(page), |bytes| bytes[7] ^= 1);
            }
            write_before_harvests(guest, counts);
        }
    });
}

/// The guest writes less each time, and too much for a switchover, when the connection breaks in the
/// third round: it is not its fault that all pages go once more.
#[test]
fn a_late_break_does_not_slow_the_guest_down() {
    let (mut world, _) = world_of_20_000_pages();
    world.options.streams = 1;
    world.handle = new_handle(Duration::from_millis(2));
    write_before_harvests(world.guest(), vec![700, 1500, 3000]);
    // 313 and 47 batches before it.
    let (report, _received) = move_over_sockets(&mut world, Versions::OURS, &[370]);
    let what = format!("{:?}", report.error);
    assert_eq!(report.outcome, Outcome::Surrendered, "{what}");
    world.check_arrived(&what);
    let rounds: Vec<_> = report
        .rounds
        .iter()
        .map(|round| round.dirty_pages)
        .collect();
    // On a busy machine there may be rounds with nothing left to do.
    let (written, idle) = rounds.split_at(3);
    assert_eq!(written, [3000, 1500, 700]);
    assert!(idle.iter().all(|dirty| *dirty == 0), "{idle:?}");
    let throttled = &world.machine.throttled;
    assert!(
        throttled.iter().all(|percent| *percent == 100),
        "{throttled:?}"
    );
}

#[test]
fn sockets_that_break_again_and_again_leave_the_source_running() {
    let (mut world, _) = world_of_20_000_pages();
    let guest = world.guest();
    let break_at: Vec<_> = (1..10_000).step_by(20).collect();
    let (report, _received) = move_over_sockets(&mut world, Versions::OURS, &break_at);
    let what = format!("{:?}", report.error);
    assert!(matches!(report.outcome, Outcome::Resumed(_)), "{what}");
    assert!(!guest.tracker.is_logging(), "{what}");
    world.retry(&what);
}
