//! A whole migration with a peer that says anything, on the control and the data connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use migration::destination::{DestinationOptions, receive};
use migration::handoff::{Cause, Outcome};
use migration::progress::{MigrationHandle, Phase, Tuning};
use migration::source::{EncodingChoice, OnTimeout, Parts, SourceOptions, migrate};
use migration::testing::{
    Copies, DevicePlan, Failures, FakeDevice, FakeDisk, FakeHost, FakeMachine, FakeMemory, Side,
    device_part,
};
use migration::wire::frame::HEADER_BYTES;
use migration::wire::message::{
    Attach, Commit, Complete, Hello, MAGIC, Missing, Offer, Prepare, Prepared, Reasons, Round,
    Welcome,
};
use migration::wire::{Message, Versions};
use migration::{PageIndex, PageRun, Section};

use crate::input::{Input, Script};
use crate::peer::{PAGE_FRAMES, Scripted, ScriptedPeers, frame};

const TOKEN: &[u8] = b"token";

/// Where the golden files' pages lie.
const REGION: (u64, u64) = (0x100, 70);

/// Devices whose states come as streams.
const DEVICES: [&str; 2] = ["gpu0", "gpu1"];

/// A script ends by closing the connection, so nothing waits; were it to, the limit would say so.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long threads may take to be gone once a migration is over.
const THREADS_END: Duration = Duration::from_secs(10);

/// First which side is attacked and what the machine is like, then frames: for which connection, of which kind, with what.
/// Connection 0 is the control connection.
pub fn run(data: &[u8]) {
    let threads = count_threads();
    exchange(data);
    // Scoped threads are waited for until their work is done, not until they are gone: what one
    // still holds then would look like a leak.
    let begin = Instant::now();
    while count_threads() > threads {
        assert!(begin.elapsed() < THREADS_END, "a thread is left");
        std::thread::yield_now();
    }
}

/// Of this process.
fn count_threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

fn exchange(data: &[u8]) {
    let mut input = Input::new(data);
    let attacks_source = input.flag();
    let postcopy = input.flag();
    let has_devices = input.flag();
    let mut wires = [const { Vec::new() }; 4];
    while !input.is_empty() {
        let wire = usize::from(input.below(4));
        let (kind, length) = (input.u8(), input.u16());
        let payload = input.take(length.into());
        match kind {
            // Raw pages, or what is no frame.
            0 => wires[wire].extend(payload),
            kind => wires[wire].extend(frame(kind, payload)),
        }
    }
    match attacks_source {
        true => source(&wires, postcopy, has_devices),
        false => destination(&wires, has_devices),
    }
}

fn region() -> PageRun {
    PageRun::new(PageIndex(REGION.0), REGION.1).expect("a run")
}

/// Two whose states come as streams, one of which can be read from while the machine runs.
fn devices(exist: bool) -> Vec<Arc<FakeDevice>> {
    let plan = |before_stop| DevicePlan {
        at_stop: 300_000,
        before_stop,
        ..DevicePlan::default()
    };
    let devices = DEVICES.iter().zip([None, Some(5000)]);
    let devices = devices.map(|(id, before_stop)| FakeDevice::new(id, plan(before_stop)));
    devices.filter(|_| exist).collect()
}

/// It never runs without having held the disk, and is nothing without a machine.
fn destination([control, data @ ..]: &[Vec<u8>; 4], has_devices: bool) {
    let (disk, copies) = (FakeDisk::new(true), Copies::default());
    // A source that has let go, so that the mark is right by chance.
    disk.source_dies();
    let mut host = FakeHost::new(vec![region()], &disk, &copies, &Failures::default());
    host.devices = devices(has_devices);
    let mut accept = ScriptedPeers::new(data);
    let options = DestinationOptions {
        versions: Versions::OURS,
        token: TOKEN.to_vec(),
        patience: PATIENCE,
        max_streams: 2,
        linger: Duration::ZERO,
    };
    let channel = Box::new(Scripted::new(control));
    let cancelled = AtomicBool::new(false);
    let postcopy = Arc::clone(&host.postcopy);
    // An operator ends a machine that waits for a link that never comes.
    let end_cut = || {
        let is_cut = postcopy.holds.load(Ordering::SeqCst) > 0;
        postcopy.ended.fetch_or(is_cut, Ordering::SeqCst);
    };
    let received = watched(end_cut, || {
        receive(channel, &mut accept, &mut host, &options, &cancelled)
    });
    let was_cut = postcopy.holds.load(Ordering::SeqCst) > 0;
    match &received {
        _ if was_cut => assert!(copies.destination_starts() <= 1),
        Ok(received) => {
            assert!(received.start_error.is_none());
            assert_eq!(copies.destination_starts(), 1);
            assert_eq!(disk.holder(), Some(Side::Destination));
        }
        Err(error) => {
            assert!(!crate::chain(error).is_empty());
            assert_eq!(copies.destination_starts(), 0);
            assert_eq!(disk.holder(), None);
        }
    }
}

/// Does `work`, and `look` now and then meanwhile.
fn watched<T>(look: impl Fn() + Sync, work: impl FnOnce() -> T) -> T {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                look();
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let result = work();
        is_over.store(true, Ordering::SeqCst);
        result
    })
}

/// It runs, unless it was told that the destination does.
fn source([control, ..]: &[Vec<u8>; 4], postcopy: bool, has_devices: bool) {
    let (disk, copies) = (FakeDisk::new(true), Copies::default());
    let memory = FakeMemory::with_regions(vec![region()]);
    let mut machine = FakeMachine::new(memory, &disk, &copies, &Failures::default());
    machine.devices = devices(has_devices);
    let guest = machine.guest.clone();
    for page in 0x100..0x104 {
        guest.write(PageIndex(page), |bytes| bytes.fill(7));
    }
    let options = SourceOptions {
        streams: 2,
        encoding: EncodingChoice::Delta,
        cache_bytes: 1 << 20,
        timeout: if postcopy { Duration::ZERO } else { PATIENCE },
        on_timeout: match postcopy {
            true => OnTimeout::Postcopy,
            false => OnTimeout::Cancel,
        },
        patience: PATIENCE,
        prepare_patience: PATIENCE,
        retry: Duration::ZERO,
    };
    let handle = MigrationHandle::new(Tuning {
        bandwidth_bytes_per_s: None,
        max_downtime: Duration::from_secs(1),
    });
    let mut parts = Parts {
        machine: &mut machine,
        pages: &*guest.memory,
        tracker: &*guest.tracker,
    };
    let channel = Box::new(Scripted::new(control));
    let mut dial = ScriptedPeers::new(&[]);
    let end_cut = || {
        if handle.progress().phase == Phase::Unlinked {
            handle.abandon();
        }
    };
    let report = watched(end_cut, || {
        migrate(&mut parts, channel, &mut dial, &options, &handle)
    });
    for device in &machine.devices {
        let record = device.record();
        assert_eq!(record.begun, record.ended);
        assert!(record.misdeeds.is_empty(), "{:?}", record.misdeeds);
    }
    let runs = copies.runs(Side::Source);
    match report.outcome {
        Outcome::Surrendered => assert!(!runs && disk.holder().is_none()),
        Outcome::Resumed(_) => {
            assert!(runs && disk.holder() == Some(Side::Source));
            assert!(report.error.is_some());
        }
        Outcome::InDoubt(_) if postcopy => assert!(!runs),
        Outcome::InDoubt(doubt) => panic!("nobody else has the disk: {doubt:?}"),
    }
}

/// Writes what [`run`] reads.
struct Steps(Script);

impl Steps {
    fn new(attacks_source: bool, postcopy: bool, has_devices: bool) -> Self {
        let script = Script::new().u8(attacks_source.into());
        Self(script.u8(postcopy.into()).u8(has_devices.into()))
    }

    fn frame(self, wire: u8, frame: &[u8]) -> Self {
        let (header, payload) = frame.split_at(HEADER_BYTES);
        let length = u16::try_from(payload.len()).expect("a short seed");
        Self(self.0.u8(wire).u8(header[4]).u16(length).bytes(payload))
    }

    fn message(self, wire: u8, message: &Message) -> Self {
        self.frame(wire, &message.encode().expect("a short seed"))
    }

    fn messages(self, wire: u8, messages: &[Message]) -> Self {
        let mut steps = self;
        for message in messages {
            steps = steps.message(wire, message);
        }
        steps
    }
}

/// Parts of states: on which connection, the number, the device, and whether it is the last one.
const PARTS: [(u8, u64, u16, bool); 5] = [
    (1, 1, 1, false),
    (1, 4, 1, true),
    (2, 0, 0, false),
    (2, 2, 1, false),
    (2, 3, 0, true),
];

/// All that a source says that goes through with it.
fn honest_source(postcopy: bool, has_devices: bool) -> Vec<u8> {
    let attach = |index| {
        Message::Attach(Attach {
            token: TOKEN.to_vec(),
            index,
        })
    };
    let devices: Vec<_> = DEVICES.iter().map(ToString::to_string).collect();
    let devices = if has_devices { devices } else { Vec::new() };
    let mut steps = Steps::new(false, postcopy, has_devices).messages(
        0,
        &[
            Message::Hello(Hello {
                magic: MAGIC.to_owned(),
                oldest: Versions::OURS.oldest,
                newest: Versions::OURS.newest,
            }),
            Message::Offer(Offer {
                skeleton: b"machine".to_vec(),
                regions: vec![REGION],
                streams: 2,
                postcopy,
                devices: devices.clone(),
                check: false,
            }),
            Message::Round(Round {
                number: 1,
                pages: 70,
            }),
            Message::Section(Section {
                id: "disk0".to_owned(),
                kind: "fake".to_owned(),
                version: 1,
                bytes: vec![1, 2, 3],
            }),
        ],
    );
    if postcopy {
        let runs = vec![(REGION.0, 10)];
        steps = steps.message(0, &Message::Missing(Missing { runs }));
    }
    steps = steps.messages(
        0,
        &[
            Message::Prepare(Prepare { sections: 1 }),
            Message::Commit(Commit { mark: 1 }),
        ],
    );
    for (wire, index) in [(1, 0), (2, 1)] {
        steps = steps.message(wire, &attach(index));
    }
    if postcopy {
        steps = steps.message(3, &attach(2));
    }
    for golden in PAGE_FRAMES {
        // Raw pages would not fit into an input.
        if golden.len() < 4096 {
            steps = steps.frame(1, golden);
        }
    }
    if has_devices {
        for (wire, sequence, device, is_last) in PARTS {
            steps = steps.frame(wire, &device_part(sequence, device, is_last));
        }
    }
    steps = steps.message(1, &Message::StreamEnd);
    steps.message(2, &Message::StreamEnd).0.done()
}

fn answers(postcopy: bool, last: &[Message]) -> Vec<u8> {
    answers_to(false, postcopy, last)
}

fn answers_to(has_devices: bool, postcopy: bool, last: &[Message]) -> Vec<u8> {
    let welcome = Message::Welcome(Welcome {
        version: Versions::OURS.newest,
        token: TOKEN.to_vec(),
        data_url: Some("tcp:192.0.2.7:1".to_owned()),
        checks: true,
    });
    let steps = Steps::new(true, postcopy, has_devices).messages(0, &[welcome]);
    steps.messages(0, last).0.done()
}

pub fn seeds() -> Vec<Vec<u8>> {
    let prepared = Message::Prepared(Prepared { restore_us: 5 });
    let reasons = Reasons::one(Cause::ClaimFailed, "no");
    let committed = [prepared.clone(), Message::Committed];
    vec![
        honest_source(false, false),
        honest_source(true, false),
        honest_source(false, true),
        honest_source(true, true),
        answers_to(true, false, &[&[Message::Accept], &committed[..]].concat()),
        answers(false, &[&[Message::Accept], &committed[..]].concat()),
        answers(
            true,
            &[
                &[Message::AcceptPostcopy],
                &committed[..],
                &[Message::Complete(Complete::default())],
            ]
            .concat(),
        ),
        answers(
            false,
            &[
                Message::Accept,
                prepared,
                Message::Declined(reasons.clone()),
            ],
        ),
        answers(false, &[Message::Accept, Message::Abort(reasons.clone())]),
        answers(false, &[Message::Refuse(reasons)]),
    ]
}
