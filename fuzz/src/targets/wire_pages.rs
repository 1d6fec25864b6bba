//! Frames of pages, which become guest memory.

use std::io::{Cursor, Read};

use migration::codec::Decoder;
use migration::ports::PageStore;
use migration::testing::FakeMemory;
use migration::wire::batch::{BATCH_PAGES, Batch, PageKind};
use migration::wire::frame::{FrameHeader, FrameKind, HEADER_BYTES};
use migration::wire::{FrameReader, Message};
use migration::{PageIndex, PageRun};

use crate::chain;
use crate::input::{Input, Script};
use crate::peer::PAGE_FRAMES;

/// As much as the golden files fill, and a second region, so that there is a gap.
const REGIONS: [(u64, u64); 2] = [(0x100, 70), (0x200, 30)];

const PAGE: usize = 4096;

/// Payloads with their lengths in front; first of each the byte that its raw pages are made of.
pub fn run(data: &[u8]) {
    let run = |(start, count)| PageRun::new(PageIndex(start), count).expect("a run");
    let regions = REGIONS.map(run);
    let store = FakeMemory::with_regions(regions.to_vec());
    let mut decoder = Decoder::new(&regions);
    let mut input = Input::new(data);
    while !input.is_empty() {
        let (raw, length) = (input.u8(), input.u16());
        let mut payload = input.take(length.into()).to_vec();
        let pages = fit_check_sum(&mut payload, raw);
        let mut reader = FrameReader::default();
        let mut from = Cursor::new(vec![raw; pages * PAGE]);
        let decoded = decoder.decode(&payload, (&mut reader, &mut from), &store);
        match decoded {
            Ok(count) => {
                assert!(count <= BATCH_PAGES, "{count} pages in a batch");
                let mut left = Vec::new();
                from.read_to_end(&mut left).expect("in memory");
                assert!(left.is_empty(), "raw pages were left");
            }
            Err(error) => {
                assert!(!chain(&error).is_empty());
                break;
            }
        }
    }
    for page in store.touched() {
        let inside = |region: &PageRun| (region.start..region.end()).contains(&page);
        assert!(store.regions().iter().any(inside), "{page:?} was written");
    }
}

/// Makes the raw pages' check sum right, which no mutation would; returns how many there are.
fn fit_check_sum(payload: &mut [u8], raw: u8) -> usize {
    let batch = match Batch::decode(payload) {
        Ok((batch, _)) => batch,
        Err(_) => return 0,
    };
    let pages = batch.pages_of(PageKind::Raw);
    // Any kind's header has the check sum.
    let header = FrameHeader::of(FrameKind::Section, &vec![raw; pages * PAGE]);
    let crc = header.expect("64 pages").payload_crc;
    payload[12..16].copy_from_slice(&crc.to_le_bytes());
    batch.pages_behind()
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut all = Script::new();
    let mut seeds = Vec::new();
    for golden in PAGE_FRAMES {
        let mut payload = Vec::new();
        let mut from = Cursor::new(golden);
        let kind = FrameReader::default().read(&mut from, &mut payload);
        assert_eq!(kind.ok(), Some(FrameKind::Pages));
        let length = u16::try_from(payload.len()).expect("a short seed");
        all = all.u8(7).u16(length).bytes(&payload);
        seeds.push(Script::new().u8(7).u16(length).bytes(&payload).done());
    }
    let end = Message::StreamEnd.encode().expect("short");
    let cut = Script::new().u8(0).u16(9).bytes(&end[..HEADER_BYTES]);
    seeds.extend([all.done(), cut.done()]);
    seeds
}
