//! Bytes of each version, as they are kept in `tests/golden/`: what this build sends is what is
//! there, what is there this build reads, and `docs/wire-format.md` shows the same. A version's
//! folder has what is new in it.
//!
//! `GOLDEN=write cargo test -p migration --test golden` writes files that are missing. A file that
//! exists is never changed: another format is another version, in a folder of its own.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::PathBuf;

use migration::codec::{Decoder, Encoder, Encoding};
use migration::handoff::Cause;
use migration::testing::FakeMemory;
use migration::wire::device::DeviceHeader;
use migration::wire::message::{
    Attach, CONTROL_INDEX, Commit, Complete, Fetch, Hello, MAGIC, Missing, Offer, Prepare,
    Prepared, Reasons, Round, Welcome,
};
use migration::wire::{
    DEVICES_VERSION, FrameKind, FrameReader, Message, OLDEST_VERSION, VERSION, device,
};
use migration::{PageIndex, PageRun, Section};

const DOCUMENT: &str = include_str!("../../docs/wire-format.md");

fn folder(version: u16) -> PathBuf {
    let all = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    all.join(format!("v{version}"))
}

fn file(name: &str) -> PathBuf {
    let version = match name {
        "pages-live" => 2,
        "offer-devices" | "device-data" | "welcome-checks" | "offer-check" => DEVICES_VERSION,
        _ => 1,
    };
    folder(version).join(format!("{name}.bin"))
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(file(name)).expect(name)
}

/// One message of each kind, named as its file.
fn messages() -> Vec<(&'static str, Message)> {
    let token: Vec<u8> = (0..32).collect();
    let reasons = |cause, reasons: &[&str]| Reasons {
        cause,
        reasons: reasons.iter().map(|reason| (*reason).to_owned()).collect(),
    };
    vec![
        (
            "hello",
            Message::Hello(Hello {
                magic: MAGIC.to_owned(),
                oldest: 1,
                newest: 1,
            }),
        ),
        (
            "welcome",
            Message::Welcome(Welcome {
                version: 1,
                token: token.clone(),
                data_url: Some("tcp:192.0.2.7:4444".to_owned()),
                checks: false,
            }),
        ),
        (
            "welcome-same-address",
            Message::Welcome(Welcome {
                version: 1,
                token: token.clone(),
                data_url: None,
                checks: false,
            }),
        ),
        (
            "welcome-checks",
            Message::Welcome(Welcome {
                version: 1,
                token: token.clone(),
                data_url: None,
                checks: true,
            }),
        ),
        (
            "offer-check",
            Message::Offer(Offer {
                skeleton: b"a machine".to_vec(),
                regions: vec![(0, 0xa0)],
                streams: 4,
                postcopy: false,
                devices: vec![],
                check: true,
            }),
        ),
        (
            "offer",
            Message::Offer(Offer {
                skeleton: b"a machine".to_vec(),
                regions: vec![(0, 0xa0), (0x100, 0xbff00), (0x0010_0000, 0x40000)],
                streams: 4,
                postcopy: false,
                devices: vec![],
                check: false,
            }),
        ),
        (
            "offer-devices",
            Message::Offer(Offer {
                skeleton: b"a machine".to_vec(),
                regions: vec![(0, 0xa0)],
                streams: 4,
                postcopy: false,
                devices: vec!["gpu0".to_owned(), "gpu1".to_owned()],
                check: false,
            }),
        ),
        ("accept", Message::Accept),
        (
            "refuse",
            Message::Refuse(reasons(Cause::RestoreFailed, &["no avx512", "no disk0"])),
        ),
        (
            "attach-control",
            Message::Attach(Attach {
                token: token.clone(),
                index: CONTROL_INDEX,
            }),
        ),
        ("missing-end", Message::Missing(Missing { runs: vec![] })),
        ("attach", Message::Attach(Attach { token, index: 3 })),
        ("stream-end", Message::StreamEnd),
        (
            "round",
            Message::Round(Round {
                number: 2,
                pages: 1_048_576,
            }),
        ),
        (
            "section",
            Message::Section(Section {
                id: "disk0".to_owned(),
                kind: "virtio-pci".to_owned(),
                version: 2,
                bytes: b"state".to_vec(),
            }),
        ),
        ("prepare", Message::Prepare(Prepare { sections: 12 })),
        ("prepared", Message::Prepared(Prepared { restore_us: 1500 })),
        (
            "abort",
            Message::Abort(reasons(Cause::Cancelled, &["it was cancelled"])),
        ),
        (
            "commit",
            Message::Commit(Commit {
                mark: 0x1234_5678_9abc,
            }),
        ),
        ("committed", Message::Committed),
        (
            "declined",
            Message::Declined(reasons(Cause::ClaimFailed, &["disk0 is locked"])),
        ),
        (
            "offer-postcopy",
            Message::Offer(Offer {
                skeleton: b"a machine".to_vec(),
                regions: vec![(0, 0xa0)],
                streams: 4,
                postcopy: true,
                devices: vec![],
                check: false,
            }),
        ),
        ("accept-postcopy", Message::AcceptPostcopy),
        (
            "missing",
            Message::Missing(Missing {
                runs: vec![(0x10, 2), (0x0010_0000, 512)],
            }),
        ),
        (
            "fetch",
            Message::Fetch(Fetch {
                page: 0x0010_0003,
                count: 1,
            }),
        ),
        (
            "complete",
            Message::Complete(Complete {
                faults: 19,
                waited_us: 12_000,
                longest_us: 1500,
            }),
        ),
    ]
}

/// Memory that the frames of pages are about.
const REGION: (u64, u64) = (0x100, 70);

/// Pages of a frame, in order: number and contents.
type Pages = Vec<(u64, Vec<u8>)>;

fn page(text: &str) -> Vec<u8> {
    text.bytes().cycle().take(4096).collect()
}

fn noise() -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(4096).collect()
}

/// One frame of pages as it is sent, raw pages included.
fn encode(encoder: &mut Encoder, pages: &Pages, zeroes: &[PageRun], how: Encoding) -> Vec<u8> {
    let runs: Vec<_> = pages
        .iter()
        .filter_map(|(number, _)| PageRun::new(PageIndex(*number), 1))
        .collect();
    let bytes: Vec<u8> = pages.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
    let mut frame = Vec::new();
    let base = PageIndex(REGION.0);
    let (_, raw) = encoder.encode(base, (&runs, &bytes), zeroes, how, &mut frame);
    for range in raw {
        frame.extend_from_slice(&bytes[range]);
    }
    frame
}

fn encode_live(encoder: &mut Encoder, number: u64, bytes: &[u8]) -> Vec<u8> {
    let run = PageRun::new(PageIndex(number), 1).expect("a page");
    let mut frame = Vec::new();
    encoder.encode_live(PageIndex(REGION.0), &[run], &[], &mut frame);
    frame.extend_from_slice(bytes);
    frame
}

/// A frame for each way in which pages travel, and memory after all of them.
fn page_frames() -> (Vec<(&'static str, Vec<u8>)>, Pages) {
    let mut encoder = Encoder::new(1 << 20);
    encoder.begin_round(1, true);
    let text = page("text ");
    let lz4 = vec![(0x100, text.clone()), (0x103, page("more "))];
    let raw = vec![(0x110, noise())];
    let zeroes = PageRun::new(PageIndex(0x120), 3);
    let mut changed = text;
    changed[10..14].copy_from_slice(b"TEXT");
    changed[4000] = b'!';
    let delta = vec![(0x100, changed.clone())];
    let frames = vec![
        (
            "pages-lz4",
            encode(&mut encoder, &lz4, &[], Encoding::Delta),
        ),
        ("pages-raw", encode(&mut encoder, &raw, &[], Encoding::Raw)),
        (
            "pages-zero",
            encode(&mut encoder, &vec![], zeroes.as_slice(), Encoding::Raw),
        ),
        (
            "pages-delta",
            encode(&mut encoder, &delta, &[], Encoding::Delta),
        ),
        ("pages-live", encode_live(&mut encoder, 0x118, &noise())),
    ];
    let after = vec![
        (0x100, changed),
        (0x103, page("more ")),
        (0x110, noise()),
        (0x118, noise()),
    ];
    (frames, after)
}

/// The 1001st part of all, the last one of the second device.
const PART: DeviceHeader = DeviceHeader {
    sequence: 1000,
    device: 1,
    is_last: true,
};

fn device_data() -> Vec<u8> {
    let mut frame = vec![0; device::FRAME_HEAD_BYTES];
    frame.extend_from_slice(b"state");
    device::seal(&mut frame, &PART).expect("short");
    frame
}

/// How LZ4 packs may change with its library; how it is unpacked may not.
fn is_packed_freely(name: &str) -> bool {
    name == "pages-lz4"
}

fn all() -> Vec<(&'static str, Vec<u8>)> {
    let messages = messages().into_iter();
    let encoded = messages.map(|(name, message)| (name, message.encode().expect("short")));
    let frames = encoded.chain(page_frames().0);
    frames.chain([("device-data", device_data())]).collect()
}

#[test]
fn what_is_sent_is_what_was_always_sent() {
    let write = std::env::var_os("GOLDEN").is_some_and(|value| value == "write");
    for (name, frame) in all() {
        let path = file(name);
        if write && !path.exists() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &frame).unwrap();
        }
        if !is_packed_freely(name) {
            assert_eq!(frame, golden(name), "{name}");
        }
    }
}

#[test]
fn what_was_ever_sent_is_read() {
    for (name, message) in messages() {
        let mut from = Cursor::new(golden(name));
        let mut reader = FrameReader::default();
        let read = Message::receive(&mut reader, &mut from).unwrap();
        assert_eq!(read, message, "{name}");
    }
}

#[test]
fn pages_that_were_ever_sent_are_read() {
    let (frames, after) = page_frames();
    let region = PageRun::new(PageIndex(REGION.0), REGION.1).unwrap();
    let store = FakeMemory::with_regions(vec![region]);
    let mut decoder = Decoder::new(&[region]);
    for (name, _) in frames {
        let mut from = Cursor::new(golden(name));
        let mut reader = FrameReader::default();
        let mut payload = Vec::new();
        let kind = reader.read(&mut from, &mut payload).unwrap();
        assert_eq!(kind, FrameKind::Pages, "{name}");
        let from = (&mut reader, &mut from);
        decoder.decode(&payload, from, &store).unwrap();
    }
    let found: Pages = store
        .touched()
        .into_iter()
        .map(|page| (page.0, store.page(page).unwrap()))
        .collect();
    assert!(found == after, "pages differ");
}

#[test]
fn device_states_that_were_ever_sent_are_read() {
    let mut payload = Vec::new();
    let mut from = Cursor::new(golden("device-data"));
    let kind = FrameReader::default().read(&mut from, &mut payload);
    assert_eq!(kind.unwrap(), FrameKind::DeviceData);
    let read = DeviceHeader::split(&payload).unwrap();
    assert_eq!(read, (PART, &b"state"[..]));
}

#[test]
fn no_file_is_forgotten() {
    let names: Vec<_> = all()
        .into_iter()
        .map(|(name, _)| format!("{name}.bin"))
        .collect();
    for version in 1..=VERSION {
        for entry in std::fs::read_dir(folder(version)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(names.contains(&name), "nothing makes {name}");
        }
    }
}

#[test]
fn every_version_has_a_folder() {
    for version in OLDEST_VERSION..=VERSION {
        let path = folder(version);
        assert!(path.is_dir(), "{}", path.display());
    }
}

/// A line `00000010  68 65 6c  text` of a dump: where, and which bytes.
fn dumped(line: &str) -> (usize, Vec<u8>) {
    let (offset, rest) = line.split_once("  ").expect("an offset");
    let hex = rest.split("  ").next().unwrap_or_default();
    let bytes = hex
        .split(' ')
        .map(|byte| u8::from_str_radix(byte, 16).expect("bytes"));
    (
        usize::from_str_radix(offset, 16).expect("an offset"),
        bytes.collect(),
    )
}

/// Blocks ```` ```hexdump NAME ```` of the document.
fn dumps() -> BTreeMap<&'static str, Vec<(usize, Vec<u8>)>> {
    let mut dumps = BTreeMap::new();
    let mut name = None;
    for line in DOCUMENT.lines() {
        if let Some(dump) = line.strip_prefix("```hexdump ") {
            name = Some(dump);
            dumps.insert(dump, Vec::new());
        } else if line.starts_with("```") {
            name = None;
        } else if let Some(dump) = name.and_then(|name| dumps.get_mut(name))
            && line != "..."
        {
            dump.push(dumped(line));
        }
    }
    dumps
}

#[test]
fn the_document_shows_the_files() {
    let dumps = dumps();
    for (name, _) in all() {
        let (file, dump) = (golden(name), dumps.get(name));
        let dump = dump.unwrap_or_else(|| panic!("{name} is not in docs/wire-format.md"));
        let mut shown = 0;
        for (offset, bytes) in dump {
            let found = file.get(*offset..offset + bytes.len());
            assert_eq!(found, Some(&bytes[..]), "{name} at {offset:#x}");
            shown += bytes.len();
        }
        let whole = file.len().min(200);
        assert!(shown >= whole, "{name}: {shown} of {} bytes", file.len());
    }
    assert_eq!(dumps.len(), all().len(), "a dump has no file");
}

/// What a later build of the same version may add.
#[test]
fn fields_that_are_not_known_are_passed_over() {
    #[derive(serde::Serialize)]
    struct More {
        later: Vec<u8>,
        sections: u32,
        note: Option<String>,
    }
    let more = More {
        later: vec![1, 2],
        sections: 12,
        note: None,
    };
    let mut payload = Vec::new();
    ciborium::into_writer(&more, &mut payload).unwrap();
    let read = Message::decode(FrameKind::Prepare, &payload).unwrap();
    assert_eq!(read, Message::Prepare(Prepare { sections: 12 }));
    payload.push(0);
    assert!(Message::decode(FrameKind::Prepare, &payload).is_err());
}
