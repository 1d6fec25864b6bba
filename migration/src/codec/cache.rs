//! Versions of pages as they were sent last.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::PAGE;
use crate::page::PageIndex;

/// Rounds after which a page that was not sent again makes room for others.
const STALE_ROUNDS: u32 = 2;

/// Pages looked at for one that may go.
const SEARCH_LIMIT: usize = 16;

struct Slot {
    page: PageIndex,
    round: u32,
    bytes: Box<[u8; PAGE]>,
}

/// Pages as the destination has them, at most so many.
///
/// A full cache keeps what it has as long as it is used: a guest that rewrites more memory than
/// fits, round by round, would otherwise push out every page right before it is wanted.
pub struct DeltaCache {
    limit: usize,
    slots: Vec<Slot>,
    by_page: HashMap<PageIndex, usize>,
    hand: usize,
    round: u32,
}

impl DeltaCache {
    /// A cache of at most `limit_bytes` of pages.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        Self {
            limit: usize::try_from(limit_bytes).unwrap_or(usize::MAX) / PAGE,
            slots: Vec::new(),
            by_page: HashMap::new(),
            hand: 0,
            round: 0,
        }
    }

    /// A new round has begun.
    pub fn begin_round(&mut self, round: u32) {
        self.round = round;
    }

    /// Bytes of pages in the cache.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.slots.len() as u64 * PAGE as u64
    }

    /// The version of `page` that the destination has, if it is known.
    pub fn get(&mut self, page: PageIndex) -> Option<&[u8; PAGE]> {
        let slot = self.slots.get(*self.by_page.get(&page)?)?;
        Some(&slot.bytes)
    }

    /// Whether `page` has a slot already, so that storing it costs no memory.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        self.by_page.contains_key(&page)
    }

    /// Remembers that the destination has `bytes`. A full cache may not.
    pub fn put(&mut self, page: PageIndex, bytes: &[u8; PAGE]) {
        let full = self.slots.len() >= self.limit;
        let index = match self.by_page.entry(page) {
            Entry::Occupied(entry) => Some(*entry.get()),
            Entry::Vacant(entry) if !full => {
                entry.insert(self.slots.len());
                self.slots.push(Slot {
                    page,
                    round: self.round,
                    bytes: Box::new(*bytes),
                });
                return;
            }
            Entry::Vacant(_) => self.evict(),
        };
        let Some((index, slot)) = index.and_then(|i| Some((i, self.slots.get_mut(i)?))) else {
            return;
        };
        if slot.page != page {
            self.by_page.remove(&slot.page);
            self.by_page.insert(page, index);
            slot.page = page;
        }
        slot.round = self.round;
        slot.bytes.copy_from_slice(bytes);
    }

    /// Forgets a page: the destination has another version than the cache.
    pub fn remove(&mut self, page: PageIndex) {
        let Some(index) = self.by_page.remove(&page) else {
            return;
        };
        self.slots.swap_remove(index);
        if let Some(moved) = self.slots.get(index) {
            self.by_page.insert(moved.page, index);
        }
    }

    /// A slot that was not used for some rounds.
    fn evict(&mut self) -> Option<usize> {
        for _ in 0..SEARCH_LIMIT.min(self.slots.len()) {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = self.slots.get(self.hand)?;
            if self.round.saturating_sub(slot.round) > STALE_ROUNDS {
                return Some(self.hand);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_cache_keeps_what_is_used_and_gives_up_what_is_not() {
        let mut cache = DeltaCache::new(3 * 4096 + 5);
        let page = |byte| [byte; PAGE];
        for index in 0..4 {
            cache.put(PageIndex(index), &page(1));
        }
        assert_eq!(cache.bytes(), 3 * 4096);
        assert!(!cache.contains(PageIndex(3)));
        cache.begin_round(3);
        cache.put(PageIndex(0), &page(2));
        cache.put(PageIndex(1), &page(2));
        cache.put(PageIndex(3), &page(3));
        assert_eq!(cache.get(PageIndex(3)), Some(&page(3)));
        assert!(!cache.contains(PageIndex(2)));
        assert_eq!(cache.get(PageIndex(0)), Some(&page(2)));
        cache.remove(PageIndex(0));
        assert!(cache.get(PageIndex(0)).is_none());
        assert_eq!(cache.get(PageIndex(1)), Some(&page(2)));
        assert_eq!(cache.get(PageIndex(3)), Some(&page(3)));
    }
}
