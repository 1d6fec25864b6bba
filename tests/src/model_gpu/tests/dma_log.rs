//! What the device writes to guest memory is known by its log, through Drover's own client.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use drover_guest::gpu::{BAR_REGISTERS, COMMAND_BYTES, Command, FENCE_WRITE, control, registers};
use vfio::user::UserFunction;
use vfio::{DmaLog, RegionIndex, VfioBackend};

use super::driver::{DATA, MEMORY, MEMORY_BYTES, MIB, RING_SIZE, Stand};
use super::migration::{connect, guest_memory};
use crate::model_gpu::DmaLogging;

const PAGE: u64 = 4096;
const PAGES: u64 = MEMORY_BYTES / PAGE;
const FENCE: u64 = 0x8000;
const REGISTERS: RegionIndex = RegionIndex::Bar(BAR_REGISTERS);
const LIMIT: Duration = Duration::from_secs(60);
/// Of results, many steps long.
const RESULT_BYTES: u64 = 2 * MIB;

type Page = [u8; 4096];

/// A device at work in memory that has its ring.
struct Work<'s> {
    function: UserFunction,
    memory: File,
    tail: u32,
    fence: u64,
    _stand: &'s Stand,
}

impl<'s> Work<'s> {
    fn new(stand: &'s Stand) -> Self {
        let memory = guest_memory();
        let function = connect(stand, &memory);
        let work = Self {
            function,
            memory,
            tail: 0,
            fence: 0,
            _stand: stand,
        };
        // Memory space and bus master.
        let config = RegionIndex::Config;
        work.function.write(config, 4, &[6, 0]).unwrap();
        work.enable();
        work
    }

    fn enable(&self) {
        let base = MEMORY.to_le_bytes();
        let function = &self.function;
        function
            .write(REGISTERS, registers::RING_BASE, &base)
            .unwrap();
        self.set(registers::RING_SIZE, RING_SIZE);
        self.set(registers::CONTROL, control::ENABLE);
    }

    fn set(&self, offset: u64, value: u32) {
        let written = self.function.write(REGISTERS, offset, &value.to_le_bytes());
        written.unwrap();
    }

    fn log(&self) -> &dyn DmaLog {
        self.function.dma_log().expect("it logs")
    }

    fn start(&self) {
        self.log().start(&[(MEMORY, MEMORY_BYTES)]).unwrap();
    }

    /// Has commands carried out, and a fence behind them.
    fn submit(&mut self, commands: &[Command]) {
        self.fence += 1;
        let fence = Command::Fence {
            address: MEMORY + FENCE,
            value: self.fence,
            flags: FENCE_WRITE,
        };
        for command in commands.iter().chain([&fence]) {
            let place = u64::from(self.tail) * COMMAND_BYTES as u64;
            self.memory.write_all_at(&command.encode(), place).unwrap();
            self.tail = (self.tail + 1) % RING_SIZE;
        }
        self.set(registers::RING_TAIL, self.tail);
    }

    /// Whether the last fence's value is in memory.
    fn is_done(&self) -> bool {
        let mut value = [0; 8];
        self.memory.read_exact_at(&mut value, FENCE).unwrap();
        u64::from_le_bytes(value) == self.fence
    }

    fn run(&mut self, commands: &[Command]) {
        self.submit(commands);
        let deadline = Instant::now() + LIMIT;
        while !self.is_done() {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::yield_now();
        }
    }

    /// The pages that were written, as the log tells it.
    fn reported(&self) -> BTreeSet<u64> {
        let mut bitmap = vec![0; usize::try_from(PAGES / 64).unwrap()];
        let reported = self.log().report(MEMORY, MEMORY_BYTES, &mut bitmap);
        reported.unwrap();
        let is_set = |page: &u64| {
            let page = usize::try_from(*page).unwrap();
            bitmap[page / 64] >> (page % 64) & 1 == 1
        };
        (0..PAGES).filter(is_set).collect()
    }

    /// All of memory but the ring, which is the driver's.
    fn pages(&self) -> Vec<Page> {
        let mut bytes = vec![0; usize::try_from(MEMORY_BYTES).unwrap()];
        self.memory.read_exact_at(&mut bytes, 0).unwrap();
        let mut pages = bytes.as_chunks().0.to_vec();
        pages[0].fill(0);
        pages
    }
}

/// Random words in video memory, out to `at` in guest memory.
fn results(at: u64, len: u64, seed: u64) -> [Command; 2] {
    [
        Command::Compute {
            offset: 0,
            len,
            seed,
            rounds: 2,
        },
        Command::CopyOut {
            offset: 0,
            len,
            address: MEMORY + at,
        },
    ]
}

fn changed(before: &[Page], after: &[Page]) -> BTreeSet<u64> {
    let pages = (0..).zip(before.iter().zip(after));
    let changed = pages.filter(|(_, (before, after))| before != after);
    changed.map(|(page, _)| page).collect()
}

fn of_range(start: u64, end: u64) -> impl Iterator<Item = u64> {
    start / PAGE..end.div_ceil(PAGE)
}

#[test]
fn each_page_that_a_computation_changes_is_in_a_report() {
    let stand = Stand::new();
    let mut work = Work::new(&stand);
    // Before the log nothing counts.
    work.run(&results(DATA, 3 * PAGE, 1));
    work.start();
    assert!(work.reported().is_empty());
    let before = work.pages();
    // Not from the beginning of a page, and to the middle of one.
    let start = DATA + 24;
    work.submit(&results(start, RESULT_BYTES, 2));
    let (mut reported, deadline) = (BTreeSet::new(), Instant::now() + LIMIT);
    loop {
        // What is seen as done before a report is asked for is in that one or in an earlier one.
        let (is_done, now) = (work.is_done(), work.pages());
        reported.extend(work.reported());
        let changed = changed(&before, &now);
        let lost: Vec<_> = changed.difference(&reported).collect();
        assert!(lost.is_empty(), "{lost:?} are lost");
        if is_done {
            break;
        }
        assert!(Instant::now() < deadline, "it does not end");
    }
    let expected = of_range(FENCE, FENCE + 8).chain(of_range(start, start + RESULT_BYTES));
    assert_eq!(reported, expected.collect());
    assert!(work.reported().is_empty(), "reported twice");
    // The same page again.
    work.run(&[]);
    assert_eq!(work.reported(), of_range(FENCE, FENCE + 8).collect());
    work.run(&[]);
    work.log().stop().unwrap();
    assert!(work.log().report(MEMORY, PAGE, &mut [0]).is_err());
    work.run(&results(DATA, PAGE, 3));
    work.start();
    assert!(work.reported().is_empty(), "of while it was off");
}

#[test]
fn only_what_is_asked_for_is_reported_and_forgotten() {
    let stand = Stand::new();
    let mut work = Work::new(&stand);
    let at = |page: u64| MEMORY + DATA + page * PAGE;
    let ranges = [(at(10), 10 * PAGE), (at(30), PAGE)];
    work.log().start(&ranges).unwrap();
    work.run(&results(DATA, 40 * PAGE, 1));
    let mut bitmap = [0];
    work.log().report(at(12), 2 * PAGE, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0b11]);
    let mut bitmap = [0];
    work.log().report(at(0), 40 * PAGE, &mut bitmap).unwrap();
    assert_eq!(bitmap, [(0x3ff << 10) & !(0b11 << 12) | (1 << 30)]);
    let mut bitmap = [0];
    work.log().report(at(0), 40 * PAGE, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0]);
}

/// As a mapping does: whoever resets a device need not look whether it logs.
#[test]
fn a_reset_leaves_the_log_on() {
    let stand = Stand::new();
    let mut work = Work::new(&stand);
    work.start();
    work.run(&results(DATA, PAGE, 1));
    work.function.reset().unwrap();
    work.function
        .write(RegionIndex::Config, 4, &[6, 0])
        .unwrap();
    work.enable();
    work.tail = 0;
    work.run(&[]);
    let expected = of_range(FENCE, FENCE + 8).chain(of_range(DATA, DATA + PAGE));
    assert_eq!(work.reported(), expected.collect());
}

#[test]
fn the_next_client_has_no_log() {
    let stand = Stand::new();
    let work = Work::new(&stand);
    work.start();
    drop(work);
    let mut work = Work::new(&stand);
    work.start();
    assert!(work.reported().is_empty());
    work.run(&[]);
    assert_eq!(work.reported().len(), 1);
}

#[test]
fn a_device_without_a_log_says_so() {
    let stand = Stand::with(MIB, DmaLogging::Off);
    let mut work = Work::new(&stand);
    assert!(work.function.dma_log().is_none());
    assert!(work.function.migration().is_some());
    work.run(&results(DATA, PAGE, 1));
}

/// So that a test of who relies on the log can see that it fails without.
#[test]
fn a_log_that_loses_writes_loses_them() {
    let stand = Stand::with(4 * MIB, DmaLogging::Lossy);
    let mut work = Work::new(&stand);
    work.start();
    let before = work.pages();
    work.run(&results(DATA, RESULT_BYTES, 1));
    let changed = changed(&before, &work.pages());
    let kept = changed.iter().copied().filter(|page| page % 2 == 0);
    assert_eq!(work.reported(), kept.collect());
}

/// What Drover's client would not send.
#[test]
fn nonsense_is_refused() {
    use rustix::io::Errno;

    use crate::model_gpu::dma_log::Log;
    use crate::model_gpu::wire::Fields;

    const START: u32 = 1 << 17 | 6;
    const REPORT: u32 = 1 << 16 | 8;
    let mut log = Log::new(DmaLogging::On);
    let mut ask = |flags, words: &[u64], room| {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        log.answer(room, flags, Fields::new(&body)).map(drop)
    };
    for (words, errno) in [
        (&[PAGE][..], Errno::INVAL),
        (&[0, 1, 0, PAGE], Errno::INVAL),
        (&[PAGE, 257], Errno::TOOBIG),
        (&[PAGE, 1, 0], Errno::INVAL),
        (&[PAGE, 1, 0, 0], Errno::INVAL),
        (&[PAGE, 1, 1, PAGE], Errno::INVAL),
        (&[PAGE, 1, PAGE, u64::MAX - 1], Errno::OVERFLOW),
        (&[PAGE, 2, 0, 2 * PAGE, PAGE, PAGE], Errno::INVAL),
        (&[PAGE, 1, 0, PAGE, 0], Errno::INVAL),
    ] {
        assert_eq!(ask(START, words, 4096), Err(errno), "{words:x?}");
    }
    assert_eq!(ask(REPORT, &[0, PAGE, PAGE], 4096), Err(Errno::INVAL));
    assert_eq!(ask(1 << 17 | 7, &[], 4096), Err(Errno::INVAL));
    // All addresses.
    ask(START, &[1 << 30, 0], 4096).unwrap();
    assert_eq!(ask(START, &[PAGE, 0], 4096), Err(Errno::INVAL), "twice");
    for (words, errno) in [
        (&[0, PAGE][..], Errno::INVAL),
        (&[0, PAGE, 0], Errno::INVAL),
        (&[0, PAGE, 2048], Errno::INVAL),
        (&[0, PAGE, 3 * PAGE], Errno::INVAL),
        (&[8, PAGE, PAGE], Errno::INVAL),
        (&[PAGE, u64::MAX - PAGE + 1, PAGE], Errno::OVERFLOW),
        (&[0, 1 << 40, PAGE], Errno::TOOBIG),
        (&[0, 65 * PAGE, PAGE], Errno::TOOBIG),
    ] {
        assert_eq!(ask(REPORT, words, 40), Err(errno), "{words:x?}");
    }
    ask(REPORT, &[0, 64 * PAGE, PAGE], 40).unwrap();
    ask(REPORT, &[0, 1 << 40, 1 << 34], 40).unwrap();
}
