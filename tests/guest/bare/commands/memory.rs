//! `mem`: fill memory with a pattern and check it.

use super::{Context, Failure, Outcome, event};
use crate::{clock, heartbeat};
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

/// Calls `work` with every page's address, heart beating.
pub(crate) fn each_page(regions: &Regions, mut work: impl FnMut(u64)) {
    let mut done = 0;
    for region in regions.as_slice() {
        let mut address = region.base;
        while address < region.end() {
            work(address);
            address += PAGE_SIZE;
            done += 1;
            if done % BEAT_PAGES == 0 {
                heartbeat::progress(done);
            }
        }
    }
}

/// `mem base= len= mode= seed= generation= passes= op=both|fill|verify`.
pub(crate) fn run(context: &mut Context<'_>, line: &mut Line) -> Outcome {
    let arguments = context.arguments;
    let regions = select(context, "len")?;
    let mode = arguments
        .parsed("mode", Mode::parse)?
        .unwrap_or(Mode::Sparse);
    let seed = arguments.number("seed", 1)?;
    let first_generation = arguments.number("generation", 1)?;
    let passes = arguments.number("passes", 1)?.max(1);
    let (fills, verifies) = arguments
        .parsed("op", parse_operation)?
        .unwrap_or((true, true));
    line.put("mode", mode.name())
        .put("pages", regions.total() / PAGE_SIZE)
        .put("passes", passes);
    let mut worst = Verdict::default();
    let (mut fill_ticks, mut verify_ticks) = (0, 0);
    for pass in 0..passes {
        let generation = first_generation + pass;
        heartbeat::set_generation(generation);
        let start = clock::now();
        if fills {
            heartbeat::set_state(State::Running);
            // SAFETY: `select` returns free memory.
            each_page(&regions, |at| {
                pattern::fill(unsafe { page(at) }, mode, key(at, seed, generation))
            });
        }
        let filled = clock::now();
        fill_ticks += filled - start;
        let mut verdict = Verdict::default();
        if verifies {
            heartbeat::set_state(State::Verifying);
            // SAFETY: as above.
            each_page(&regions, |at| {
                verdict.note(
                    at,
                    pattern::verify(unsafe { page(at) }, mode, key(at, seed, generation)),
                )
            });
        }
        verify_ticks += clock::now() - filled;
        if passes > 1 {
            let mut progress = event(context, "pass");
            progress
                .put("generation", generation)
                .put("fill_us", clock::micros(filled - start));
            progress.put("verify_us", clock::micros(clock::now() - filled));
            verdict.print_to(&mut progress);
            crate::serial::print(&mut progress);
        }
        if verdict.bad >= worst.bad {
            worst = verdict;
        }
    }
    line.put("generation", first_generation + passes - 1);
    line.put("fill_us", clock::micros(fill_ticks))
        .put("verify_us", clock::micros(verify_ticks));
    worst.print_to(line);
    worst.outcome()
}

fn key(address: u64, seed: u64, generation: u64) -> u64 {
    pattern::key(address / PAGE_SIZE, seed, generation)
}

fn parse_operation(name: &str) -> Option<(bool, bool)> {
    match name {
        "both" => Some((true, true)),
        "fill" => Some((true, false)),
        "verify" => Some((false, true)),
        _ => None,
    }
}
