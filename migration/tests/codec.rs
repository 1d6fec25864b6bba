//! Properties of the codec and of the frame reader, over the public API.

use std::io::{self, Cursor, ErrorKind, Read};

use migration::codec::{Decoder, Encoder, Encoding, delta};
use migration::ports::PageStore;
use migration::testing::FakeMemory;
use migration::wire::{FrameError, FrameKind, FrameReader, Message};
use migration::{PageIndex, PageRun};
use proptest::collection::vec;
use proptest::prelude::*;

const PAGE: usize = 4096;

/// Two regions that batches fit into in different ways.
const REGIONS: [(u64, u64); 2] = [(0, 100), (1000, 30)];

/// Where batches begin: multiples of 64 from a region's start.
const BASES: [(u64, u64); 3] = [(0, 64), (64, 36), (1000, 30)];

fn regions() -> Vec<PageRun> {
    let run = |(start, count)| PageRun::new(PageIndex(start), count).expect("a run");
    REGIONS.map(run).to_vec()
}

/// What a page becomes.
#[derive(Clone, Debug)]
enum Change {
    Same,
    Zero,
    Hole,
    Bytes(Vec<(usize, u8)>),
    Noise(u64),
    Text(u64),
}

impl Change {
    fn apply(&self, memory: &FakeMemory, page: PageIndex) {
        match self {
            Self::Same => memory.change(page, |_| ()),
            Self::Zero => memory.change(page, |bytes| bytes.fill(0)),
            Self::Hole => memory.discard(page),
            Self::Bytes(changes) => memory.change(page, |bytes| {
                for (at, byte) in changes {
                    bytes[*at] = *byte;
                }
            }),
            Self::Noise(seed) => memory.change(page, |bytes| {
                let mut state = seed | 1;
                for byte in bytes {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    *byte = state.to_le_bytes()[2];
                }
            }),
            Self::Text(seed) => memory.change(page, |bytes| {
                let line = format!("line of text number {seed}\n");
                for (byte, letter) in bytes.iter_mut().zip(line.bytes().cycle()) {
                    *byte = letter;
                }
            }),
        }
    }
}

/// Contents come back: a version that one side has forgotten must not be taken for another.
fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        1 => Just(Change::Same),
        2 => Just(Change::Zero),
        1 => Just(Change::Hole),
        3 => vec((0..PAGE, any::<u8>()), 0..20).prop_map(Change::Bytes),
        2 => vec((0_usize..3, 0_u8..2), 0..3).prop_map(Change::Bytes),
        1 => vec((0..PAGE, any::<u8>()), 200..600).prop_map(Change::Bytes),
        2 => (0_u64..6).prop_map(Change::Noise),
        2 => (0_u64..3).prop_map(Change::Text),
    ]
}

fn encoding() -> impl Strategy<Value = Encoding> {
    prop_oneof![
        Just(Encoding::Raw),
        Just(Encoding::Lz4),
        Just(Encoding::Delta),
    ]
}

/// Pages of a batch: which base, which pages of it become what, how they travel, and whether those
/// that go as they are are kept.
type BatchSpec = (usize, Vec<(u64, Change)>, Encoding, bool);

fn batch() -> impl Strategy<Value = BatchSpec> {
    let pages = vec((0_u64..64, change()), 1..30);
    (0..BASES.len(), pages, encoding(), any::<bool>())
}

fn rounds() -> impl Strategy<Value = Vec<(bool, Vec<BatchSpec>)>> {
    vec((any::<bool>(), vec(batch(), 1..4)), 1..6)
}

/// Pages in a row, as runs.
fn runs(mut pages: Vec<u64>) -> Vec<PageRun> {
    pages.sort_unstable();
    pages.dedup();
    let mut runs: Vec<PageRun> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.end().0 == page => run.count += 1,
            _ => runs.extend(PageRun::new(PageIndex(page), 1)),
        }
    }
    runs
}

/// A source's memory and encoder, and the bytes that they make.
struct Sender {
    memory: FakeMemory,
    encoder: Encoder,
    wire: Vec<u8>,
}

impl Sender {
    fn new(cache_pages: u64) -> Self {
        Self {
            memory: FakeMemory::with_regions(regions()),
            encoder: Encoder::new(cache_pages * 4096),
            wire: Vec::new(),
        }
    }

    fn send(&mut self, (base, changes, encoding, keep): &BatchSpec) {
        let (base, count) = BASES[*base];
        let mut pages = Vec::new();
        for (offset, change) in changes {
            let page = base + offset % count;
            change.apply(&self.memory, PageIndex(page));
            pages.push(page);
        }
        let is_hole = |page: &u64| self.memory.page(PageIndex(*page)).is_none();
        let (holes, pages) = pages.into_iter().partition::<Vec<_>, _>(is_hole);
        let (pages, holes) = (runs(pages), runs(holes));
        let bytes = pages.iter().map(PageRun::bytes).sum::<u64>();
        let mut contents = vec![0; usize::try_from(bytes).expect("small")];
        let mut rest = contents.as_mut_slice();
        for run in &pages {
            let length = usize::try_from(run.bytes()).expect("small");
            let (target, after) = rest.split_at_mut(length);
            self.memory.read(*run, target).expect("guest memory");
            rest = after;
        }
        let (base, pages) = (PageIndex(base), (&*pages, &*contents));
        self.encoder.keep_raw(*keep);
        let (_, raw) = self
            .encoder
            .encode(base, pages, &holes, *encoding, &mut self.wire);
        for range in raw {
            self.wire.extend_from_slice(&contents[range]);
        }
    }

    fn run(&mut self, rounds: &[(bool, Vec<BatchSpec>)]) {
        for ((remember, batches), number) in rounds.iter().zip(1..) {
            self.encoder.begin_round(number, *remember);
            for batch in batches {
                self.send(batch);
            }
        }
    }
}

/// Takes frames of pages until the bytes end or one is bad.
fn take(from: &mut impl Read, store: &FakeMemory) -> Result<(), String> {
    let (mut decoder, mut reader) = (Decoder::new(&regions()), FrameReader::default());
    let mut payload = Vec::new();
    loop {
        match reader.read(from, &mut payload) {
            Ok(FrameKind::Pages) => {}
            Ok(other) => return Err(format!("{other:?}")),
            Err(FrameError::Closed) => return Ok(()),
            Err(error) => return Err(error.to_string()),
        }
        let decoded = decoder.decode(&payload, (&mut reader, from), store);
        decoded.map_err(|error| error.to_string())?;
    }
}

/// Nothing but guest memory was touched.
fn check_inside(store: &FakeMemory) {
    let inside = |page: &PageIndex| {
        let mut regions = REGIONS.iter();
        regions.any(|(start, count)| (*start..start + count).contains(&page.0))
    };
    assert!(store.touched().iter().all(inside));
}

/// Hands bytes out in pieces of these sizes; 0 is a timeout, 1 an interruption first.
struct Chopped<'a> {
    bytes: &'a [u8],
    sizes: std::iter::Cycle<std::slice::Iter<'a, usize>>,
    interrupted: bool,
}

impl<'a> Chopped<'a> {
    fn new(bytes: &'a [u8], sizes: &'a [usize]) -> Self {
        Self {
            bytes,
            sizes: sizes.iter().cycle(),
            interrupted: false,
        }
    }
}

impl Read for Chopped<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let size = *self.sizes.next().expect("a cycle");
        self.interrupted = size == 1 && !self.interrupted;
        match size {
            0 => Err(ErrorKind::TimedOut.into()),
            _ if self.interrupted => Err(ErrorKind::Interrupted.into()),
            size => {
                let count = size.min(buf.len());
                self.bytes.read(&mut buf[..count])
            }
        }
    }
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn what_is_encoded_is_decoded(cache_pages in 0_u64..40, rounds in rounds()) {
        let mut sender = Sender::new(cache_pages);
        sender.run(&rounds);
        prop_assert!(sender.encoder.cache_bytes() <= cache_pages * 4096);
        let store = FakeMemory::with_regions(regions());
        let taken = take(&mut Cursor::new(&sender.wire), &store);
        prop_assert_eq!(taken, Ok(()));
        prop_assert_eq!(sender.memory.first_difference(&store), None);
        // Pages that were zeroes or holes all the time are holes there.
        for page in store.touched() {
            let batches = rounds.iter().flat_map(|(_, batches)| batches);
            let named = batches.flat_map(|(base, changes, ..)| {
                let (base, count) = BASES[*base];
                changes.iter().map(move |(offset, change)| (base + offset % count, change))
            });
            let filled = named
                .filter(|(named, _)| *named == page.0)
                .any(|(_, change)| !matches!(change, Change::Zero | Change::Hole | Change::Same));
            prop_assert!(filled, "{:?} was a hole", page);
        }
    }

    #[test]
    fn a_delta_makes_the_new_page_and_is_never_long(first in change(), second in change()) {
        let memory = FakeMemory::new(1);
        let page = |change: &Change| {
            change.apply(&memory, PageIndex(0));
            let bytes = memory.page(PageIndex(0)).unwrap_or_else(|| vec![0; PAGE]);
            <[u8; PAGE]>::try_from(bytes).expect("a page")
        };
        let (mut old, new) = (page(&first), page(&second));
        let mut out = b"before".to_vec();
        if delta::encode(&old, &new, &mut out) {
            prop_assert!(out.len() - 6 <= delta::MAX_DELTA_BYTES);
            delta::apply(&mut old, &out[6..]).expect("our own");
            prop_assert!(old == new);
            prop_assert_eq!(&out[..6], b"before");
        } else {
            prop_assert_eq!(&out, b"before");
            let changed = old.iter().zip(&new).filter(|(a, b)| a != b).count();
            prop_assert!(changed > delta::MAX_DELTA_BYTES / 6, "only {} bytes changed", changed);
        }
    }

    #[test]
    fn a_delta_of_any_bytes_fits_or_is_refused(bytes in vec(any::<u8>(), 0..60)) {
        let mut page = [0; PAGE];
        let _ = delta::apply(&mut page, &bytes);
    }

    #[test]
    fn any_payload_is_taken_or_refused(
        payload in vec(any::<u8>(), 0..400),
        raw in vec(any::<u8>(), 0..100),
    ) {
        let store = FakeMemory::with_regions(regions());
        let (mut decoder, mut reader) = (Decoder::new(&regions()), FrameReader::default());
        let from = (&mut reader, &mut Cursor::new(raw));
        let _ = decoder.decode(&payload, from, &store);
        check_inside(&store);
    }

    /// Changed after its check sum was found right, as a liar would.
    #[test]
    fn a_valid_payload_that_was_changed_is_taken_or_refused(
        batch in batch(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        shortened: bool,
    ) {
        let mut sender = Sender::new(64);
        sender.encoder.begin_round(1, true);
        sender.send(&batch);
        sender.send(&batch);
        let mut reader = FrameReader::default();
        let mut from = Cursor::new(&sender.wire);
        let mut payload = Vec::new();
        reader.read(&mut from, &mut payload).expect("our own");
        let table = payload.len().min(80);
        for (at, byte) in changes {
            // Mostly the table, where it hurts.
            payload[at.index(table)] = byte;
        }
        if shortened {
            payload.truncate(cut.index(payload.len()));
        }
        let store = FakeMemory::with_regions(regions());
        let mut decoder = Decoder::new(&regions());
        let _ = decoder.decode(&payload, (&mut reader, &mut from), &store);
        check_inside(&store);
    }

    #[test]
    fn any_split_of_the_stream_gives_the_same_frames(
        lengths in vec(0_usize..3000, 1..6),
        sizes in vec(prop_oneof![0..2_usize, 1..40_usize, 1000..100_000_usize], 1..20)
            .prop_filter("some progress", |sizes| sizes.iter().any(|size| *size > 1)),
    ) {
        let messages: Vec<_> = lengths
            .iter()
            .map(|length| Message::Section(migration::Section {
                id: format!("disk{length}"),
                kind: "fake".to_owned(),
                version: 1,
                bytes: vec![0x5a; *length],
            }))
            .collect();
        let frames: Vec<_> = messages.iter().map(|m| m.encode().expect("short")).collect();
        let wire = frames.concat();
        let mut from = Chopped::new(&wire, &sizes);
        let mut reader = FrameReader::default();
        let mut got = Vec::new();
        loop {
            match Message::receive(&mut reader, &mut from) {
                Ok(message) => got.push(message),
                Err(error) if error.is_timeout() => {}
                Err(FrameError::Closed) => break,
                Err(error) => return Err(TestCaseError::fail(error.to_string())),
            }
        }
        prop_assert_eq!(got, messages);
    }

    #[test]
    fn any_stream_of_bytes_ends_in_an_error_or_at_its_end(
        bytes in vec(any::<u8>(), 0..300),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ours: bool,
    ) {
        let mut wire = match ours {
            true => Message::Accept.encode().expect("short"),
            false => Vec::new(),
        };
        wire.extend_from_slice(&bytes);
        for (at, byte) in flips {
            if !wire.is_empty() {
                let at = at.index(wire.len());
                wire[at] ^= byte;
            }
        }
        let mut from = Cursor::new(wire);
        let mut reader = FrameReader::default();
        while Message::receive(&mut reader, &mut from).is_ok() {}
    }
}

#[test]
fn a_batch_across_the_end_of_a_region_is_refused() {
    // Region 0 ends at page 100.
    let batch = migration::wire::Batch {
        base: PageIndex(64),
        runs: vec![migration::wire::BatchRun {
            kind: migration::wire::PageKind::Zero,
            start: 30,
            count: 10,
        }],
        blocks: Vec::new(),
        raw_crc: 0,
    };
    let mut payload = Vec::new();
    batch.encode(&mut payload);
    let store = FakeMemory::with_regions(regions());
    let (mut decoder, mut reader) = (Decoder::new(&regions()), FrameReader::default());
    let from = (&mut reader, &mut io::empty());
    let refused = decoder.decode(&payload, from, &store).unwrap_err();
    assert!(refused.to_string().contains("94 to 104"), "{refused}");
}
