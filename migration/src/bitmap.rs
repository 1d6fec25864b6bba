//! Sets of dirty pages.

use crate::page::{PageIndex, PageRun};

/// Bits per word.
const WORD_BITS: u64 = 64;

/// Which pages of one memory region changed. Page `base` is bit 0 of word 0, as KVM's dirty log
/// has it (Documentation/virt/kvm/api.rst, 4.8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    base: PageIndex,
    pages: u64,
    words: Vec<u64>,
}

impl DirtyBitmap {
    /// A clean bitmap for `pages` pages from `base`.
    #[must_use]
    pub fn new(base: PageIndex, pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(WORD_BITS)).unwrap_or(usize::MAX);
        Self {
            base,
            pages,
            words: vec![0; words],
        }
    }

    /// The first page that the bitmap speaks of.
    #[must_use]
    pub fn base(&self) -> PageIndex {
        self.base
    }

    /// The words, for trackers that write them.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Pages that the bitmap speaks of.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Marks the pages of `run`; those outside the bitmap do not count.
    pub fn insert(&mut self, run: PageRun) {
        self.each_word(run, |word, mask| *word |= mask);
    }

    /// Unmarks the pages of `run`.
    pub fn remove(&mut self, run: PageRun) {
        self.each_word(run, |word, mask| *word &= !mask);
    }

    /// Whether a page is marked.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        let Some(bit) = page.0.checked_sub(self.base.0) else {
            return false;
        };
        let index = usize::try_from(bit / WORD_BITS).unwrap_or(usize::MAX);
        let word = self.words.get(index).copied().unwrap_or(0);
        bit < self.pages && word >> (bit % WORD_BITS) & 1 == 1
    }

    /// The marks of 64 pages, of which `page` is bit 0; it lies a multiple of 64 from the base.
    /// Bits past the last page are 0.
    #[must_use]
    pub fn word_at(&self, page: PageIndex) -> u64 {
        let bit = page.0.saturating_sub(self.base.0);
        let index = usize::try_from(bit / WORD_BITS).unwrap_or(usize::MAX);
        let word = self.words.get(index).copied().unwrap_or(0);
        match self.pages.saturating_sub(bit) {
            0 => 0,
            left if left < WORD_BITS => word & (u64::MAX >> (WORD_BITS - left)),
            _ => word,
        }
    }

    /// Replaces the marks that [`DirtyBitmap::word_at`] returns.
    pub fn set_word_at(&mut self, page: PageIndex, marks: u64) {
        let bit = page.0.saturating_sub(self.base.0);
        let index = usize::try_from(bit / WORD_BITS).unwrap_or(usize::MAX);
        if let Some(word) = self.words.get_mut(index) {
            *word = marks;
        }
    }

    /// Calls `change` with each word that has bits of `run`, and a mask of these.
    fn each_word(&mut self, run: PageRun, mut change: impl FnMut(&mut u64, u64)) {
        let mut at = run.start.0.max(self.base.0) - self.base.0;
        let end = run.end().0.saturating_sub(self.base.0).min(self.pages);
        while at < end {
            let bit = at % WORD_BITS;
            let bits = (WORD_BITS - bit).min(end - at);
            let mask = (u64::MAX >> (WORD_BITS - bits)) << bit;
            let index = usize::try_from(at / WORD_BITS).unwrap_or(usize::MAX);
            if let Some(word) = self.words.get_mut(index) {
                change(word, mask);
            }
            at += bits;
        }
    }

    /// Dirty runs within `run`, as by [`DirtyBitmap::runs`].
    #[must_use]
    pub fn runs_within(&self, run: PageRun) -> Runs<'_> {
        let offset = |page: PageIndex| page.0.saturating_sub(self.base.0).min(self.pages);
        Runs {
            bitmap: self,
            next: offset(run.start),
            end: offset(run.end()),
        }
    }

    /// Adds the pages of another bitmap of the same region: the union of several logs.
    pub fn merge(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Marks every page: the honest answer when a log could not be read.
    pub fn fill(&mut self) {
        self.words.fill(u64::MAX);
    }

    /// How many pages are dirty. Bits past the last page do not count.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.runs().map(|run| run.count).sum()
    }

    /// Dirty pages in ascending runs, as long as possible. Clean words cost one comparison.
    #[must_use]
    pub fn runs(&self) -> Runs<'_> {
        Runs {
            bitmap: self,
            next: 0,
            end: self.pages,
        }
    }

    /// First dirty (`dirty`) or clean bit in `[from, end)`, or `end`. What lies behind is not looked
    /// at: a search through a large memory chunk by chunk reads every word once.
    fn find(&self, from: u64, end: u64, dirty: bool) -> u64 {
        let mut at = from;
        while at < end {
            let index = usize::try_from(at / WORD_BITS).unwrap_or(usize::MAX);
            let word = self.words.get(index).copied().unwrap_or(0);
            let wanted = if dirty { word } else { !word };
            let rest = wanted >> (at % WORD_BITS);
            if rest != 0 {
                return (at + u64::from(rest.trailing_zeros())).min(end);
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        end
    }
}

/// Iterator over the dirty runs of a bitmap.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    bitmap: &'a DirtyBitmap,
    next: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let start = self.bitmap.find(self.next, self.end, true);
        if start >= self.end {
            return None;
        }
        let end = self.bitmap.find(start, self.end, false);
        self.next = end;
        PageRun::new(PageIndex(self.bitmap.base.0 + start), end - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(bitmap: &DirtyBitmap) -> Vec<(u64, u64)> {
        bitmap.runs().map(|run| (run.start.0, run.count)).collect()
    }

    #[test]
    fn runs_cross_words_and_stop_at_the_last_page() {
        let mut bitmap = DirtyBitmap::new(PageIndex(1000), 130);
        bitmap
            .words_mut()
            .copy_from_slice(&[1 | 1 << 63, 0b11, 0b111 << 1 | 1 << 40]);
        assert_eq!(runs(&bitmap), [(1000, 1), (1063, 3), (1129, 1)]);
        assert_eq!(bitmap.count(), 5);
        bitmap.fill();
        assert_eq!(runs(&bitmap), [(1000, 130)]);
    }

    #[test]
    fn pages_are_inserted_removed_and_found_across_words() {
        let run = |start, count| PageRun::new(PageIndex(start), count).unwrap();
        let mut bitmap = DirtyBitmap::new(PageIndex(1000), 130);
        bitmap.insert(run(990, 12));
        bitmap.insert(run(1060, 8));
        bitmap.insert(run(1128, 50));
        assert_eq!(runs(&bitmap), [(1000, 2), (1060, 8), (1128, 2)]);
        bitmap.remove(run(1062, 3));
        assert_eq!(runs(&bitmap), [(1000, 2), (1060, 2), (1065, 3), (1128, 2)]);
        assert!(bitmap.contains(PageIndex(1001)) && bitmap.contains(PageIndex(1129)));
        for clean in [999, 1002, 1062, 1130] {
            assert!(!bitmap.contains(PageIndex(clean)), "{clean}");
        }
        let within: Vec<_> = bitmap.runs_within(run(1061, 6)).collect();
        assert_eq!(within, [run(1061, 1), run(1065, 2)]);
    }

    /// 256 GiB, nearly clean, in chunks of 2 MiB: the last round of every migration. Looking past
    /// the chunk's end would take minutes.
    #[test]
    fn chunks_of_a_large_clean_memory_are_searched_in_no_time() {
        let pages = (256 << 30) / 4096;
        let mut bitmap = DirtyBitmap::new(PageIndex(0), pages);
        bitmap.insert(PageRun::new(PageIndex(pages - 1), 1).unwrap());
        let begin = std::time::Instant::now();
        let chunks = (0..pages).step_by(512);
        let found = chunks.flat_map(|start| {
            let chunk = PageRun::new(PageIndex(start), 512).unwrap();
            bitmap.runs_within(chunk)
        });
        assert_eq!(found.map(|run| run.count).sum::<u64>(), 1);
        assert!(begin.elapsed().as_secs() < 5, "{:?}", begin.elapsed());
    }

    #[test]
    fn runs_agree_with_a_bit_by_bit_reading() {
        // A cheap generator of bitmaps with long and short runs.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for pages in [1, 63, 64, 65, 500] {
            for _ in 0..200 {
                let mut bitmap = DirtyBitmap::new(PageIndex(0), pages);
                for word in bitmap.words_mut() {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    *word = match state % 4 {
                        0 => 0,
                        1 => u64::MAX,
                        _ => state,
                    };
                }
                let dirty = |page: u64| {
                    bitmap.words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1
                };
                let expected: Vec<_> = (0..pages).filter(|page| dirty(*page)).collect();
                let found: Vec<_> = bitmap
                    .runs()
                    .flat_map(|run| run.start.0..run.end().0)
                    .collect();
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn merge_is_the_union() {
        let mut a = DirtyBitmap::new(PageIndex(0), 64);
        let mut b = a.clone();
        a.words_mut()[0] = 0b0011;
        b.words_mut()[0] = 0b0110;
        a.merge(&b);
        assert_eq!(runs(&a), [(0, 3)]);
    }
}
