//! Which pages of guest memory a device has written, by a log that the device itself keeps
//! (`VFIO_DEVICE_FEATURE_DMA_LOGGING_*` of include/uapi/linux/vfio.h).
//!
//! Devices differ in how many ranges they log and in how large the pages are by which they do. `PagedLog`
//! hides both: it gives a device fewer and larger ranges where it must, asks it for whole pages of its own,
//! and keeps what it hears of pages that nobody has asked for yet.

use std::collections::BTreeSet;
use std::io;
use std::time::Instant;

use parking_lot::Mutex;

use crate::backend::BackendError;
use crate::dma::PAGE_BYTES;

#[cfg(test)]
mod tests;

/// Ranges that every device's driver is given: as many as the kernel takes from everybody, those that fit
/// into a page.
const RANGES_MAX: usize = 256;
/// Bytes of the largest pages by which a device may log.
const LOGGED_PAGE_MAX: u64 = 1 << 30;
/// Pages in a word of a bitmap, and their bytes.
const PAGES_PER_WORD: u64 = 64;
const WORD_SPANS: usize = 64 * 4096;
const _: () = assert!(WORD_SPANS as u64 == PAGES_PER_WORD * PAGE_BYTES);

/// A device's log of its writes to guest memory.
///
/// A write is in the first report that is asked for after it, or in a later one; in none but while the log
/// is on. When [`DmaLog::report`] fails, the log is of no use any more: all that the device can reach counts
/// as written, and the log has to be stopped and started to be read again. What a reset leaves of it is the
/// device's own choice, so whoever resets one that logs does the same.
pub trait DmaLog: Send + Sync {
    /// Logs writes to `ranges` from now on: first address (IOVA) and bytes, whole pages of 4 KiB, any number,
    /// which may touch and overlap. A device that holds fewer of them logs larger ones; one that logs by
    /// larger pages reports more than was written, never less.
    ///
    /// # Errors
    /// [`BackendError`]; it logs nothing then. One is that it logs already.
    fn start(&self, ranges: &[(u64, u64)]) -> Result<(), BackendError>;

    /// Ends that; what was not reported is forgotten. Nothing if it does not log.
    ///
    /// # Errors
    /// [`BackendError`]; it can be asked again.
    fn stop(&self) -> Result<(), BackendError>;

    /// Sets the bits of the pages of 4 KiB, from `iova` on and `bytes` long, that were written since they
    /// were last reported, or since the start; these are clean afterwards. Bit `n % 64` of word `n / 64`
    /// is page `n`. Bits are only ever set; where ranges were made one, those between them, too.
    ///
    /// Some servers (libvfio-user) answer for ranges only that were mapped as one.
    ///
    /// # Errors
    /// [`BackendError`]: the log is of no use any more, unless it is off or the range or bitmap cannot be.
    fn report(&self, iova: u64, bytes: u64, bitmap: &mut [u64]) -> Result<(), BackendError>;
}

/// Addresses from `start` to before `end`, whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Span {
    fn new(start: u64, bytes: u64) -> Result<Self, BackendError> {
        let is_paged = start.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
        let end = start.checked_add(bytes).filter(|_| is_paged);
        let end = end.ok_or_else(|| refused("log DMA to what is no range of whole pages"))?;
        Ok(Self { start, end })
    }

    pub(crate) fn bytes(self) -> u64 {
        self.end - self.start
    }

    /// Words of its bitmap.
    pub(crate) fn words(self) -> usize {
        let pages = self.bytes() / PAGE_BYTES;
        usize::try_from(pages.div_ceil(PAGES_PER_WORD)).unwrap_or(usize::MAX)
    }
}

/// What a device does of it.
pub(crate) trait LoggingDevice: Send + Sync {
    /// Logs writes to ranges that are apart from each other; returns the bytes of its pages.
    fn start(&self, spans: &[Span]) -> Result<u64, BackendError>;

    fn stop(&self) -> Result<(), BackendError>;

    /// Sets the bits of pages of 4 KiB that were written, in a bitmap of [`Span::words`], and no others; as a
    /// part of what was asked for at `begun`.
    fn report(&self, span: Span, bitmap: &mut [u64], begun: Instant) -> Result<(), BackendError>;

    /// Bytes that it reports at once.
    fn report_bytes(&self) -> u64;
}

/// The log of a device.
pub(crate) struct PagedLog<D> {
    device: D,
    started: Mutex<Option<Started>>,
}

struct Started {
    /// What the device logs.
    spans: Vec<Span>,
    /// By pages of so many bytes.
    page_bytes: u64,
    /// Pages of 4 KiB that it has reported beside those that were asked for.
    beside: BTreeSet<u64>,
    is_corrupt: bool,
}

impl<D: LoggingDevice> PagedLog<D> {
    pub(crate) fn new(device: D) -> Self {
        let started = Mutex::new(None);
        Self { device, started }
    }

    /// Has the device log these ranges, or fewer that cover them; returns those and the bytes of its pages.
    fn start_device(&self, mut spans: Vec<Span>) -> Result<(Vec<Span>, u64), BackendError> {
        loop {
            let outcome = match self.device.start(&spans) {
                // It may be that these are more than it holds.
                Err(BackendError::Refused { .. }) if spans.len() > 1 => {
                    spans = at_most(1, &spans);
                    self.device.start(&spans)
                }
                outcome => outcome,
            };
            let page_bytes = outcome?.max(PAGE_BYTES);
            if !page_bytes.is_power_of_two() || page_bytes > LOGGED_PAGE_MAX {
                self.device.stop()?;
                return Err(BackendError::Absent("log of DMA by pages of up to 1 GiB"));
            }
            // To report a part of a page of its own may clear all of it: no page may be of two ranges.
            let closed = closed(&spans, |span, next| {
                next.start / page_bytes <= (span.end - 1) / page_bytes
            });
            if closed.len() == spans.len() {
                return Ok((spans, page_bytes));
            }
            self.device.stop()?;
            spans = closed;
        }
    }

    /// Reads the log of a range, and of what is beside it on the device's own pages.
    fn read(&self, log: &mut Started, asked: Span, bitmap: &mut [u64]) -> Result<(), BackendError> {
        let (page_bytes, begun) = (log.page_bytes, Instant::now());
        let at_once = self.device.report_bytes() / page_bytes * page_bytes;
        let at_once = at_once.max(page_bytes);
        let logged = log.spans.iter().copied();
        for logged in logged.filter(|logged| logged.start < asked.end && asked.start < logged.end) {
            let first = asked.start.max(logged.start);
            let last = asked.end.min(logged.end);
            let end = last.checked_next_multiple_of(page_bytes);
            let end = end.unwrap_or(u64::MAX).min(logged.end);
            let mut start = (first - first % page_bytes).max(logged.start);
            while start < end {
                let next = (start - start % page_bytes).saturating_add(at_once);
                let part = Span {
                    start,
                    end: next.min(end),
                };
                let mut bits = vec![0; part.words()];
                self.device.report(part, &mut bits, begun)?;
                for page in pages(part, &bits) {
                    if !set(bitmap, asked, page) {
                        log.beside.insert(page);
                    }
                }
                start = part.end;
            }
        }
        let mut later = log.beside.split_off(&asked.start);
        log.beside.append(&mut later.split_off(&asked.end));
        for page in later {
            set(bitmap, asked, page);
        }
        Ok(())
    }
}

impl<D: LoggingDevice> DmaLog for PagedLog<D> {
    fn start(&self, ranges: &[(u64, u64)]) -> Result<(), BackendError> {
        let mut started = self.started.lock();
        if started.is_some() {
            return Err(refused("log DMA while it logs"));
        }
        let spans = merged(ranges)?;
        if spans.is_empty() {
            return Err(refused("log DMA to nothing"));
        }
        let (spans, page_bytes) = self.start_device(at_most(RANGES_MAX, &spans))?;
        *started = Some(Started {
            spans,
            page_bytes,
            beside: BTreeSet::new(),
            is_corrupt: false,
        });
        Ok(())
    }

    fn stop(&self) -> Result<(), BackendError> {
        let mut started = self.started.lock();
        if started.is_some() {
            self.device.stop()?;
        }
        *started = None;
        Ok(())
    }

    fn report(&self, iova: u64, bytes: u64, bitmap: &mut [u64]) -> Result<(), BackendError> {
        let asked = Span::new(iova, bytes)?;
        if bitmap.len() < asked.words() {
            return Err(refused("report DMA into a bitmap that is too short"));
        }
        let mut started = self.started.lock();
        let log = started.as_mut();
        let log = log.ok_or(BackendError::Absent("log of DMA that is on"))?;
        if log.is_corrupt {
            return Err(BackendError::Absent("log of DMA that is whole"));
        }
        let read = self.read(log, asked, bitmap);
        log.is_corrupt = read.is_err();
        read
    }
}

fn refused(what: &'static str) -> BackendError {
    let source = io::ErrorKind::InvalidInput.into();
    BackendError::Refused { what, source }
}

/// Ascending, and apart from each other.
fn merged(ranges: &[(u64, u64)]) -> Result<Vec<Span>, BackendError> {
    let spans = ranges
        .iter()
        .map(|(start, bytes)| Span::new(*start, *bytes));
    let mut spans = spans.collect::<Result<Vec<_>, _>>()?;
    spans.retain(|span| span.start < span.end);
    spans.sort_unstable();
    spans.dedup_by(|next, span| {
        let touches = next.start <= span.end;
        if touches {
            span.end = span.end.max(next.end);
        }
        touches
    });
    Ok(spans)
}

/// No more than `most` that cover all of these: the smallest gaps are closed.
fn at_most(most: usize, spans: &[Span]) -> Vec<Span> {
    let gap = |pair: &[Span]| match pair {
        [span, next] => (next.start - span.end, next.start),
        _ => (0, 0),
    };
    let mut gaps: Vec<(u64, u64)> = spans.windows(2).map(gap).collect();
    gaps.sort_unstable();
    let smallest = gaps.iter().take(spans.len().saturating_sub(most));
    let smallest: BTreeSet<u64> = smallest.map(|(_, behind)| *behind).collect();
    closed(spans, |_, next| smallest.contains(&next.start))
}

/// The same with those gaps closed that are to be: of the range before and the range behind.
fn closed(spans: &[Span], is_closed: impl Fn(Span, Span) -> bool) -> Vec<Span> {
    let mut fewer: Vec<Span> = Vec::new();
    for next in spans {
        match fewer.last_mut().filter(|last| is_closed(**last, *next)) {
            Some(last) => last.end = next.end,
            None => fewer.push(*next),
        }
    }
    fewer
}

/// The pages of `span` whose bits are set.
fn pages(span: Span, bits: &[u64]) -> impl Iterator<Item = u64> {
    let words = (span.start..span.end).step_by(WORD_SPANS);
    words.zip(bits).flat_map(move |(first, word)| {
        let mut left = *word;
        let set = std::iter::from_fn(move || {
            let bit = (left != 0).then(|| left.trailing_zeros())?;
            left &= left - 1;
            Some(bit)
        });
        let page = move |bit| first.saturating_add(u64::from(bit) * PAGE_BYTES);
        set.map(page).take_while(move |page| *page < span.end)
    })
}

/// Sets the bit of a page; false if it is none of those that were asked for.
fn set(bitmap: &mut [u64], asked: Span, page: u64) -> bool {
    if !(asked.start..asked.end).contains(&page) {
        return false;
    }
    let number = (page - asked.start) / PAGE_BYTES;
    let word = usize::try_from(number / PAGES_PER_WORD).unwrap_or(usize::MAX);
    // There is room for all of them, which was checked.
    if let Some(word) = bitmap.get_mut(word) {
        *word |= 1 << (number % PAGES_PER_WORD);
    }
    true
}
