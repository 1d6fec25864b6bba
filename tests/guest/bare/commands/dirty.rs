//! `dirty`: write pages at a requested rate, remembering each page's last generation, and check them all.
//!
//! With `cpus=` other CPUs take their share of the range; the boot CPU also keeps the clock, the
//! heartbeat and the serial port. Those past `writers=` are as busy and write nothing.

use super::memory::{self, Verdict};
use super::{Context, Failure, Outcome, event};
use crate::clock::{self, Deadline};
use crate::smp::{self, Control};
use crate::{heartbeat, serial};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use drover_guest::heartbeat::State;
use drover_guest::line::Line;
use drover_guest::memmap::Regions;
use drover_guest::pacing::Pacer;
use drover_guest::pattern::{self, Mode, PAGE_SIZE};

/// Pages written between two looks at the clock.
const BATCH_PAGES: u64 = 64;
/// Between two looks at the serial port: each costs an exit or two.
const DEFAULT_POLL_MS: u64 = 20;

/// How pages are written, the same for all CPUs.
#[derive(Clone, Copy)]
struct Style {
    seed: u64,
    /// What the pages held before the first write; `None`: unknown.
    prefill: Option<Mode>,
    /// What a write writes.
    write: Mode,
    random: bool,
}

/// One CPU's share: its pages and their generations.
struct Share {
    style: Style,
    /// Page addresses come from here: `first..first + generations.len()` in the regions' page order.
    regions: Regions,
    first: u64,
    generations: Vec<u32>,
    pacer: Pacer,
    next: u64,
    random_state: u64,
    control: Arc<Control>,
}

impl Share {
    fn len(&self) -> u64 {
        self.generations.len() as u64
    }

    fn address(&self, index: u64) -> u64 {
        let mut left = (self.first + index) * PAGE_SIZE;
        for region in self.regions.as_slice() {
            if left < region.len {
                return region.base + left;
            }
            left -= region.len;
        }
        unreachable!("page {index} of a share lies outside its regions")
    }

    /// Writes what is due, at most a batch; returns the number of pages.
    fn step(&mut self) -> u64 {
        if self.len() == 0 {
            return 0;
        }
        let due = self.pacer.due(clock::now(), BATCH_PAGES);
        for _ in 0..due {
            let index = if self.style.random {
                self.random_state = self.random_state.wrapping_add(1);
                ((u128::from(pattern::mix(self.random_state)) * u128::from(self.len())) >> 64)
                    as u64
            } else {
                self.next = if self.next + 1 < self.len() {
                    self.next + 1
                } else {
                    0
                };
                self.next
            };
            self.touch(index);
        }
        self.control.done.fetch_add(due, Ordering::Relaxed);
        due
    }

    fn touch(&mut self, index: u64) {
        let address = self.address(index);
        let generation = &mut self.generations[index as usize];
        *generation += 1;
        let key = pattern::key(address / PAGE_SIZE, self.style.seed, u64::from(*generation));
        // SAFETY: free memory; shares do not overlap.
        pattern::fill(unsafe { memory::page(address) }, self.style.write, key);
    }

    fn fill_first(&self) {
        let Some(mode) = self.style.prefill else {
            return;
        };
        for index in 0..self.len() {
            let address = self.address(index);
            let key = pattern::key(address / PAGE_SIZE, self.style.seed, 0);
            // SAFETY: as in `touch`.
            pattern::fill(unsafe { memory::page(address) }, mode, key);
            if index % 256 == 0 {
                heartbeat::beat();
            }
        }
    }

    fn verify(&self, verdict: &mut Verdict) {
        for index in 0..self.len() {
            if let Some(good) = self.page_is_good(index) {
                verdict.note(self.address(index), good);
            }
            if index % 256 == 0 {
                heartbeat::beat();
            }
        }
    }

    /// `None` for a page whose content was never decided.
    fn page_is_good(&self, index: u64) -> Option<bool> {
        let address = self.address(index);
        let generation = u64::from(self.generations[index as usize]);
        let key = |generation| pattern::key(address / PAGE_SIZE, self.style.seed, generation);
        // SAFETY: as in `touch`; other CPUs have stopped.
        let page = unsafe { memory::page(address) };
        match (generation, self.style.prefill) {
            (0, None) => None,
            (0, Some(mode)) => Some(pattern::verify(page, mode, key(0))),
            (_, Some(mode)) if self.style.write == Mode::Sparse => {
                Some(pattern::verify_touched(page, mode, key(0), key(generation)))
            }
            _ => Some(pattern::verify(page, self.style.write, key(generation))),
        }
    }

    fn distinct(&self) -> u64 {
        self.generations
            .iter()
            .filter(|&&generation| generation != 0)
            .count() as u64
    }
}

/// What another CPU runs.
fn work(share: &mut Share) {
    while !share.control.stop.load(Ordering::Acquire) {
        if share.step() == 0 {
            core::hint::spin_loop();
        }
    }
}

/// `dirty base= dirty_len= rate_mib_s= write=few|full|incompressible|text prefill= order=seq|random
/// seconds= progress_ms= poll_ms= seed= cpus= writers=`.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let regions = memory::select(context, "dirty_len")?;
    let style = Style {
        seed: arguments.number("seed", 1)?,
        prefill: arguments.parsed("prefill", parse_prefill)?.flatten(),
        write: arguments
            .parsed("write", parse_write)?
            .unwrap_or(Mode::Sparse),
        random: arguments.parsed("order", parse_order)?.unwrap_or(false),
    };
    let pages_per_second = arguments.number("rate_mib_s", 100)? * 256;
    let cpus = arguments.number("cpus", 1)?.max(1);
    let writers = arguments.number("writers", cpus)?.clamp(1, cpus);
    let timing = Timing {
        end: Deadline::after_ms(arguments.number("seconds", 0)?.saturating_mul(1000)),
        progress_ms: arguments.number("progress_ms", 1000)?,
        poll_ms: arguments.number("poll_ms", DEFAULT_POLL_MS)?.max(1),
    };
    if clock::tsc_khz() == 0 {
        return Err(Failure::new("no-clock"));
    }
    let crew = smp::start(context.machine, arguments, cpus - 1)?;
    let mut shares = split(regions, style, pages_per_second / writers, (cpus, writers))?;
    for share in &mut shares {
        share.fill_first();
    }
    announce(context, &regions, cpus);
    // The clock starts after the first fill.
    let start = clock::now();
    for share in &mut shares {
        share.pacer = Pacer::new(pages_per_second / writers, clock::tsc_khz() * 1000, start);
    }
    let timing = Timing {
        end: timing.end.restarted(),
        ..timing
    };
    run_shares(context, &mut shares, &crew, &timing);
    let elapsed = clock::micros(clock::now() - start);
    let touches: u64 = shares
        .iter()
        .map(|share| share.control.done.load(Ordering::Relaxed))
        .sum();
    let verdict = verify(&shares);
    line.put("touches", touches).put("elapsed_us", elapsed);
    line.thousandths(
        "mib_s",
        (u128::from(touches) * 1_000_000_000 / 256 / u128::from(elapsed.max(1))) as u64,
    );
    line.put("pages", regions.total() / PAGE_SIZE)
        .put("distinct", shares.iter().map(Share::distinct).sum::<u64>());
    line.put("cpus", cpus).put("checked", verdict.pages);
    verdict.print_to(line);
    verdict.outcome()
}

#[derive(Clone, Copy)]
struct Timing {
    end: Deadline,
    progress_ms: u64,
    poll_ms: u64,
}

fn split(
    regions: Regions,
    style: Style,
    pages_per_second: u64,
    (cpus, writers): (u64, u64),
) -> Result<Vec<Share>, Failure> {
    let pages = regions.total() / PAGE_SIZE;
    if pages < writers {
        return Err(Failure::new("not-enough-memory").with("pages", pages));
    }
    let mut shares = Vec::new();
    for cpu in 0..cpus {
        let part = |cpu: u64| pages * cpu.min(writers) / writers;
        let (first, end) = (part(cpu), part(cpu + 1));
        shares.push(Share {
            style,
            regions,
            first,
            generations: vec![0; (end - first) as usize],
            pacer: Pacer::new(pages_per_second, clock::tsc_khz() * 1000, clock::now()),
            next: (end - first).saturating_sub(1),
            random_state: pattern::mix(style.seed ^ cpu),
            control: Arc::default(),
        });
    }
    Ok(shares)
}

fn announce(context: &Context<'_>, regions: &Regions, cpus: u64) {
    let mut line = event(context, "started");
    line.put("pages", regions.total() / PAGE_SIZE)
        .put("cpus", cpus);
    serial::print(&mut line);
}

/// Runs all shares until the time is over or a stop byte arrives.
fn run_shares(context: &Context<'_>, shares: &mut [Share], crew: &smp::Crew, timing: &Timing) {
    let Some((own, others)) = shares.split_first_mut() else {
        return;
    };
    let controls: Vec<Arc<Control>> = others.iter().map(|share| share.control.clone()).collect();
    for (member, share) in crew.members().zip(others.iter_mut()) {
        // SAFETY: the share outlives `crew.wait` below and is not used in between.
        unsafe { member.assign(work, share) };
    }
    let others_touches = || -> u64 {
        controls
            .iter()
            .map(|control| control.done.load(Ordering::Relaxed))
            .sum()
    };
    let mut report = Deadline::after_ms(timing.progress_ms);
    let mut poll = Deadline::after_ms(timing.poll_ms);
    let mut last = (clock::now(), 0);
    while !timing.end.passed() {
        if own.step() == 0 {
            core::hint::spin_loop();
        }
        heartbeat::progress(own.control.done.load(Ordering::Relaxed));
        if poll.passed() {
            poll = Deadline::after_ms(timing.poll_ms);
            if matches!(serial::read(), Some(b's' | b'S')) {
                break;
            }
        }
        if report.passed() {
            report = Deadline::after_ms(timing.progress_ms);
            let touches = own.control.done.load(Ordering::Relaxed) + others_touches();
            last = print_progress(context, touches, last);
        }
    }
    for control in &controls {
        control.stop.store(true, Ordering::Release);
    }
    crew.wait();
}

fn print_progress(context: &Context<'_>, touches: u64, last: (u64, u64)) -> (u64, u64) {
    let now = clock::now();
    let elapsed = clock::micros(now.wrapping_sub(last.0)).max(1);
    let rate = u128::from(touches - last.1) * 1_000_000_000 / 256 / u128::from(elapsed);
    let mut line = event(context, "progress");
    line.put("touches", touches)
        .thousandths("mib_s", rate as u64);
    serial::print(&mut line);
    (now, touches)
}

fn verify(shares: &[Share]) -> Verdict {
    heartbeat::set_state(State::Verifying);
    let mut verdict = Verdict::default();
    for share in shares {
        share.verify(&mut verdict);
    }
    verdict
}

fn parse_prefill(name: &str) -> Option<Option<Mode>> {
    if name == "none" {
        Some(None)
    } else {
        Mode::parse(name).map(Some)
    }
}

fn parse_write(name: &str) -> Option<Mode> {
    if name == "few" {
        Some(Mode::Sparse)
    } else {
        Mode::parse(name).filter(|&mode| mode != Mode::Zero)
    }
}

fn parse_order(name: &str) -> Option<bool> {
    match name {
        "seq" => Some(false),
        "random" => Some(true),
        _ => None,
    }
}
