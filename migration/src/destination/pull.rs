//! Post-copy: pages that come after the machine has started, those first that somebody waits for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::stream::Stream;
use crate::bitmap::DirtyBitmap;
use crate::codec::{DecodeError, Decoder};
use crate::page::{PageIndex, PageRun};
use crate::ports::{Breaker, LazyMemory, PageStore, PortError};
use crate::wire::message::{Complete, Fetch};
use crate::wire::{FrameError, FrameKind, Message};

/// How often a wait looks whether it is still wanted.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// Memory while pages are missing.
pub(super) struct Missing {
    lazy: Arc<dyn LazyMemory>,
    runs: Vec<PageRun>,
    /// By region. Held while a page is placed: nobody may take one that is on its way for one that
    /// was never sent. One lock is held at a time.
    regions: Vec<Mutex<DirtyBitmap>>,
    left: AtomicU64,
    faults: AtomicU64,
    waited_us: AtomicU64,
    longest_us: AtomicU64,
}

fn lock(region: &Mutex<DirtyBitmap>) -> MutexGuard<'_, DirtyBitmap> {
    // A bitmap is whole after every statement.
    region.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Missing {
    pub(super) fn new(missing: Vec<DirtyBitmap>, lazy: Arc<dyn LazyMemory>) -> Self {
        let run = |bitmap: &DirtyBitmap| PageRun::new(bitmap.base(), bitmap.pages());
        Self {
            lazy,
            runs: missing.iter().filter_map(run).collect(),
            left: AtomicU64::new(missing.iter().map(DirtyBitmap::count).sum()),
            regions: missing.into_iter().map(Mutex::new).collect(),
            faults: AtomicU64::new(0),
            waited_us: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
        }
    }

    /// Pages that have not come yet.
    pub(super) fn left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    /// Lets everybody touch everything again.
    pub(super) fn complete(&self) -> Result<(), PortError> {
        self.lazy.complete()
    }

    /// What it was like for the guest.
    pub(super) fn summary(&self) -> Complete {
        Complete {
            faults: self.faults.load(Ordering::Relaxed),
            waited_us: self.waited_us.load(Ordering::Relaxed),
            longest_us: self.longest_us.load(Ordering::Relaxed),
        }
    }

    fn region(&self, run: PageRun) -> Result<MutexGuard<'_, DirtyBitmap>, PortError> {
        let holds = |(_, region): &(&Mutex<_>, &PageRun)| {
            region.start <= run.start && run.end() <= region.end()
        };
        let mut regions = self.regions.iter().zip(&self.runs);
        let region = regions.find(holds).map(|(region, _)| lock(region));
        region.ok_or(PortError::OutsideMemory {
            start: run.start.0,
            end: run.end().0,
        })
    }

    /// Whether a page that somebody waits for is to be fetched; if it was never sent, it is zeroes.
    fn is_to_be_fetched(&self, page: PageIndex) -> Result<bool, PortError> {
        let run = PageRun {
            start: page,
            count: 1,
        };
        let region = self.region(run)?;
        if region.contains(page) {
            return Ok(true);
        }
        self.lazy.place_zeroes(run)?;
        Ok(false)
    }

    fn note_fault(&self, waited: Duration) {
        let micros = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.waited_us.fetch_add(micros, Ordering::Relaxed);
        self.longest_us.fetch_max(micros, Ordering::Relaxed);
    }
}

/// As decoders see it: what is not missing any more is the guest's and stays as it is.
impl PageStore for Missing {
    fn regions(&self) -> Vec<PageRun> {
        self.runs.clone()
    }

    fn data_runs(&self, run: PageRun) -> Result<Vec<PageRun>, PortError> {
        Ok(vec![run])
    }

    /// Only changes against an older version need it, and there is none.
    fn read(&self, run: PageRun, _: &mut [u8]) -> Result<(), PortError> {
        Err(PortError::OutsideMemory {
            start: run.start.0,
            end: run.end().0,
        })
    }

    fn write(&self, run: PageRun, buf: &[u8]) -> Result<(), PortError> {
        let mut region = self.region(run)?;
        let wanted: Vec<_> = region.runs_within(run).collect();
        for part in wanted {
            let page = crate::codec::PAGE;
            let first = usize::try_from(part.start.0 - run.start.0).unwrap_or(usize::MAX);
            let count = usize::try_from(part.count).unwrap_or(usize::MAX);
            let bytes = buf.get(first * page..(first + count) * page);
            self.lazy.place(part, bytes.unwrap_or_default())?;
            region.remove(part);
            self.left.fetch_sub(part.count, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// The threads that bring pages, as the one who drives the hand-off sees them. Dropping it ends
/// them.
pub(super) struct Puller {
    /// They wait for this to begin.
    pub(super) orders: Vec<Sender<Arc<Missing>>>,
    pub(super) breakers: Vec<Arc<dyn Breaker>>,
    pub(super) stopped: Arc<AtomicBool>,
    /// Pages that come later, by region.
    pub(super) later: Vec<DirtyBitmap>,
}

impl Puller {
    /// Pages are placed from now on.
    pub(super) fn begin(&mut self, lazy: Arc<dyn LazyMemory>) -> Arc<Missing> {
        let missing = Arc::new(Missing::new(std::mem::take(&mut self.later), lazy));
        for order in self.orders.drain(..) {
            // A thread that has ended has said why.
            let _ = order.send(Arc::clone(&missing));
        }
        missing
    }

    /// Breaks every connection for pages off.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.breakers.iter().for_each(|breaker| breaker.break_off());
    }
}

impl Drop for Puller {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The connection for pages that are needed at once.
pub(super) struct Fetcher {
    stream: Stream,
    stopped: Arc<AtomicBool>,
    patience: Duration,
    /// Pages that were asked for, and since when somebody waits.
    asked: BTreeMap<PageIndex, Instant>,
    /// Answers that are on their way.
    expected: usize,
}

impl Fetcher {
    pub(super) fn new(stream: Stream, stopped: Arc<AtomicBool>, patience: Duration) -> Self {
        Self {
            stream,
            stopped,
            patience,
            asked: BTreeMap::new(),
            expected: 0,
        }
    }

    /// Fetches what somebody waits for, until it is stopped.
    pub(super) fn run(mut self, missing: &Missing) -> Result<(), DecodeError> {
        let result = self.serve(missing);
        match self.stopped.load(Ordering::SeqCst) {
            true => Ok(()),
            false => result,
        }
    }

    fn serve(&mut self, missing: &Missing) -> Result<(), DecodeError> {
        let mut decoder = Decoder::into_used(&missing.regions());
        let mut payload = Vec::new();
        while !self.stopped.load(Ordering::SeqCst) {
            let wait = if self.expected > 0 {
                Duration::ZERO
            } else {
                TICK
            };
            self.ask(missing, wait)?;
            if self.expected > 0 {
                self.take(missing, &mut decoder, &mut payload)?;
            }
        }
        Ok(())
    }

    /// Asks for everything that somebody waits for by now.
    fn ask(&mut self, missing: &Missing, wait: Duration) -> Result<(), DecodeError> {
        let mut frames = Vec::new();
        let mut wait = wait;
        while let Some(page) = missing.lazy.next_fault(wait)? {
            wait = Duration::ZERO;
            if self.asked.contains_key(&page) || !missing.is_to_be_fetched(page)? {
                continue;
            }
            self.asked.insert(page, Instant::now());
            self.expected += 1;
            let fetch = Fetch {
                page: page.0,
                count: 1,
            };
            let frame = Message::Fetch(fetch).encode().map_err(FrameError::from)?;
            frames.extend_from_slice(&frame);
        }
        if frames.is_empty() {
            return Ok(());
        }
        let channel = &mut self.stream.channel;
        let sent = channel.write_all(&frames).and_then(|()| channel.flush());
        Ok(sent.map_err(FrameError::from)?)
    }

    /// Takes one answer.
    fn take(
        &mut self,
        missing: &Missing,
        decoder: &mut Decoder,
        payload: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        let Stream { channel, reader } = &mut self.stream;
        let channel = &mut **channel;
        channel
            .set_timeout(self.patience)
            .map_err(FrameError::from)?;
        match reader.read(channel, payload)? {
            FrameKind::Pages => {
                decoder.decode(payload, (reader, channel), missing)?;
            }
            other => {
                let text = format!("{other:?} as an answer to Fetch");
                return Err(FrameError::Invalid(text).into());
            }
        }
        self.expected -= 1;
        self.asked.retain(|page, since| {
            let run = PageRun {
                start: *page,
                count: 1,
            };
            let waits = missing
                .region(run)
                .is_ok_and(|region| region.contains(*page));
            if !waits {
                missing.note_fault(since.elapsed());
            }
            waits
        });
        Ok(())
    }
}
