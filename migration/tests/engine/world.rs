//! A source, a destination and what is between them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migration::destination::{DestinationError, DestinationOptions, Received, receive};
use migration::handoff::{Doubt, Outcome};
use migration::ports::{Breaker, Channel, Dial, PageStore};
use migration::progress::{MigrationHandle, Tuning};
use migration::source::{
    CheckReport, EncodingChoice, OnTimeout, Parts, SourceOptions, SourceReport, check, migrate,
};
use migration::testing::machine::Guest;
use migration::testing::{
    Copies, Failures, FakeChannel, FakeDisk, FakeHost, FakeMachine, FakeMemory, Side, Wire,
    network, pair,
};
use migration::wire::Versions;
use migration::{PageIndex, PageRun, Section};

pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Wires of a migration.
#[derive(Clone)]
pub(crate) struct Wiring {
    pub(crate) control: (Wire, Wire),
    pub(crate) data: Vec<(Wire, Wire)>,
    /// How long it takes to open a data connection.
    pub(crate) pause: Duration,
    /// Called with a data connection's number when it begins to open.
    pub(crate) on_dial: Option<Arc<dyn Fn(u16) + Send + Sync>>,
    /// Breaks everything off when something is told to.
    pub(crate) breakers: Arc<Mutex<Vec<Arc<dyn Breaker>>>>,
}

impl Wiring {
    pub(crate) fn clean() -> Self {
        Self {
            control: Default::default(),
            data: vec![Default::default(); 4],
            pause: Duration::ZERO,
            on_dial: None,
            breakers: Arc::default(),
        }
    }
}

pub(crate) struct World {
    pub(crate) machine: FakeMachine,
    pub(crate) host: FakeHost,
    pub(crate) disk: FakeDisk,
    pub(crate) copies: Copies,
    pub(crate) failures: Failures,
    pub(crate) options: SourceOptions,
    pub(crate) patience: Duration,
    /// That the destination speaks.
    pub(crate) versions: Versions,
    pub(crate) handle: Arc<MigrationHandle>,
    pub(crate) destination_cancelled: Arc<AtomicBool>,
    pub(crate) destination_ended: Arc<AtomicBool>,
    pub(crate) lockable: bool,
    /// The source begins when the destination has ended.
    pub(crate) source_is_late: bool,
    /// Where strangers can connect while a machine is on its way.
    pub(crate) entrance: Arc<Mutex<Option<Sender<FakeChannel>>>>,
}

/// What came of a migration.
pub(crate) struct End {
    pub(crate) report: SourceReport,
    pub(crate) received: Result<Received, DestinationError>,
    pub(crate) took: Duration,
    pub(crate) destination_took: Duration,
    starts: u32,
}

pub(crate) fn run(start: u64, count: u64) -> PageRun {
    PageRun::new(PageIndex(start), count).expect("a run")
}

pub(crate) fn new_handle(max_downtime: Duration) -> Arc<MigrationHandle> {
    Arc::new(MigrationHandle::new(Tuning {
        bandwidth_bytes_per_s: None,
        max_downtime,
    }))
}

impl World {
    pub(crate) fn new(regions: &[PageRun], lockable: bool) -> Self {
        let (disk, copies) = (FakeDisk::new(lockable), Copies::default());
        let failures = Failures::default();
        let memory = FakeMemory::with_regions(regions.to_vec());
        let mut machine = FakeMachine::new(memory, &disk, &copies, &failures);
        machine.sections = (0..3)
            .map(|n| Section {
                id: format!("disk{n}"),
                kind: "fake".to_owned(),
                version: n,
                bytes: vec![7; usize::try_from(100 * n).expect("small")],
            })
            .collect();
        Self {
            host: FakeHost::new(regions.to_vec(), &disk, &copies, &failures),
            machine,
            disk,
            copies,
            failures,
            options: SourceOptions {
                streams: 2,
                encoding: EncodingChoice::Delta,
                cache_bytes: 16 << 20,
                timeout: Duration::from_secs(20),
                on_timeout: OnTimeout::Cancel,
                patience: PATIENCE,
                prepare_patience: PATIENCE,
                retry: Duration::from_secs(60),
            },
            patience: PATIENCE,
            versions: Versions::OURS,
            handle: new_handle(Duration::from_millis(300)),
            destination_cancelled: Arc::default(),
            destination_ended: Arc::default(),
            lockable,
            source_is_late: false,
            entrance: Arc::default(),
        }
    }

    /// Two regions, one per stream, with a bit of everything; a page of each changes between the
    /// first round and the last.
    pub(crate) fn small(lockable: bool) -> Self {
        let world = Self::new(&[run(0, 70), run(1000, 20)], lockable);
        let guest = world.guest();
        for page in (0..70).chain(1000..1020).filter(|page| page % 3 != 0) {
            guest.write(PageIndex(page), |bytes| fill(bytes, page));
        }
        world
    }

    pub(crate) fn guest(&self) -> Guest {
        self.machine.guest.clone()
    }

    pub(crate) fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
        self.options.patience = patience;
        self.options.prepare_patience = patience;
    }

    /// The guest writes when the log is read for the first time.
    pub(crate) fn write_at_first_harvest(&self) {
        let guest = self.guest();
        self.machine.guest.tracker.before_harvest(move || {
            for (page, at) in [(1, 0), (2, 4095), (3, 9), (69, 100), (1001, 8)] {
                guest.write(PageIndex(page), |bytes| bytes[at] ^= 0x55);
            }
            guest.write(PageIndex(4), |bytes| bytes.fill(0));
            guest.discard(PageIndex(5));
        });
    }

    /// Moves the machine; the destination is a thread.
    pub(crate) fn migrate(&mut self, wiring: &Wiring) -> End {
        let begin = Instant::now();
        let starts = self.copies.destination_starts();
        let (report, received, destination_took) = self.meet(wiring, migrate);
        End {
            report,
            received,
            took: begin.elapsed(),
            destination_took,
            starts: self.copies.destination_starts() - starts,
        }
    }

    /// Asks whether it could be moved.
    pub(crate) fn look_ahead(&mut self, wiring: &Wiring) -> (CheckReport, DestinationError) {
        let starts = self.copies.destination_starts();
        let (report, received, _) = self.meet(wiring, check);
        assert_eq!(self.copies.destination_starts(), starts);
        let guest = self.guest();
        assert!(self.copies.runs(Side::Source) && !guest.tracker.is_logging());
        assert_eq!(guest.percent(), 100);
        assert_eq!(self.disk.holder(), Some(Side::Source));
        (report, received.err().expect("nothing has come"))
    }

    /// Has a source do `work` with a destination.
    fn meet<T>(
        &mut self,
        wiring: &Wiring,
        work: impl FnOnce(
            &mut Parts<'_>,
            Box<dyn Channel>,
            &mut dyn Dial,
            &SourceOptions,
            &MigrationHandle,
        ) -> T,
    ) -> (T, Result<Received, DestinationError>, Duration) {
        let begin = Instant::now();
        let (ours, theirs) = pair(wiring.control.0.clone(), wiring.control.1.clone());
        let wires = wiring.data.clone();
        let each = move |index: u16| wires.get(usize::from(index)).cloned().unwrap_or_default();
        let (mut dial, mut accept) = network(Some("tcp:elsewhere"), Box::new(each));
        wiring
            .breakers
            .lock()
            .expect("no panic")
            .push(ours.breaker());
        dial.pause = wiring.pause;
        dial.on_dial = wiring.on_dial.clone();
        *self.entrance.lock().expect("no panic") = Some(dial.entrance());
        dial.breakers = Arc::clone(&wiring.breakers);
        let options = DestinationOptions {
            versions: self.versions,
            token: b"a token".to_vec(),
            patience: self.patience,
            max_streams: 8,
            linger: self.patience * 5,
        };
        let (host, cancelled) = (&mut self.host, Arc::clone(&self.destination_cancelled));
        let tracker = Arc::clone(&self.machine.guest.tracker);
        let memory = Arc::clone(&self.machine.guest.memory);
        let entrance = Arc::clone(&self.entrance);
        let ended = Arc::clone(&self.destination_ended);
        ended.store(false, Ordering::SeqCst);
        let mut parts = Parts {
            machine: &mut self.machine,
            pages: &*memory,
            tracker: &*tracker,
        };
        let (report, (received, took)) = std::thread::scope(|scope| {
            let destination = scope.spawn(move || {
                let received = receive(Box::new(theirs), &mut accept, host, &options, &cancelled);
                ended.store(true, Ordering::SeqCst);
                (received, begin.elapsed())
            });
            while self.source_is_late && !self.destination_ended.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let channel = Box::new(ours);
            let report = work(&mut parts, channel, &mut dial, &self.options, &self.handle);
            // A process that ends takes its connections with it.
            drop(dial);
            entrance.lock().expect("no panic").take();
            (report, destination.join().expect("no panic"))
        });
        (report, received, took)
    }

    /// What both sides owe whatever happened.
    pub(crate) fn check(&self, end: &End, what: &str) {
        let (outcome, error) = (end.report.outcome, &end.report.error);
        let what = format!(
            "{what}: {outcome:?} ({error:?}), destination {:?}",
            end.received.as_ref().err()
        );
        assert!(!self.copies.were_both_running(), "both ran: {what}");
        assert!(end.starts <= 1, "started twice: {what}");
        let source_runs = self.copies.runs(Side::Source);
        if end.received.is_ok() {
            self.check_arrived(&what);
        }
        match outcome {
            Outcome::Surrendered => {
                assert!(error.is_none() && !source_runs, "{what}");
                assert!(end.received.is_ok(), "{what}");
            }
            Outcome::Resumed(_) => {
                assert!(error.is_some() && source_runs, "{what}");
                assert!(end.received.is_err() && end.starts == 0, "{what}");
                let guest = self.guest();
                assert!(!guest.tracker.is_logging(), "still logged: {what}");
                assert_eq!(guest.percent(), 100, "slow: {what}");
                let holder = self.disk.holder();
                assert_eq!(holder, Some(Side::Source), "disk: {what}");
            }
            Outcome::InDoubt(doubt) => {
                assert!(!source_runs, "{what}");
                let undecidable = !self.lockable && matches!(doubt, Doubt::PeerMayRun(_));
                assert!(undecidable, "{what}");
            }
        }
    }

    /// The destination's machine is the source's.
    pub(crate) fn check_arrived(&self, what: &str) {
        let (ours, theirs) = (&self.guest().memory, self.host.memory.as_ref());
        let theirs = theirs.expect("a machine was built");
        assert_eq!(ours.first_difference(theirs), None, "memory: {what}");
        let sections = self.host.restored.lock().expect("no panic").clone();
        assert_eq!(sections, self.machine.sections, "{what}");
        if self.lockable {
            assert_eq!(self.disk.holder(), Some(Side::Destination), "{what}");
        }
    }

    /// Once more, with nothing in the way.
    pub(crate) fn retry(&mut self, what: &str) {
        self.failures.clear();
        self.machine.guest.tracker.set_broken(false);
        self.machine.guest.tracker.set_start_fails(false);
        self.host.refusals.clear();
        self.machine.blockers.clear();
        self.set_patience(PATIENCE);
        self.handle = new_handle(Duration::from_millis(300));
        self.destination_cancelled.store(false, Ordering::SeqCst);
        let end = self.migrate(&Wiring::clean());
        self.check(&end, what);
        let outcome = end.report.outcome;
        assert_eq!(outcome, Outcome::Surrendered, "retry after {what}");
    }
}

/// Contents of a page: noise, text, few bytes or zeroes.
pub(crate) fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let kind = next() >> 8 & 3;
    for (at, byte) in bytes.iter_mut().enumerate() {
        let random = next().to_le_bytes()[3];
        *byte = match kind {
            0 => random,
            1 => b"the quick brown fox "[at % 20],
            2 if at % 500 == 0 => random,
            _ => 0,
        };
    }
}

/// That a page was never touched at either side where it was not at the source.
pub(crate) fn assert_holes(world: &World, ever_touched: impl Fn(PageIndex) -> bool) {
    let theirs = world.host.memory.as_ref().expect("a machine was built");
    let filled: Vec<_> = theirs.touched().into_iter().collect();
    let strangers: Vec<_> = filled.iter().filter(|page| !ever_touched(**page)).collect();
    assert!(strangers.is_empty(), "holes were filled: {strangers:?}");
    assert_eq!(world.guest().memory.regions(), theirs.regions());
}
