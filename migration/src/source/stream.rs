//! A data connection: reads pages, encodes and sends them.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use super::devices::Devices;
use super::frames::{Outgoing, read_runs, runs_of};
use super::options::{EncodingChoice, SourceError};
use super::pacer::Pacer;
use super::plan::{RoundPlan, Task};
use crate::bitmap::DirtyBitmap;
use crate::codec::{Adaptive, BATCH_BYTES, BatchFacts, Encoder, Encoding};
use crate::page::{PageIndex, PageRun};
use crate::ports::{Channel, DirectPages, DirtyTracker, PageStore};
use crate::progress::{MigrationHandle, PageMix};
use crate::wire::Message;
use crate::wire::batch::BATCH_PAGES;

/// Pages that are re-armed at once, and always travel on the same connection.
pub(super) const CHUNK_PAGES: u64 = 512;

/// Frames are collected up to this size before they are written.
const FLUSH_BYTES: usize = 128 << 10;

/// How long a connection's thread waits until it looks again at what is not confirmed yet: at first
/// and at most.
const SETTLE_PAUSE_MIN: Duration = Duration::from_micros(50);
const SETTLE_PAUSE_MAX: Duration = Duration::from_millis(5);

/// Counts of all connections, for whoever watches.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) wire_bytes: AtomicU64,
    /// Of that, device states that come as streams.
    pub(super) device_bytes: AtomicU64,
    pub(super) zero: AtomicU64,
    pub(super) raw: AtomicU64,
    pub(super) lz4: AtomicU64,
    pub(super) delta: AtomicU64,
    /// Memory that holds pages sent before, and the most there was.
    cache_bytes: AtomicU64,
    most_cache_bytes: AtomicU64,
    /// Batches, and those among them that met a connection without room.
    pub(super) batches: AtomicU64,
    pub(super) congested: AtomicU64,
    /// Pages of the round that were looked at.
    pub(super) done_pages: AtomicU64,
    /// How long the connection that was longest at it has been sending in this round.
    pub(super) sending_us: AtomicU64,
}

impl Totals {
    pub(super) fn count(&self, pages: &PageMix) {
        for (total, count) in [
            (&self.zero, pages.zero),
            (&self.raw, pages.raw),
            (&self.lz4, pages.lz4),
            (&self.delta, pages.delta),
        ] {
            total.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// A connection holds `after` bytes of pages instead of `before`.
    fn note_cache(&self, before: u64, after: u64) {
        if before == after {
            return;
        }
        // Wraps where it is less, and so does the sum.
        let change = after.wrapping_sub(before);
        let sum = self.cache_bytes.fetch_add(change, Ordering::Relaxed);
        let sum = sum.wrapping_add(change);
        self.most_cache_bytes.fetch_max(sum, Ordering::Relaxed);
    }

    pub(super) fn cache_bytes(&self) -> u64 {
        self.cache_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn most_cache_bytes(&self) -> u64 {
        self.most_cache_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn mix(&self) -> PageMix {
        PageMix {
            zero: self.zero.load(Ordering::Relaxed),
            raw: self.raw.load(Ordering::Relaxed),
            lz4: self.lz4.load(Ordering::Relaxed),
            delta: self.delta.load(Ordering::Relaxed),
        }
    }
}

/// What all data connections share.
pub(super) struct Shared<'a> {
    pub(super) pages: &'a dyn PageStore,
    /// The same for sockets, when the destination takes live pages.
    pub(super) direct: Option<&'a dyn DirectPages>,
    pub(super) tracker: &'a dyn DirtyTracker,
    pub(super) handle: &'a MigrationHandle,
    pub(super) pacer: &'a Pacer<'a>,
    pub(super) devices: &'a Devices,
    pub(super) totals: Totals,
    pub(super) streams: u64,
    pub(super) encoding: EncodingChoice,
    pub(super) cache_bytes: u64,
}

impl Shared<'_> {
    /// The chunks that travel on connection `index`, each with the number of its region.
    pub(super) fn share_of(
        &self,
        index: u64,
        regions: &[PageRun],
    ) -> impl Iterator<Item = (usize, PageRun)> {
        let chunks = regions.iter().enumerate().flat_map(|(region, run)| {
            let (start, end) = (run.start.0, run.end().0);
            (0..run.count.div_ceil(CHUNK_PAGES)).map(move |number| {
                let start = start + number * CHUNK_PAGES;
                let count = CHUNK_PAGES.min(end - start);
                let start = PageIndex(start);
                (region, PageRun { start, count })
            })
        });
        let streams = usize::try_from(self.streams).unwrap_or(1).max(1);
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        chunks.skip(index).step_by(streams)
    }
}

/// The connection's number, and what has become of a round.
pub(super) type StreamResult = (u64, Result<(), SourceError>);

/// A data connection and what it remembers.
pub(super) struct Stream<'a> {
    pub(super) shared: &'a Shared<'a>,
    index: u64,
    pub(super) channel: Box<dyn Channel>,
    encoder: Encoder,
    /// Pages that the destination has as something else than zeroes, by region.
    sent: Vec<DirtyBitmap>,
    /// Contents of the batch's pages; never gets shorter, so that it is not cleared each time.
    buffer: Vec<u8>,
    /// Frames that are not written yet.
    pub(super) out: Vec<u8>,
    adaptive: Adaptive,
    /// Whether the bandwidth limit held up the last write.
    pub(super) was_paced: bool,
    /// How long it has been sending in this round.
    sending: Duration,
    /// Whether it has carried device state: what of that is lost with it cannot be read again.
    pub(super) has_carried: bool,
}

impl<'a> Stream<'a> {
    /// One in the place of another that broke: nothing is known of what came of that.
    pub(super) fn again(shared: &'a Shared<'a>, index: u64, channel: Box<dyn Channel>) -> Self {
        let mut stream = Self::new(shared, index, channel);
        stream.sent.iter_mut().for_each(DirtyBitmap::fill);
        stream
    }

    pub(super) fn new(shared: &'a Shared<'a>, index: u64, channel: Box<dyn Channel>) -> Self {
        let regions = shared.pages.regions();
        let bitmap = |region: &PageRun| DirtyBitmap::new(region.start, region.count);
        Self {
            shared,
            index,
            channel,
            encoder: Encoder::new(shared.cache_bytes / shared.streams),
            sent: regions.iter().map(bitmap).collect(),
            buffer: vec![0; BATCH_BYTES],
            out: Vec::with_capacity(2 * FLUSH_BYTES),
            adaptive: Adaptive::default(),
            was_paced: false,
            sending: Duration::ZERO,
            has_carried: false,
        }
    }

    /// The connection's number.
    pub(super) fn index(&self) -> u64 {
        self.index
    }

    /// Serves rounds until the sender is dropped or one fails.
    pub(super) fn run(mut self, orders: &Receiver<Task>, results: &Sender<StreamResult>) {
        while let Ok(task) = orders.recv() {
            let result = match &task {
                Task::Round(plan) => self.round(plan),
                Task::Settle(patience) => self.settle(*patience),
            };
            let result = result.map_err(|error| self.as_lost(error));
            let failed = result.is_err();
            if failed {
                let totals = &self.shared.totals;
                totals.note_cache(self.encoder.cache_bytes(), 0);
            }
            // Plans are dropped before the coordinator goes on: it reuses their memory.
            drop(task);
            if results.send((self.index, result)).is_err() || failed {
                return;
            }
        }
    }

    fn round(&mut self, plan: &RoundPlan) -> Result<(), SourceError> {
        let remember = plan.remember && self.shared.encoding != EncodingChoice::Raw;
        self.encoder.begin_round(plan.number, remember);
        self.adaptive.begin_round();
        self.sending = Duration::ZERO;
        let regions = self.shared.pages.regions();
        for (region, chunk) in self.shared.share_of(self.index, &regions) {
            if let Some(dirty) = plan.dirty.get(region) {
                self.chunk(plan, region, dirty, chunk)?;
            }
        }
        self.send_devices()?;
        if plan.last {
            let end = Message::StreamEnd.encode()?;
            self.out.extend_from_slice(&end);
        }
        self.write(&[])?;
        self.channel.flush()?;
        let sending = u64::try_from(self.sending.as_micros()).unwrap_or(u64::MAX);
        let longest = &self.shared.totals.sending_us;
        longest.fetch_max(sending, Ordering::Relaxed);
        Ok(())
    }

    /// Sends a batch without pages, so that there is something to be confirmed, and waits until all
    /// is. The kernel tells nobody when that happens.
    fn settle(&mut self, patience: Duration) -> Result<(), SourceError> {
        self.encoder
            .encode_live(PageIndex(0), &[], &[], &mut self.out);
        self.write(&[])?;
        self.channel.flush()?;
        let (mut least, mut since) = (usize::MAX, Instant::now());
        let mut pause = SETTLE_PAUSE_MIN;
        loop {
            let left = self.channel.unconfirmed_bytes()?;
            if left == 0 {
                return Ok(());
            }
            if left < least {
                (least, since) = (left, Instant::now());
            } else if since.elapsed() >= patience {
                let text = format!("{left} bytes have not come to the destination's host in time");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text).into());
            }
            std::thread::sleep(pause);
            pause = SETTLE_PAUSE_MAX.min(pause * 2);
        }
    }

    fn chunk(
        &mut self,
        plan: &RoundPlan,
        region: usize,
        dirty: &DirtyBitmap,
        chunk: PageRun,
    ) -> Result<(), SourceError> {
        let wanted: u64 = dirty.runs_within(chunk).map(|run| run.count).sum();
        if wanted == 0 {
            return Ok(());
        }
        if self.shared.handle.is_cancelled() && plan.running {
            return Err(SourceError::Cancelled);
        }
        if plan.running {
            self.shared.tracker.rearm(chunk)?;
        }
        let mut data = DirtyBitmap::new(chunk.start, chunk.count);
        for run in self.shared.pages.data_runs(chunk)? {
            data.insert(run);
        }
        let whole = if plan.whole { u64::MAX } else { 0 };
        let mut start = chunk.start.0;
        let mut unsent = 0;
        while start < chunk.end().0 {
            let base = PageIndex(start);
            let sent = self.sent.get(region);
            let sent_word = sent.map_or(0, |sent| sent.word_at(base));
            let (dirty, data) = (dirty.word_at(base), data.word_at(base));
            let (pages, zeroes) = (dirty & data, dirty & !data & (sent_word | whole));
            let is_cut = plan.running && plan.cut.is_made();
            if is_cut {
                unsent += u64::from(dirty.count_ones());
            }
            if pages | zeroes == 0 {
                // A hole that was never sent is one there, too. A write to it from now on is
                // marked: it is re-armed, whether the round is cut or not.
            } else if is_cut {
                plan.cut.note(&plan.dirty, region, (base, pages | zeroes));
            } else {
                if let Some(sent) = self.sent.get_mut(region) {
                    sent.set_word_at(base, (sent_word | pages) & !zeroes);
                }
                self.batch(plan, base, (pages, zeroes))?;
                // Of both in turn, so that neither waits for the end of the other.
                if let Some(part) = self.shared.devices.try_take() {
                    self.send_part(part)?;
                }
            }
            start += BATCH_PAGES;
        }
        let done = &self.shared.totals.done_pages;
        done.fetch_add(wanted - unsent, Ordering::Relaxed);
        Ok(())
    }

    fn batch(
        &mut self,
        plan: &RoundPlan,
        base: PageIndex,
        (pages, zeroes): (u64, u64),
    ) -> Result<(), SourceError> {
        let begin = Instant::now();
        let runs: Vec<_> = runs_of(base, pages).collect();
        let is_known = self.encoder.knows_any(&runs);
        let encoding = match self.choose(is_known) {
            Encoding::Delta if plan.whole => Encoding::Lz4,
            encoding => encoding,
        };
        let cached = self.encoder.cache_bytes();
        let direct = self
            .shared
            .direct
            .filter(|_| self.channel.socket().is_some());
        let sent = match direct {
            Some(direct) if self.goes_live(encoding, is_known) => {
                self.send_live(direct, base, (pages, zeroes))
            }
            _ => self.send_copied(encoding, (base, &runs), zeroes),
        };
        let totals = &self.shared.totals;
        totals.note_cache(cached, self.encoder.cache_bytes());
        let counts = sent?;
        totals.count(&counts);
        let page_bytes = |pages: u64| pages * crate::PAGE_BYTES;
        self.adaptive.note(&BatchFacts {
            bytes: page_bytes(counts.raw + counts.lz4 + counts.delta),
            delta_bytes: page_bytes(counts.delta),
            elapsed: begin.elapsed(),
        });
        Ok(())
    }

    /// Whether nothing is to be done with pages but sending them.
    fn goes_live(&mut self, encoding: Encoding, is_known: bool) -> bool {
        if self.encoder.keeps_raw() {
            return false;
        }
        match (encoding, self.shared.encoding) {
            (Encoding::Raw, _) => true,
            (Encoding::Lz4 | Encoding::Delta, EncodingChoice::Auto) => {
                !is_known && self.encoder.expects_nothing()
            }
            _ => false,
        }
    }

    /// Pages as they are found at one moment, which are then encoded.
    fn send_copied(
        &mut self,
        encoding: Encoding,
        (base, runs): (PageIndex, &[PageRun]),
        zeroes: u64,
    ) -> Result<PageMix, SourceError> {
        let zeroes: Vec<_> = runs_of(base, zeroes).collect();
        let bytes: u64 = runs.iter().map(PageRun::bytes).sum();
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let buffer = self.buffer.get_mut(..bytes).unwrap_or_default();
        read_runs(self.shared.pages, runs, buffer)?;
        let (counts, raw) = self.encoder.encode(
            base,
            (runs, self.buffer.get(..bytes).unwrap_or_default()),
            &zeroes,
            encoding,
            &mut self.out,
        );
        if !raw.is_empty() || self.out.len() >= FLUSH_BYTES {
            self.write(&raw)?;
        }
        Ok(counts)
    }

    /// Pages straight out of memory, but for those that are zeroes.
    fn send_live(
        &mut self,
        direct: &dyn DirectPages,
        base: PageIndex,
        (mut pages, mut zeroes): (u64, u64),
    ) -> Result<PageMix, SourceError> {
        for run in runs_of(base, pages) {
            let found = direct.zeroes(run)? << (run.start.0 - base.0);
            pages &= !found;
            zeroes |= found;
        }
        let live: Vec<_> = runs_of(base, pages).collect();
        let zeroes: Vec<_> = runs_of(base, zeroes).collect();
        let counts = self
            .encoder
            .encode_live(base, &live, &zeroes, &mut self.out);
        match self.channel.socket() {
            Some(socket) if !live.is_empty() => {
                let bytes = self.out.len() + pages.count_ones() as usize * crate::codec::PAGE;
                let begin = Instant::now();
                self.was_paced = self.shared.pacer.take(bytes);
                direct.send(&self.out, &live, socket)?;
                self.written(bytes, begin);
            }
            _ if self.out.len() >= FLUSH_BYTES => self.write(&[])?,
            _ => {}
        }
        Ok(counts)
    }

    /// How the next batch travels.
    fn choose(&mut self, is_known: bool) -> Encoding {
        // A limit that was asked for is as good a reason as a slow link.
        let congested = self.was_paced || self.channel.is_congested();
        let totals = &self.shared.totals;
        totals.batches.fetch_add(1, Ordering::Relaxed);
        if congested {
            totals.congested.fetch_add(1, Ordering::Relaxed);
        }
        match self.shared.encoding {
            EncodingChoice::Raw => Encoding::Raw,
            EncodingChoice::Lz4 => Encoding::Lz4,
            EncodingChoice::Delta => Encoding::Delta,
            EncodingChoice::Auto => {
                let encoding = self.adaptive.choose(congested, is_known);
                self.encoder.keep_raw(self.adaptive.keeps());
                encoding
            }
        }
    }

    /// Writes the collected frames and then these parts of the buffer.
    pub(super) fn write(&mut self, raw: &[Range<usize>]) -> io::Result<()> {
        let outgoing = Outgoing::new(&self.out, &self.buffer, raw);
        let (bytes, begin) = (outgoing.bytes(), Instant::now());
        self.was_paced = self.shared.pacer.take(bytes);
        outgoing.write(&mut *self.channel)?;
        self.written(bytes, begin);
        Ok(())
    }

    /// All collected frames have gone, in so many bytes and since then.
    pub(super) fn written(&mut self, bytes: usize, begin: Instant) {
        self.sending += begin.elapsed();
        let total = &self.shared.totals.wire_bytes;
        total.fetch_add(bytes as u64, Ordering::Relaxed);
        self.out.clear();
    }
}
