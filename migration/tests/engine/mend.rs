//! Data connections that break while the guest runs are opened again, and nothing is lost.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use migration::PageIndex;
use migration::destination::{DestinationError, DestinationOptions, receive};
use migration::handoff::{Cause, Outcome};
use migration::ports::{Channel, Dial};
use migration::source::{EncodingChoice, OnTimeout};
use migration::testing::{FakeChannel, Fault, FaultKind, Wire, network, pair};
use migration::wire::message::{Attach, Hello, MAGIC, Offer, Reasons, Round};
use migration::wire::{FrameReader, Message, Versions};

use crate::good::{beside_a_guest, write_at_every_harvest};
use crate::postcopy;
use crate::world::{End, PATIENCE, Wiring, World, assert_holes, fill, new_handle, run};

/// Connections opened at first; a wiring has wires for as many again.
const STREAMS: usize = 2;

/// Wires of which some are to break, and how many have.
struct Broken {
    wiring: Wiring,
    came: Arc<AtomicU32>,
    expected: u32,
}

impl Broken {
    /// The first connection breaks at this byte of this frame.
    fn new(frame: u32, offset: usize, kind: FaultKind) -> Self {
        let mut broken = Self {
            wiring: Wiring::clean(),
            came: Arc::default(),
            expected: 0,
        };
        broken.also(0, (frame, offset), kind);
        broken
    }

    /// So does another.
    fn also(&mut self, connection: usize, (frame, offset): (u32, usize), kind: FaultKind) {
        let came = Arc::clone(&self.came);
        self.expected += 1;
        self.wiring.data[connection].0 = Wire {
            fault: Some(Fault {
                frame,
                offset,
                kind,
            }),
            on_fault: Some(Arc::new(move || {
                came.fetch_add(1, Ordering::SeqCst);
            })),
            capacity: 20_000,
            ..Wire::default()
        };
    }

    /// Moves the machine; all faults come.
    fn migrate(&self, world: &mut World, what: &str) -> End {
        let end = world.migrate(&self.wiring);
        assert_eq!(self.came.load(Ordering::SeqCst), self.expected, "{what}");
        world.check(&end, what);
        end
    }

    /// Moves the machine, which arrives.
    fn survive(&self, world: &mut World, what: &str) -> End {
        let end = self.migrate(world, what);
        let error = &end.report.error;
        assert_eq!(
            end.report.outcome,
            Outcome::Surrendered,
            "{what}: {error:?}"
        );
        end
    }

    /// The same beside a guest that writes; holes stay holes.
    fn survive_beside_a_guest(&self, world: &mut World, what: &str) {
        let guest = world.guest();
        beside_a_guest(&guest, &pages(), Duration::from_micros(50), || {
            self.survive(world, what)
        });
        assert_holes(world, |page| page.0 % 5 != 0);
    }
}

/// Some pages of each chunk; what is a multiple of 5 stays a hole.
fn pages() -> Vec<u64> {
    let all = (0..3000).chain(8000..8100);
    all.filter(|page| page % 5 != 0).collect()
}

fn world(encoding: EncodingChoice) -> World {
    let mut world = World::new(&[run(0, 3000), run(8000, 100)], true);
    world.options.encoding = encoding;
    let guest = world.guest();
    for page in pages() {
        guest.write(PageIndex(page), |bytes| fill(bytes, page));
    }
    world
}

#[test]
fn a_cut_in_the_first_round_costs_some_pages_and_nothing_else() {
    for encoding in [
        EncodingChoice::Raw,
        EncodingChoice::Lz4,
        EncodingChoice::Delta,
        EncodingChoice::Auto,
    ] {
        for (frame, offset) in [(1, 0), (2, 3), (9, 40), (15, 0)] {
            let what = format!("{encoding:?}, frame {frame}, byte {offset}");
            let broken = Broken::new(frame, offset, FaultKind::Cut);
            broken.survive_beside_a_guest(&mut world(encoding), &what);
        }
    }
}

/// One in each of the connections that take the others' place, too.
#[test]
fn several_cuts_are_survived() {
    for seed in 0..30 {
        let place = |factor: u32| (1 + (seed * factor) % 13, 17);
        let mut broken = Broken::new(place(3).0, 17, FaultKind::Cut);
        broken.also(1, place(5), FaultKind::Cut);
        broken.also(STREAMS, place(7), FaultKind::Cut);
        let mut world = world(EncodingChoice::Delta);
        broken.survive_beside_a_guest(&mut world, &format!("seed {seed}"));
    }
}

/// What was sent before the cut has turned into zeroes, and into a hole, when it is sent again.
#[test]
fn pages_that_are_zeroes_by_then_arrive_as_such() {
    let mut world = world(EncodingChoice::Raw);
    let changed = world.guest();
    world.guest().tracker.before_harvest(move || {
        for page in (1..300).step_by(10) {
            changed.write(PageIndex(page), |bytes| bytes.fill(0));
            changed.discard(PageIndex(page + 1));
        }
    });
    let end = Broken::new(15, 0, FaultKind::Cut).survive(&mut world, "zeroes");
    assert!(end.report.pages.zero > 0);
}

/// The source hears of it at once, not when its patience is at an end.
#[test]
fn a_break_that_only_the_destination_sees_is_mended_soon() {
    let mut world = world(EncodingChoice::Raw);
    let end = Broken::new(5, 0, FaultKind::Reject).survive(&mut world, "rejected");
    assert!(end.took < PATIENCE, "{:?}", end.took);
}

#[test]
fn a_connection_that_carries_nothing_any_more_is_replaced() {
    let mut world = world(EncodingChoice::Raw);
    // Longer than the source takes between two signs of life.
    world.set_patience(Duration::from_millis(2500));
    Broken::new(5, 0, FaultKind::Stall).survive(&mut world, "silence");
}

/// The time is up when the source gives up a connection that the destination takes for a good one:
/// the new one comes when the guest stands still already.
#[test]
fn a_connection_that_is_replaced_right_before_a_forced_switchover_is_let_in() {
    let mut world = world(EncodingChoice::Raw);
    world.set_patience(Duration::from_millis(2500));
    world.options.on_timeout = OnTimeout::Force;
    world.options.timeout = Duration::from_millis(500);
    let mut broken = Broken::new(5, 0, FaultKind::Stall);
    broken.wiring.data[STREAMS].0.capacity = 20_000;
    broken.survive(&mut world, "forced");
}

/// A machine that stands still when the new connection's first bytes arrive.
#[test]
fn a_new_connection_may_arrive_after_the_last_word() {
    // Attach, then the pages of the only round.
    let mut broken = Broken::new(1, 0, FaultKind::Cut);
    broken.wiring.data[STREAMS].0.latency = Duration::from_millis(30);
    broken.survive(&mut World::small(true), "late");
}

/// It goes on to carry what the guest has not waited for.
#[test]
fn a_connection_in_anothers_place_carries_pages_after_the_switchover() {
    let mut world = world(EncodingChoice::Raw);
    world.options.on_timeout = OnTimeout::Postcopy;
    world.handle = new_handle(Duration::from_nanos(1));
    write_at_every_harvest(world.guest());
    let broken = Broken::new(5, 0, FaultKind::Cut);
    let end = postcopy::migrate(&mut world, &broken.wiring);
    assert_eq!(broken.came.load(Ordering::SeqCst), broken.expected);
    assert!(!postcopy::check(&world, &end, "mended before"));
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    let report = end.report.postcopy.expect("a post-copy");
    assert!(report.pages > 0, "{report:?}");
}

/// It is the guest's blackout that a new connection would cost then.
#[test]
fn a_cut_among_the_last_pages_leaves_the_machine_running() {
    let mut world = World::small(true);
    world.write_at_first_harvest();
    // However long it takes to find that the connections carry: no further round.
    world.handle = new_handle(Duration::from_secs(60));
    // Attach, the pages of the first round, a batch without pages, then the last ones.
    let end = Broken::new(4, 0, FaultKind::Cut).migrate(&mut world, "last pages");
    assert!(matches!(end.report.outcome, Outcome::Resumed(_)));
    world.retry("last pages");
}

/// Nothing would be sent over it before the guest stands still.
#[test]
fn a_connection_found_broken_before_the_guest_is_stopped_is_replaced() {
    for kind in [FaultKind::Cut, FaultKind::Reject, FaultKind::Stall] {
        let mut world = World::small(true);
        world.write_at_first_harvest();
        // Of all times, the one that a dead path is noticed by.
        world.set_patience(Duration::from_millis(1500));
        // Attach, the pages of the first round, then the batch without pages.
        let end = Broken::new(3, 0, kind).survive(&mut world, &format!("{kind:?}"));
        assert!(end.report.rounds.len() > 1, "{:?}", end.report.rounds);
        let blackout = end.report.blackout.expect("it was stopped");
        let limit = Duration::from_millis(1000).as_micros();
        assert!(u128::from(blackout.total_us) < limit, "{blackout:?}");
    }
}

/// One more round, and not one after the other.
#[test]
fn a_long_way_costs_one_round() {
    let latency = Duration::from_millis(40);
    let mut wiring = Wiring::clean();
    wiring
        .data
        .iter_mut()
        .for_each(|(there, _)| there.latency = latency);
    let mut world = world(EncodingChoice::Raw);
    world.handle = new_handle(latency * 2);
    let end = world.migrate(&wiring);
    world.check(&end, "a long way");
    assert_eq!(end.report.outcome, Outcome::Surrendered);
    assert_eq!(end.report.rounds.len(), 2, "{:?}", end.report.rounds);
}

/// The encoder has grown with the batch that broke the connection.
#[test]
fn memory_of_a_broken_connection_is_counted_as_given_back() {
    for frame in [2, 9, 15] {
        let mut world = world(EncodingChoice::Delta);
        world.options.streams = 1;
        let end = Broken::new(frame, 17, FaultKind::Cut).survive(&mut world, "cache");
        let (most, limit) = (end.report.cache_bytes, world.options.cache_bytes);
        assert!((1..=limit).contains(&most), "{most} of {limit}");
    }
}

/// Says all that a source says before its data connections: [`World::small`] shall come.
fn offer_small(control: &mut FakeChannel) {
    let mut reader = FrameReader::default();
    let hello = Message::Hello(Hello {
        magic: MAGIC.to_owned(),
        oldest: Versions::OURS.oldest,
        newest: Versions::OURS.newest,
    });
    hello.send(control).expect("it is read");
    let welcome = Message::receive(&mut reader, control);
    assert!(matches!(welcome, Ok(Message::Welcome(_))), "{welcome:?}");
    let offer = Message::Offer(Offer {
        skeleton: b"machine".to_vec(),
        regions: vec![(0, 70), (1000, 20)],
        streams: 1,
        postcopy: false,
        devices: vec![],
        check: false,
    });
    offer.send(control).expect("it is read");
    let accepted = Message::receive(&mut reader, control);
    assert!(matches!(accepted, Ok(Message::Accept)), "{accepted:?}");
}

/// The destination of [`World::small`], for [`offer_small`].
fn options() -> DestinationOptions {
    DestinationOptions {
        versions: Versions::OURS,
        token: b"a token".to_vec(),
        patience: PATIENCE,
        max_streams: 1,
        linger: PATIENCE,
    }
}

/// It takes all its connections for open, and one of them never comes.
#[test]
fn a_source_that_gives_up_while_connections_are_awaited_is_heard() {
    let mut world = World::small(true);
    let (mut control, theirs) = pair(Wire::default(), Wire::default());
    let (_dial, mut accept) = network(None, Box::new(|_| Default::default()));
    let host = &mut world.host;
    std::thread::scope(|scope| {
        let received = scope.spawn(move || {
            let cancelled = AtomicBool::new(false);
            receive(Box::new(theirs), &mut accept, host, &options(), &cancelled)
        });
        offer_small(&mut control);
        let begin = Instant::now();
        for message in [
            Message::Round(Round {
                number: 1,
                pages: 90,
            }),
            Message::Abort(Reasons::one(Cause::Cancelled, "enough")),
        ] {
            message.send(&mut control).expect("it is read");
        }
        let received = received.join().expect("no panic");
        assert!(matches!(received, Err(DestinationError::Peer(_))));
        assert!(begin.elapsed() < PATIENCE / 2, "{:?}", begin.elapsed());
    });
}

/// A source that opens its only connection again and again.
#[test]
fn a_connection_is_not_replaced_without_end() {
    let mut world = World::small(true);
    let (mut control, theirs) = pair(Wire::default(), Wire::default());
    let (mut dial, mut accept) = network(None, Box::new(|_| Default::default()));
    let mut open = || {
        let mut channel = dial.dial(None, &|| false).expect("somebody listens");
        let token = options().token;
        let attach = Message::Attach(Attach { token, index: 0 });
        attach.send(&mut channel).expect("it is read");
        channel
    };
    let is_closed = |channel: &mut Box<dyn Channel>, wait| {
        channel.set_timeout(wait).expect("any time is good");
        matches!(channel.read(&mut [0]), Ok(0))
    };
    let host = &mut world.host;
    std::thread::scope(|scope| {
        let received = scope.spawn(move || {
            let cancelled = AtomicBool::new(false);
            receive(Box::new(theirs), &mut accept, host, &options(), &cancelled)
        });
        offer_small(&mut control);
        let mut current = open();
        // What `docs/wire-format.md` promises.
        for _ in 0..2 {
            let mut old = std::mem::replace(&mut current, open());
            assert!(is_closed(&mut old, PATIENCE));
        }
        assert!(is_closed(&mut open(), PATIENCE));
        assert!(!is_closed(&mut current, Duration::from_millis(20)));
        let abort = Message::Abort(Reasons::one(Cause::ClaimFailed, "enough"));
        abort.send(&mut control).expect("it is read");
        let received = received.join().expect("no panic");
        assert!(matches!(received, Err(DestinationError::Peer(_))));
    });
}
