//! Sources that say about devices what no source says.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use migration::destination::{DestinationError, DestinationOptions, Received, receive};
use migration::ports::{Channel, Dial};
use migration::testing::{DevicePlan, FakeChannel, FakeDevice, Wire, device_part, network, pair};
use migration::wire::device::CHUNK_BYTES;
use migration::wire::frame::{FrameHeader, FrameKind};
use migration::wire::message::{Attach, Hello, MAGIC, Offer, Prepare};
use migration::wire::{FrameReader, Message, Versions};

use crate::world::World;

/// How long the destination waits for what never comes.
const PATIENCE: Duration = Duration::from_secs(20);

const STREAMS: u16 = 2;

fn framed(kind: FrameKind, payload: &[u8]) -> Vec<u8> {
    let header = FrameHeader::of(kind, payload).expect("not too long");
    [&header.encode(), payload].concat()
}

/// A source that offers these devices and sends these bytes: on which connection, data
/// connections first, then the control connection.
struct Script {
    devices: Vec<String>,
    bytes: Vec<(usize, Vec<u8>)>,
}

fn named(devices: &[&str]) -> Vec<String> {
    devices.iter().map(|id| (*id).to_owned()).collect()
}

impl Script {
    fn new(bytes: Vec<(usize, Vec<u8>)>) -> Self {
        let devices = named(&["gpu0", "gpu1"]);
        Self { devices, bytes }
    }

    /// Says it to a destination that has two devices, or none where none is offered.
    fn say(self) -> Result<Received, DestinationError> {
        let mut world = World::small(true);
        if !self.devices.is_empty() {
            world.host.devices = ["gpu0", "gpu1"]
                .map(|id| FakeDevice::new(id, DevicePlan::default()))
                .to_vec();
        }
        let (mut control, theirs) = pair(Wire::default(), Wire::default());
        let (mut dial, mut accept) = network(None, Box::new(|_| Default::default()));
        let options = DestinationOptions {
            versions: Versions::OURS,
            token: b"a token".to_vec(),
            patience: PATIENCE,
            max_streams: STREAMS,
            linger: PATIENCE,
        };
        let host = &mut world.host;
        std::thread::scope(|scope| {
            let received = scope.spawn(move || {
                let cancelled = AtomicBool::new(false);
                receive(Box::new(theirs), &mut accept, host, &options, &cancelled)
            });
            // The destination may have ended before all is said.
            control.set_timeout(PATIENCE).expect("any time is good");
            let data = self.speak(&mut control, &mut dial);
            if data.is_none() {
                // It says why.
                let _ = Message::receive(&mut FrameReader::default(), &mut control);
            }
            drop(control);
            received.join().expect("no panic")
        })
    }

    fn speak(
        self,
        control: &mut FakeChannel,
        dial: &mut dyn Dial,
    ) -> Option<Vec<Box<dyn Channel>>> {
        let mut reader = FrameReader::default();
        let hello = Message::Hello(Hello {
            magic: MAGIC.to_owned(),
            oldest: Versions::OURS.oldest,
            newest: Versions::OURS.newest,
        });
        hello.send(control).ok()?;
        Message::receive(&mut reader, control).ok()?;
        let offer = Message::Offer(Offer {
            skeleton: b"machine".to_vec(),
            regions: vec![(0, 70), (1000, 20)],
            streams: STREAMS,
            postcopy: false,
            devices: self.devices,
            check: false,
        });
        offer.send(control).ok()?;
        let Ok(Message::Accept) = Message::receive(&mut reader, control) else {
            return None;
        };
        let mut data = Vec::new();
        for index in 0..STREAMS {
            let mut channel = dial.dial(None, &|| false).ok()?;
            let token = b"a token".to_vec();
            let attach = Message::Attach(Attach { token, index });
            attach.send(&mut channel).ok()?;
            data.push(channel);
        }
        for (connection, bytes) in self.bytes {
            let sent = match data.get_mut(connection) {
                Some(channel) => channel.write_all(&bytes),
                None => std::io::Write::write_all(control, &bytes),
            };
            sent.ok()?;
        }
        for channel in &mut data {
            Message::StreamEnd.send(channel).ok()?;
        }
        let prepare = Message::Prepare(Prepare { sections: 0 });
        prepare.send(control).ok()?;
        let _ = Message::receive(&mut reader, control);
        Some(data)
    }
}

fn refused(script: Script, words: &str) {
    let begin = Instant::now();
    let error = script.say().err().expect("it is no migration");
    let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source());
    let text: Vec<_> = causes.map(ToString::to_string).collect();
    let text = text.join(": ");
    assert!(text.contains(words), "{words:?} in {text:?}");
    let took = begin.elapsed();
    assert!(took < PATIENCE, "{words}: {took:?}");
}

#[test]
fn parts_in_the_wrong_place_are_refused_and_nobody_waits_for_ever() {
    let too_long = FrameHeader {
        kind: FrameKind::DeviceData,
        payload_bytes: u32::try_from(CHUNK_BYTES).unwrap() + 17,
        payload_crc: 0,
    };
    let cases = [
        (vec![(0, device_part(0, 2, false))], "device 2, of 2"),
        (
            vec![(0, device_part(0, 0, false)), (0, device_part(0, 0, false))],
            "part 0 has come",
        ),
        (
            vec![
                (0, device_part(1, 0, true)),
                (1, device_part(0, 0, true)),
                (1, device_part(2, 1, true)),
            ],
            "after the last one",
        ),
        // The second of the same number is refused once the first has been written.
        (
            vec![
                (0, device_part(1, 0, false)),
                (1, device_part(0, 0, false)),
                (1, device_part(1, 0, false)),
            ],
            "part 1 has come",
        ),
        // What comes before them never comes.
        (
            vec![(0, device_part(1, 0, true)), (1, device_part(2, 1, true))],
            "nothing can bring 0",
        ),
        (
            vec![
                (0, device_part(u64::MAX, 0, true)),
                (1, device_part(0, 1, true)),
            ],
            "nothing can bring 1",
        ),
        (
            vec![(0, device_part(0, 0, true)), (0, device_part(1, 1, false))],
            "not come to its end of gpu1",
        ),
        (vec![], "not come to its end of gpu0, gpu1"),
        (
            vec![(2, device_part(0, 0, true))],
            "on the control connection",
        ),
        (
            vec![(1, framed(FrameKind::DeviceData, &[0; 15]))],
            "cut short",
        ),
        (
            vec![(1, framed(FrameKind::DeviceData, &[0xff; 16]))],
            "unknown flags",
        ),
        (vec![(1, too_long.encode().to_vec())], "at most 262160"),
    ];
    for (bytes, words) in cases {
        refused(Script::new(bytes), words);
    }
}

#[test]
fn parts_that_nobody_has_announced_are_refused() {
    let script = Script {
        devices: vec![],
        bytes: vec![(0, device_part(0, 0, true))],
    };
    refused(script, "device 0, of 0");
}

#[test]
fn devices_that_are_too_many_or_have_no_names_are_refused() {
    let many: Vec<_> = (0..300).map(|number| format!("gpu{number}")).collect();
    let cases = [
        (many, "300 devices"),
        (named(&["gpu0", "gpu0"]), "two devices are called gpu0"),
        (named(&["gpu0", "gpu1", ""]), "is no device's id"),
        (named(&["gpu0", "\u{1b}[2J"]), "is no device's id"),
    ];
    for (devices, words) in cases {
        let bytes = vec![];
        refused(Script { devices, bytes }, words);
    }
}

/// What comes in order over two connections is taken in whatever order they are read.
#[test]
fn parts_in_their_places_are_taken() {
    let script = Script::new(vec![
        (0, device_part(1, 1, false)),
        (0, device_part(4, 1, true)),
        (1, device_part(0, 0, false)),
        (1, device_part(2, 1, false)),
        (1, device_part(3, 0, true)),
    ]);
    // It waits for a commit that never comes.
    let error = script.say().err().expect("no commit has come");
    let is_handoff = matches!(
        error,
        DestinationError::Link(_) | DestinationError::Handoff(_)
    );
    assert!(is_handoff, "{error:?}");
}
