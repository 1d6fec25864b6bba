//! Sets of pages of video memory.

use std::ops::Range;

/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;

const WORD_BITS: u64 = 64;

/// A set of pages, by their numbers.
#[derive(Clone, Debug)]
pub(super) struct Pages {
    words: Vec<u64>,
    pages: u64,
    count: u64,
    /// Where the next one is looked for.
    next: u64,
}

impl Pages {
    /// None of the pages of so much memory.
    pub(super) fn none(bytes: u64) -> Self {
        let pages = bytes / PAGE;
        let words = usize::try_from(pages.div_ceil(WORD_BITS)).unwrap_or(usize::MAX);
        Self {
            words: vec![0; words],
            pages,
            count: 0,
            next: 0,
        }
    }

    /// All of them.
    pub(super) fn all(bytes: u64) -> Self {
        let mut all = Self::none(bytes);
        all.insert(0, bytes);
        all
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether it has all of them.
    pub(super) fn is_full(&self) -> bool {
        self.count == self.pages
    }

    fn slot(&mut self, page: u64) -> Option<(&mut u64, u64)> {
        let word = usize::try_from(page / WORD_BITS).ok()?;
        Some((self.words.get_mut(word)?, 1 << (page % WORD_BITS)))
    }

    fn has(&self, page: u64) -> bool {
        let word = usize::try_from(page / WORD_BITS).ok();
        let word = word.and_then(|word| self.words.get(word));
        word.is_some_and(|word| word & (1 << (page % WORD_BITS)) != 0)
    }

    /// Adds those that the bytes touch; what lies behind the end is none.
    pub(super) fn insert(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).div_ceil(PAGE).min(self.pages);
        for page in offset / PAGE..end {
            let Some((word, bit)) = self.slot(page) else {
                return;
            };
            let is_new = *word & bit == 0;
            *word |= bit;
            self.count += u64::from(is_new);
        }
    }

    /// Takes out some that follow each other, at most so many; their bytes. The search goes on where the
    /// last one ended, so that what is written often does not keep others from their turn.
    pub(super) fn take(&mut self, most: u64) -> Option<Range<u64>> {
        if self.count == 0 || most == 0 {
            return None;
        }
        let mut first = self.next;
        while !self.has(first) {
            let word = usize::try_from(first / WORD_BITS).ok();
            let rest = word.and_then(|word| self.words.get(word));
            first = match rest {
                None => 0,
                Some(word) if word >> (first % WORD_BITS) == 0 => {
                    (first / WORD_BITS + 1) * WORD_BITS
                }
                Some(_) => first + 1,
            };
        }
        let mut end = first;
        while end - first < most && self.has(end) {
            if let Some((word, bit)) = self.slot(end) {
                *word &= !bit;
            }
            end += 1;
        }
        self.count -= end - first;
        self.next = end;
        Some(first * PAGE..end * PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_in_turn_and_in_runs() {
        let mut pages = Pages::none(200 * PAGE);
        assert_eq!(pages.take(9), None);
        pages.insert(PAGE - 1, 2);
        pages.insert(130 * PAGE, 70 * PAGE + 5);
        assert_eq!(pages.count(), 72);
        assert_eq!(pages.take(9), Some(0..2 * PAGE));
        assert_eq!(pages.take(9), Some(130 * PAGE..139 * PAGE));
        // Those before are not looked at before the end was.
        pages.insert(0, 1);
        assert_eq!(pages.take(100), Some(139 * PAGE..200 * PAGE));
        assert_eq!(pages.take(100), Some(0..PAGE));
        assert_eq!((pages.count(), pages.take(100)), (0, None));
    }

    #[test]
    fn all_are_there_once() {
        let mut pages = Pages::all(70 * PAGE);
        assert!(pages.is_full());
        pages.insert(3 * PAGE, PAGE);
        assert_eq!(pages.count(), 70);
        assert_eq!(pages.take(1000), Some(0..70 * PAGE));
        assert!(!pages.is_full());
    }
}
