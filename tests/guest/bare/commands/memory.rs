//! `mem`: fill memory with a pattern and check it.

use super::{Context, Failure, Outcome, event};
use crate::{clock, heartbeat, serial};
use drover_guest::heartbeat::State;
use drover_guest::line::Line;
use drover_guest::memmap::{Region, Regions};
use drover_guest::pattern::{self, Mode, PAGE_SIZE, Page};

/// Pages between two heartbeats.
const BEAT_PAGES: u64 = 256;

/// The free memory that `base=` and the argument `len_key` select: all of it, its first `len` bytes, or
/// the given range, which must be free.
pub(crate) fn select(context: &Context<'_>, len_key: &'static str) -> Result<Regions, Failure> {
    let free = &context.machine.free;
    let base = context.arguments.optional_number("base")?;
    let len = context
        .arguments
        .optional_number(len_key)?
        .map(|len| len / PAGE_SIZE * PAGE_SIZE);
    let mut selected = Regions::default();
    match (base, len) {
        (None, None) => return Ok(*free),
        (None, Some(len)) => {
            let mut left = len;
            for region in free.as_slice() {
                let take = region.len.min(left);
                if take != 0 {
                    selected.push(Region {
                        base: region.base,
                        len: take,
                    });
                }
                left -= take;
            }
            if left != 0 {
                return Err(Failure::new("not-enough-memory").with("free", free.total()));
            }
        }
        (Some(base), len) => {
            let home = free
                .containing(base)
                .ok_or(Failure::new("range-not-free").with("base", base))?;
            let end = base.saturating_add(len.unwrap_or(home.end() - base));
            let range = Region {
                base,
                len: end - base,
            };
            if base % PAGE_SIZE != 0 || end > home.end() || range.len == 0 {
                return Err(Failure::new("range-not-free")
                    .with("base", base)
                    .with("len", range.len));
            }
            selected.push(range);
        }
    }
    Ok(selected)
}

/// A page of free memory.
///
/// # Safety
/// `address` is page-aligned and lies in the machine's free memory; nobody else holds the page.
pub(crate) unsafe fn page<'a>(address: u64) -> &'a mut Page {
    // SAFETY: free memory is mapped (`Machine::new`) and used by the memory commands alone.
    unsafe { &mut *(address as *mut Page) }
}

/// What checking found.
#[derive(Default)]
pub(crate) struct Verdict {
    pub(crate) pages: u64,
    pub(crate) bad: u64,
    pub(crate) first_bad: Option<u64>,
}

impl Verdict {
    pub(crate) fn note(&mut self, address: u64, good: bool) {
        self.pages += 1;
        if !good {
            self.bad += 1;
            self.first_bad.get_or_insert(address);
        }
    }

    pub(crate) fn print_to(&self, line: &mut Line) {
        line.put("bad", self.bad);
        if let Some(address) = self.first_bad {
            line.hex("first_bad", address);
        }
    }

    pub(crate) fn outcome(&self) -> Outcome {
        if self.bad == 0 {
            Ok(())
        } else {
            Err(Failure::new("mismatch"))
        }
    }
}

/// Calls `work` with every page and its address, heart beating.
fn each_page(regions: &Regions, mut work: impl FnMut(u64, &mut Page)) {
    let mut done = 0;
    for region in regions.as_slice() {
        let mut address = region.base;
        while address < region.end() {
            // SAFETY: both callers pass what `select` returned.
            work(address, unsafe { page(address) });
            address += PAGE_SIZE;
            done += 1;
            if done % BEAT_PAGES == 0 {
                heartbeat::progress(done);
            }
        }
    }
}

/// What to write and where.
struct Work {
    regions: Regions,
    mode: Mode,
    seed: u64,
    fills: bool,
    verifies: bool,
}

/// What one pass did.
struct Pass {
    fill_us: u64,
    verify_us: u64,
    verdict: Verdict,
}

impl Work {
    fn key(&self, address: u64, generation: u64) -> u64 {
        pattern::key(address / PAGE_SIZE, self.seed, generation)
    }

    fn pass(&self, generation: u64) -> Pass {
        heartbeat::set_generation(generation);
        let start = clock::now();
        if self.fills {
            heartbeat::set_state(State::Running);
            each_page(&self.regions, |at, page| {
                pattern::fill(page, self.mode, self.key(at, generation));
            });
        }
        let filled = clock::now();
        let mut verdict = Verdict::default();
        if self.verifies {
            heartbeat::set_state(State::Verifying);
            each_page(&self.regions, |at, page| {
                verdict.note(
                    at,
                    pattern::verify(page, self.mode, self.key(at, generation)),
                );
            });
        }
        let fill_us = clock::micros(filled - start);
        Pass {
            fill_us,
            verify_us: clock::micros(clock::now() - filled),
            verdict,
        }
    }
}

/// `mem base= len= mode= seed= generation= passes= op=both|fill|verify`.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let (fills, verifies) = arguments
        .parsed("op", parse_operation)?
        .unwrap_or((true, true));
    let work = Work {
        regions: select(context, "len")?,
        mode: arguments
            .parsed("mode", Mode::parse)?
            .unwrap_or(Mode::Sparse),
        seed: arguments.number("seed", 1)?,
        fills,
        verifies,
    };
    let generation = arguments.number("generation", 1)?;
    let passes = arguments.number("passes", 1)?.max(1);
    line.put("mode", work.mode.name())
        .put("pages", work.regions.total() / PAGE_SIZE)
        .put("passes", passes);
    let mut worst = Verdict::default();
    let (mut fill_us, mut verify_us) = (0, 0);
    for generation in generation..generation.saturating_add(passes) {
        let pass = work.pass(generation);
        fill_us += pass.fill_us;
        verify_us += pass.verify_us;
        if passes > 1 {
            let mut progress = event(context, "pass");
            progress
                .put("generation", generation)
                .put("fill_us", pass.fill_us)
                .put("verify_us", pass.verify_us);
            pass.verdict.print_to(&mut progress);
            serial::print(&mut progress);
        }
        if pass.verdict.bad >= worst.bad {
            worst = pass.verdict;
        }
    }
    line.put("generation", generation + passes - 1);
    line.put("fill_us", fill_us).put("verify_us", verify_us);
    worst.print_to(line);
    worst.outcome()
}

fn parse_operation(name: &str) -> Option<(bool, bool)> {
    match name {
        "both" => Some((true, true)),
        "fill" => Some((true, false)),
        "verify" => Some((false, true)),
        _ => None,
    }
}
