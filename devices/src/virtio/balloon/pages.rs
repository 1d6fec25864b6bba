//! From page frame numbers to ranges worth freeing.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::PAGE_BYTES;

/// Adjacent pages of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Address of the first.
    pub(super) start: u64,
    /// Bytes.
    pub(super) len: u64,
}

/// Sorts `frames` and joins neighbours, so that a system call frees as much as it can. A frame
/// that occurs twice counts once.
pub(super) fn runs(frames: &mut Vec<u32>) -> Vec<Run> {
    frames.sort_unstable();
    frames.dedup();
    let mut runs: Vec<Run> = Vec::new();
    for frame in frames {
        let start = u64::from(*frame) * PAGE_BYTES;
        match runs.last_mut() {
            Some(run) if run.start + run.len == start => run.len += PAGE_BYTES,
            _ => runs.push(Run {
                start,
                len: PAGE_BYTES,
            }),
        }
    }
    runs
}

/// Which 4 KiB pages of each huge page are in the balloon. A guest fills the balloon in small
/// pages; a huge page can be freed when it is in there as a whole.
#[derive(Debug)]
pub(super) struct HugePageTracker {
    page_bytes: u64,
    /// By number of the huge page; those with no page in the balloon are absent. Bounded by RAM,
    /// because callers have checked the pages.
    pages: BTreeMap<u64, Parts>,
}

#[derive(Debug)]
struct Parts {
    bits: Box<[u64]>,
    present: u64,
}

impl HugePageTracker {
    /// Tracks pages of `page_bytes`, a power of two.
    pub(super) fn new(page_bytes: u64) -> Self {
        Self {
            page_bytes,
            pages: BTreeMap::new(),
        }
    }

    /// Notes that `run` is in the balloon; returns the huge pages that are, now or still, in
    /// there as a whole and were touched by `run`.
    pub(super) fn inflate(&mut self, run: Run) -> Vec<Run> {
        let parts_per_page = self.page_bytes / PAGE_BYTES;
        let mut complete: Vec<Run> = Vec::new();
        for (page, part) in self.parts(run) {
            let parts = self.pages.entry(page).or_insert_with(|| Parts {
                bits: (0..parts_per_page.div_ceil(64)).map(|_| 0).collect(),
                present: 0,
            });
            parts.set(part);
            let start = page * self.page_bytes;
            let seen = complete.last().is_some_and(|run| run.start == start);
            if parts.present == parts_per_page && !seen {
                let len = self.page_bytes;
                complete.push(Run { start, len });
            }
        }
        complete
    }

    /// Notes that `run` is the guest's again.
    pub(super) fn deflate(&mut self, run: Run) {
        for (page, part) in self.parts(run) {
            if let Entry::Occupied(mut parts) = self.pages.entry(page) {
                parts.get_mut().clear(part);
                if parts.get().present == 0 {
                    parts.remove();
                }
            }
        }
    }

    /// Number of the huge page, and position within it, of each page of `run`.
    fn parts(&self, run: Run) -> impl Iterator<Item = (u64, u64)> + use<> {
        let page_bytes = self.page_bytes;
        let pages = run.len / PAGE_BYTES;
        (0..pages).map(move |index| {
            let address = run.start + index * PAGE_BYTES;
            (address / page_bytes, address % page_bytes / PAGE_BYTES)
        })
    }
}

impl Parts {
    fn word(&mut self, part: u64) -> Option<&mut u64> {
        let index = usize::try_from(part / 64).ok()?;
        self.bits.get_mut(index)
    }

    fn set(&mut self, part: u64) {
        let mask = 1 << (part % 64);
        if let Some(word) = self.word(part)
            && *word & mask == 0
        {
            *word |= mask;
            self.present += 1;
        }
    }

    fn clear(&mut self, part: u64) {
        let mask = 1 << (part % 64);
        if let Some(word) = self.word(part)
            && *word & mask != 0
        {
            *word &= !mask;
            self.present -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUGE: u64 = 2 << 20;

    fn run(start: u64, len: u64) -> Run {
        Run { start, len }
    }

    #[test]
    fn neighbours_are_joined_in_any_order_and_duplicates_count_once() {
        let mut frames = vec![7, 5, 6, 5, 9, u32::MAX, 7];
        assert_eq!(
            runs(&mut frames),
            [
                run(0x5000, 0x3000),
                run(0x9000, 0x1000),
                run(0xfff_ffff_f000, 0x1000)
            ]
        );
        assert!(runs(&mut Vec::new()).is_empty());
    }

    #[test]
    fn huge_page_is_complete_when_each_of_its_parts_is_in_the_balloon() {
        let mut tracker = HugePageTracker::new(HUGE);
        // All but the last page of the first, and a bit of the next.
        assert!(tracker.inflate(run(0, HUGE - PAGE_BYTES)).is_empty());
        assert!(tracker.inflate(run(HUGE, PAGE_BYTES)).is_empty());
        assert_eq!(
            tracker.inflate(run(HUGE - PAGE_BYTES, PAGE_BYTES)),
            [run(0, HUGE)]
        );
        // Taken back and given again.
        tracker.deflate(run(0x5000, PAGE_BYTES));
        assert!(tracker.inflate(run(0x6000, PAGE_BYTES)).is_empty());
        assert_eq!(tracker.inflate(run(0x5000, PAGE_BYTES)), [run(0, HUGE)]);
    }

    #[test]
    fn long_run_completes_each_huge_page_in_it_once() {
        let mut tracker = HugePageTracker::new(HUGE);
        let complete = tracker.inflate(run(PAGE_BYTES, 3 * HUGE));
        assert_eq!(complete, [run(HUGE, HUGE), run(2 * HUGE, HUGE)]);
        tracker.deflate(run(0, 4 * HUGE));
        assert!(tracker.pages.is_empty());
        tracker.deflate(run(0, HUGE));
    }
}
