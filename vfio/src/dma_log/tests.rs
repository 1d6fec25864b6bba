//! Logs of devices with larger pages and fewer ranges than asked for.

use proptest::prelude::*;

use super::*;

const K: u64 = PAGE_BYTES;

/// A device that logs by pages of its own.
struct Model {
    page_bytes: u64,
    ranges_max: usize,
    report_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    spans: Vec<Span>,
    /// Its own pages that were written.
    written: BTreeSet<u64>,
    is_broken: bool,
    reports: Vec<Span>,
}

impl Model {
    fn new(page_bytes: u64) -> Self {
        Self {
            page_bytes,
            ranges_max: usize::MAX,
            report_bytes: u64::MAX,
            state: Mutex::default(),
        }
    }

    fn write(&self, address: u64) {
        let mut state = self.state.lock();
        let is_logged = |span: &Span| (span.start..span.end).contains(&address);
        if state.spans.iter().any(is_logged) {
            state.written.insert(address / self.page_bytes);
        }
    }
}

impl LoggingDevice for Model {
    fn start(&self, spans: &[Span]) -> Result<u64, BackendError> {
        let apart = spans.windows(2).all(|pair| pair[0].end < pair[1].start);
        assert!(apart && !spans.is_empty(), "{spans:x?}");
        if spans.len() > self.ranges_max {
            let source = io::Error::from_raw_os_error(libc::E2BIG);
            return Err(BackendError::Refused { what: "", source });
        }
        self.state.lock().spans = spans.to_vec();
        Ok(self.page_bytes)
    }

    fn stop(&self) -> Result<(), BackendError> {
        *self.state.lock() = State::default();
        Ok(())
    }

    /// As drivers do that clear a whole page of theirs with any part of it.
    fn report(&self, span: Span, bitmap: &mut [u64], _: Instant) -> Result<(), BackendError> {
        let mut state = self.state.lock();
        if state.is_broken {
            return Err(BackendError::Absent("mind"));
        }
        let logged = state.spans.iter();
        let mut logged = logged.filter(|logged| logged.start <= span.start);
        assert!(logged.any(|logged| span.end <= logged.end), "{span:x?}");
        assert!(span.bytes() <= self.report_bytes.max(self.page_bytes));
        state.reports.push(span);
        let pages = span.start / self.page_bytes..span.end.div_ceil(self.page_bytes);
        for page in pages {
            if state.written.remove(&page) {
                let own = page * self.page_bytes / K..(page + 1) * self.page_bytes / K;
                for page in own {
                    set(bitmap, span, page * K);
                }
            }
        }
        Ok(())
    }

    fn report_bytes(&self) -> u64 {
        self.report_bytes
    }
}

/// The pages that a report has.
fn reported(log: &PagedLog<Model>, iova: u64, bytes: u64) -> Vec<u64> {
    let span = Span::new(iova, bytes).unwrap();
    let mut bitmap = vec![0; span.words()];
    log.report(iova, bytes, &mut bitmap).unwrap();
    pages(span, &bitmap).collect()
}

#[test]
fn each_written_page_is_reported_once() {
    let log = PagedLog::new(Model::new(K));
    log.start(&[(0x10 * K, 0x100 * K)]).unwrap();
    for page in [0x0f, 0x10, 0x4f, 0x50, 0x10f, 0x110] {
        log.device.write(page * K + 5);
    }
    let all = [0x10, 0x4f, 0x50, 0x10f].map(|page| page * K);
    assert_eq!(reported(&log, 0, 0x200 * K), all);
    assert!(reported(&log, 0, 0x200 * K).is_empty());
    log.device.write(0x50 * K);
    assert!(reported(&log, 0x51 * K, K).is_empty());
    assert_eq!(reported(&log, 0x50 * K, K), [0x50 * K]);
    log.device.write(0x50 * K);
    log.stop().unwrap();
    log.stop().unwrap();
    log.start(&[(0x10 * K, 0x100 * K)]).unwrap();
    assert!(reported(&log, 0, 0x200 * K).is_empty(), "of before");
}

#[test]
fn bits_are_only_set() {
    let log = PagedLog::new(Model::new(K));
    log.start(&[(0, 64 * K)]).unwrap();
    log.device.write(3 * K);
    let mut bitmap = [1 << 60, 0xff];
    log.report(0, 64 * K, &mut bitmap).unwrap();
    assert_eq!(bitmap, [(1 << 60) | (1 << 3), 0xff]);
}

#[test]
fn what_is_beside_on_a_larger_page_is_reported_later() {
    let log = PagedLog::new(Model::new(4 * K));
    // It begins and ends in the middle of such pages.
    log.start(&[(2 * K, 12 * K)]).unwrap();
    log.device.write(2 * K);
    log.device.write(9 * K);
    assert_eq!(reported(&log, 3 * K, K), [3 * K]);
    assert_eq!(reported(&log, 8 * K, K), [8 * K]);
    let rest = [2, 9, 10, 11].map(|page| page * K);
    assert_eq!(reported(&log, 0, 64 * K), rest);
    assert!(reported(&log, 0, 64 * K).is_empty());
    for refused in [3 * K / 2, LOGGED_PAGE_MAX * 2] {
        let log = PagedLog::new(Model::new(refused.max(K)));
        assert!(log.start(&[(0, K)]).is_err(), "{refused}");
        assert!(log.device.state.lock().spans.is_empty(), "it logs");
        let report = log.report(0, K, &mut [0]);
        assert!(matches!(report, Err(BackendError::Absent(_))));
    }
}

#[test]
fn devices_that_hold_few_ranges_log_what_is_between() {
    let many = |count: u64| (0..count).map(|n| (n * n * 2 * K, K)).collect::<Vec<_>>();
    for (ranges_max, count, held) in [
        (usize::MAX, 200, 200),
        (usize::MAX, 1000, RANGES_MAX),
        (100, 200, 1),
    ] {
        let model = Model {
            ranges_max,
            ..Model::new(K)
        };
        let log = PagedLog::new(model);
        let ranges = many(count);
        log.start(&ranges).unwrap();
        assert_eq!(log.device.state.lock().spans.len(), held);
        for (start, _) in &ranges {
            log.device.write(*start);
        }
        let starts: Vec<_> = ranges.iter().map(|(start, _)| *start).collect();
        let end = starts[starts.len() - 1] + K;
        assert_eq!(reported(&log, 0, end), starts);
    }
    // Those that touch are one.
    let log = PagedLog::new(Model::new(K));
    log.start(&[(4 * K, K), (0, 2 * K), (5 * K, 0), (K, 2 * K), (5 * K, K)])
        .unwrap();
    let spans = log.device.state.lock().spans.clone();
    let span = |start, end| Span { start, end };
    assert_eq!(spans, [span(0, 3 * K), span(4 * K, 6 * K)]);
}

#[test]
fn reports_are_no_longer_than_the_device_takes() {
    let model = Model {
        report_bytes: 10 * K,
        ..Model::new(4 * K)
    };
    let log = PagedLog::new(model);
    log.start(&[(2 * K, 30 * K)]).unwrap();
    log.device.write(31 * K);
    assert_eq!(reported(&log, 5 * K, 27 * K).len(), 4);
    let reports = log.device.state.lock().reports.clone();
    let ends = [12, 20, 28, 32].map(|page| page * K);
    assert_eq!(reports[0].start, 4 * K);
    assert_eq!(
        reports.iter().map(|span| span.end).collect::<Vec<_>>(),
        ends
    );
}

/// Such a device forgets of a whole page what it reports of a part.
#[test]
fn no_page_of_a_device_is_of_two_ranges() {
    let log = PagedLog::new(Model::new(8 * K));
    log.start(&[(0, 3 * K), (5 * K, K), (8 * K, 5 * K), (15 * K, 2 * K)])
        .unwrap();
    let spans = log.device.state.lock().spans.clone();
    let expected = [(0, 6 * K), (8 * K, 17 * K)].map(|(start, end)| Span { start, end });
    assert_eq!(spans, expected);
    log.device.write(5 * K);
    assert!(reported(&log, 0, 3 * K).contains(&0));
    assert!(reported(&log, 3 * K, 3 * K).contains(&(5 * K)));
}

#[test]
fn a_log_that_failed_is_of_no_use_until_it_is_started_again() {
    let log = PagedLog::new(Model::new(K));
    log.start(&[(0, K)]).unwrap();
    log.device.state.lock().is_broken = true;
    assert!(log.report(0, K, &mut [0]).is_err());
    log.device.state.lock().is_broken = false;
    let again = log.report(0, K, &mut [0]).unwrap_err();
    assert_eq!(
        again.to_string(),
        "the device has no log of DMA that is whole"
    );
    log.stop().unwrap();
    log.start(&[(0, K)]).unwrap();
    log.report(0, K, &mut [0]).unwrap();
}

#[test]
fn nonsense_is_refused() {
    let log = PagedLog::new(Model::new(K));
    for ranges in [
        &[][..],
        &[(0, 0)],
        &[(1, K)],
        &[(0, K + 1)],
        &[(0, K), (u64::MAX - K + 1, K)],
    ] {
        assert!(log.start(ranges).is_err(), "{ranges:x?}");
    }
    let absent = log.report(0, K, &mut [0]).unwrap_err();
    assert_eq!(
        absent.to_string(),
        "the device has no log of DMA that is on"
    );
    log.start(&[(0, K)]).unwrap();
    assert!(log.start(&[(0, K)]).is_err(), "twice");
    for (iova, bytes, words) in [
        (1, K, 1),
        (0, 1, 1),
        (0, 65 * K, 1),
        (u64::MAX - K + 1, K, 1),
        (0, u64::MAX - K + 1, 1),
    ] {
        let report = log.report(iova, bytes, &mut vec![0; words]);
        assert!(matches!(report, Err(BackendError::Refused { .. })));
    }
    log.report(0, K, &mut [0]).unwrap();
    log.report(0, 0, &mut []).unwrap();
}

proptest! {
    /// Whatever is written and asked for: no write is lost, and nothing is reported that is on no page of
    /// the device's that was written.
    #[test]
    fn no_write_is_lost(
        page_order in 0_u32..4,
        report_pages in 1_u64..40,
        ranges_max in 1_usize..4,
        ranges in prop::collection::vec((0_u64..200, 1_u64..50), 1..6),
        steps in prop::collection::vec((0_u64..250, 0_u64..100, any::<bool>()), 1..60),
    ) {
        let model = Model {
            report_bytes: report_pages * K,
            ranges_max,
            ..Model::new(K << page_order)
        };
        let log = PagedLog::new(model);
        let ranges: Vec<_> = ranges.iter().map(|(start, len)| (start * K, len * K)).collect();
        log.start(&ranges).unwrap();
        let is_asked = |page: u64| ranges.iter().any(|(start, len)| (*start..start + len).contains(&page));
        let (mut unread, mut ever) = (BTreeSet::new(), BTreeSet::new());
        let last = (0, 400, false);
        for (page, count, is_write) in steps.into_iter().chain([last]) {
            if is_write {
                log.device.write(page * K);
                ever.insert(page >> page_order);
                if is_asked(page * K) {
                    unread.insert(page * K);
                }
                continue;
            }
            let pages = reported(&log, page * K, count * K);
            for page in &pages {
                prop_assert!(ever.contains(&((page / K) >> page_order)), "{page:x}");
            }
            let (from, to) = (page * K, (page + count) * K);
            let due: Vec<u64> = unread.range(from..to).copied().collect();
            for page in due {
                unread.remove(&page);
                prop_assert!(pages.contains(&page), "{page:x} is lost");
            }
        }
        prop_assert!(unread.is_empty());
        prop_assert!(reported(&log, 0, 400 * K).is_empty());
    }
}
