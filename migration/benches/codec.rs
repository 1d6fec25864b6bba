//! How fast pages are encoded and decoded, as a share of what copying them takes: 1.0 would mean
//! that the codec costs nothing beyond the copy.
//!
//! `cargo bench -p migration`. The best of several rounds, so that other work on the machine
//! matters little.

#![expect(clippy::cast_possible_truncation, reason = "constants of this file")]

use std::hint::black_box;
use std::sync::Mutex;
use std::time::Instant;

use migration::codec::{Decoder, Encoder, Encoding};
use migration::ports::{PageStore, PortError};
use migration::wire::FrameReader;
use migration::wire::frame::FrameKind;
use migration::{PageIndex, PageRun};

const BATCH_PAGES: u64 = 64;
const PAGE: usize = 4096;
const BATCH_BYTES: usize = 64 * PAGE;

/// 64 MiB: past the caches, as guest memory is.
const BATCHES: u64 = 256;
const ROUNDS: usize = 20;

/// Bytes per nanosecond of the best of several rounds.
fn rate(mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        work();
        best = best.min(begin.elapsed().as_secs_f64());
    }
    BATCHES as f64 * BATCH_BYTES as f64 / best / 1e9
}

/// Memory as plain as can be, from page 0.
struct FlatMemory(Mutex<Vec<u8>>);

impl FlatMemory {
    fn new(pages: u64) -> Self {
        Self(Mutex::new(vec![0; pages as usize * PAGE]))
    }
}

impl PageStore for FlatMemory {
    fn regions(&self) -> Vec<PageRun> {
        let pages = self.0.lock().expect("one thread").len() / PAGE;
        PageRun::new(PageIndex(0), pages as u64)
            .into_iter()
            .collect()
    }

    fn data_runs(&self, run: PageRun) -> Result<Vec<PageRun>, PortError> {
        Ok(vec![run])
    }

    fn read(&self, run: PageRun, buf: &mut [u8]) -> Result<(), PortError> {
        let start = run.start.0 as usize * PAGE;
        let bytes = self.0.lock().expect("one thread");
        buf.copy_from_slice(&bytes[start..start + buf.len()]);
        Ok(())
    }

    fn write(&self, run: PageRun, buf: &[u8]) -> Result<(), PortError> {
        let start = run.start.0 as usize * PAGE;
        let mut bytes = self.0.lock().expect("one thread");
        bytes[start..start + buf.len()].copy_from_slice(buf);
        Ok(())
    }
}

fn incompressible(seed: u64, page: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
}

/// Words of a small vocabulary, as text compresses.
fn text(seed: u64, page: &mut [u8]) {
    let words = [
        "memory ", "page ", "the ", "guest ", "of ", "dirty ", "round ", "0x7f ",
    ];
    let mut state = seed | 1;
    let mut at = 0;
    while at < page.len() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let word = words[(state >> 60) as usize % words.len()].as_bytes();
        let count = word.len().min(page.len() - at);
        page[at..at + count].copy_from_slice(&word[..count]);
        at += count;
    }
}

fn memory(fill: fn(u64, &mut [u8])) -> Vec<u8> {
    let mut bytes = vec![0; BATCHES as usize * BATCH_BYTES];
    for (page, seed) in bytes.chunks_mut(PAGE).zip(1..) {
        fill(seed, page);
    }
    bytes
}

fn batch_run(batch: u64) -> PageRun {
    PageRun::new(PageIndex(batch * BATCH_PAGES), BATCH_PAGES).expect("64 pages")
}

/// Encodes all batches, calling `frame` with each frame and its raw pages.
fn encode(
    encoder: &mut Encoder,
    source: &[u8],
    encoding: Encoding,
    mut frame: impl FnMut(&[u8], &[u8]),
) {
    let mut buffer = vec![0; BATCH_BYTES];
    let mut out = Vec::new();
    let mut raw_bytes = Vec::new();
    for (batch, pages) in (0..BATCHES).zip(source.chunks(BATCH_BYTES)) {
        buffer.copy_from_slice(pages);
        let run = batch_run(batch);
        out.clear();
        let (_, raw) = encoder.encode(run.start, (&[run], &buffer), &[], encoding, &mut out);
        raw_bytes.clear();
        for range in raw {
            raw_bytes.extend_from_slice(&buffer[range]);
        }
        frame(&out, &raw_bytes);
    }
}

fn encode_rate(encoder: &mut Encoder, source: &[u8], encoding: Encoding) -> f64 {
    let mut buffer = vec![0; BATCH_BYTES];
    let mut out = Vec::new();
    rate(|| {
        for (batch, pages) in (0..BATCHES).zip(source.chunks(BATCH_BYTES)) {
            buffer.copy_from_slice(pages);
            let run = batch_run(batch);
            out.clear();
            black_box(encoder.encode(run.start, (&[run], &buffer), &[], encoding, &mut out));
        }
    })
}

fn main() {
    let random = memory(incompressible);
    let words = memory(text);
    let zeroes = vec![0; random.len()];
    let mut target = vec![0; BATCH_BYTES];
    let copy = rate(|| {
        for pages in random.chunks(BATCH_BYTES) {
            target.copy_from_slice(pages);
            black_box(&target);
        }
    });
    println!("copy into a buffer in the cache: {copy:.2} GB/s; the rates below as shares of it");
    let cases = [
        ("raw, incompressible", &random, Encoding::Raw),
        ("raw, zero pages", &zeroes, Encoding::Raw),
        ("lz4, incompressible", &random, Encoding::Lz4),
        ("lz4, text", &words, Encoding::Lz4),
    ];
    for (name, source, encoding) in cases {
        let share = encode_rate(&mut Encoder::new(0), source, encoding) / copy;
        println!("encode {name:22} {share:5.2}  {:6.2} GB/s", share * copy);
    }
    let mut changed = random.clone();
    for (page, number) in changed.chunks_mut(PAGE).zip(0_usize..) {
        page[number % PAGE] ^= 1;
    }
    let mut encoder = Encoder::new(1 << 30);
    encoder.begin_round(1, true);
    let mut flip = false;
    encode(&mut encoder, &random, Encoding::Delta, |_, _| {});
    let delta = rate(|| {
        flip = !flip;
        let source = if flip { &changed } else { &random };
        encode(&mut encoder, source, Encoding::Delta, |frame, _| {
            black_box(frame);
        });
    });
    println!(
        "encode delta, a byte per page    {:5.2}  {delta:6.2} GB/s",
        delta / copy
    );
    for (name, source, encoding) in [
        ("raw", &random, Encoding::Raw),
        ("lz4, text", &words, Encoding::Lz4),
    ] {
        let mut stream = Vec::new();
        encode(&mut Encoder::new(0), source, encoding, |frame, raw| {
            stream.extend_from_slice(frame);
            stream.extend_from_slice(raw);
        });
        let store = FlatMemory::new(BATCHES * BATCH_PAGES);
        let regions = store.regions();
        let decode = rate(|| {
            let mut from = stream.as_slice();
            let (mut reader, mut payload) = (FrameReader::default(), Vec::new());
            let mut decoder = Decoder::new(&regions);
            for _ in 0..BATCHES {
                let kind = reader.read(&mut from, &mut payload).expect("whole frames");
                assert_eq!(kind, FrameKind::Pages);
                decoder
                    .decode(&payload, (&mut reader, &mut from), &store)
                    .expect("valid frames");
            }
        });
        println!("decode {name:22} {:5.2}  {decode:6.2} GB/s", decode / copy);
    }
}
