//! A whole migration with a peer that says anything, on the control and the data connections.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use migration::destination::{DestinationOptions, receive};
use migration::handoff::{Cause, Outcome};
use migration::progress::{MigrationHandle, Tuning};
use migration::source::{EncodingChoice, OnTimeout, Parts, SourceOptions, migrate};
use migration::testing::{Copies, Failures, FakeDisk, FakeHost, FakeMachine, FakeMemory, Side};
use migration::wire::Message;
use migration::wire::frame::HEADER_BYTES;
use migration::wire::message::{
    Attach, Commit, Hello, MAGIC, Offer, Prepare, Prepared, Reasons, Round, Welcome,
};
use migration::{PageIndex, PageRun, Section};

use crate::input::{Input, Script};
use crate::peer::{PAGE_FRAMES, Scripted, ScriptedPeers, frame};

const TOKEN: &[u8] = b"token";

/// Where the golden files' pages lie.
const REGION: (u64, u64) = (0x100, 70);

/// A script ends by closing the connection, so nothing waits; were it to, the limit would say so.
const PATIENCE: Duration = Duration::from_secs(30);

/// First which side is attacked, then frames: for which connection, of which kind, with what.
/// Connection 0 is the control connection.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let attacks_source = input.flag();
    let mut wires = [const { Vec::new() }; 3];
    while !input.is_empty() {
        let wire = usize::from(input.below(3));
        let (kind, length) = (input.u8(), input.u16());
        let payload = input.take(length.into());
        match kind {
            // Raw pages, or what is no frame.
            0 => wires[wire].extend(payload),
            kind => wires[wire].extend(frame(kind, payload)),
        }
    }
    match attacks_source {
        true => source(&wires),
        false => destination(&wires),
    }
}

fn region() -> PageRun {
    PageRun::new(PageIndex(REGION.0), REGION.1).expect("a run")
}

/// It never runs without having held the disk, and is nothing without a machine.
fn destination([control, data @ ..]: &[Vec<u8>; 3]) {
    let (disk, copies) = (FakeDisk::new(true), Copies::default());
    // A source that has let go, so that the mark is right by chance.
    disk.source_dies();
    let mut host = FakeHost::new(vec![region()], &disk, &copies, &Failures::default());
    let mut accept = ScriptedPeers::new(data);
    let options = DestinationOptions {
        token: TOKEN.to_vec(),
        patience: PATIENCE,
        max_streams: 2,
    };
    let channel = Box::new(Scripted::new(control));
    let cancelled = AtomicBool::new(false);
    let received = receive(channel, &mut accept, &mut host, &options, &cancelled);
    match &received {
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

/// It runs, unless it was told that the destination does.
fn source([control, ..]: &[Vec<u8>; 3]) {
    let (disk, copies) = (FakeDisk::new(true), Copies::default());
    let memory = FakeMemory::with_regions(vec![region()]);
    let mut machine = FakeMachine::new(memory, &disk, &copies, &Failures::default());
    let guest = machine.guest.clone();
    for page in 0x100..0x104 {
        guest.write(PageIndex(page), |bytes| bytes.fill(7));
    }
    let options = SourceOptions {
        streams: 2,
        encoding: EncodingChoice::Delta,
        cache_bytes: 1 << 20,
        timeout: PATIENCE,
        on_timeout: OnTimeout::Cancel,
        patience: PATIENCE,
        prepare_patience: PATIENCE,
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
    let report = migrate(&mut parts, channel, &mut dial, &options, &handle);
    let runs = copies.runs(Side::Source);
    match report.outcome {
        Outcome::Surrendered => assert!(!runs && disk.holder().is_none()),
        Outcome::Resumed(_) => {
            assert!(runs && disk.holder() == Some(Side::Source));
            assert!(report.error.is_some());
        }
        Outcome::InDoubt(doubt) => panic!("nobody else has the disk: {doubt:?}"),
    }
}

/// Writes what [`run`] reads.
struct Steps(Script);

impl Steps {
    fn new(attacks_source: bool) -> Self {
        Self(Script::new().u8(attacks_source.into()))
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

/// All that a source says that goes through with it.
fn honest_source() -> Vec<u8> {
    let attach = |index| {
        Message::Attach(Attach {
            token: TOKEN.to_vec(),
            index,
        })
    };
    let mut steps = Steps::new(false).messages(
        0,
        &[
            Message::Hello(Hello {
                magic: MAGIC.to_owned(),
                oldest: 1,
                newest: 1,
            }),
            Message::Offer(Offer {
                skeleton: b"machine".to_vec(),
                regions: vec![REGION],
                streams: 2,
                postcopy: false,
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
            Message::Prepare(Prepare { sections: 1 }),
            Message::Commit(Commit { mark: 1 }),
        ],
    );
    for (wire, index) in [(1, 0), (2, 1)] {
        steps = steps.message(wire, &attach(index));
    }
    for golden in PAGE_FRAMES {
        // Raw pages would not fit into an input.
        if golden.len() < 4096 {
            steps = steps.frame(1, golden);
        }
    }
    steps = steps.message(1, &Message::StreamEnd);
    steps.message(2, &Message::StreamEnd).0.done()
}

fn answers(last: &[Message]) -> Vec<u8> {
    let welcome = Message::Welcome(Welcome {
        version: 1,
        token: TOKEN.to_vec(),
        data_url: Some("tcp:192.0.2.7:1".to_owned()),
    });
    let steps = Steps::new(true).messages(0, &[welcome]);
    steps.messages(0, last).0.done()
}

pub fn seeds() -> Vec<Vec<u8>> {
    let prepared = Message::Prepared(Prepared { restore_us: 5 });
    let reasons = Reasons::one(Cause::ClaimFailed, "no");
    vec![
        honest_source(),
        answers(&[Message::Accept, prepared.clone(), Message::Committed]),
        answers(&[
            Message::Accept,
            prepared,
            Message::Declined(reasons.clone()),
        ]),
        answers(&[Message::Accept, Message::Abort(reasons.clone())]),
        answers(&[Message::Refuse(reasons)]),
    ]
}
