//! Page numbers.

/// Bytes per page on the wire and in dirty bitmaps, whatever backs the memory.
pub const PAGE_BYTES: u64 = 4096;

/// Number of a page: guest-physical address divided by [`PAGE_BYTES`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The page that contains guest-physical address `gpa`.
    #[must_use]
    pub fn containing(gpa: u64) -> Self {
        Self(gpa / PAGE_BYTES)
    }

    /// Guest-physical address of the page's first byte; `None` past the end of the address space.
    #[must_use]
    pub fn gpa(self) -> Option<u64> {
        self.0.checked_mul(PAGE_BYTES)
    }
}

/// Pages in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The first page.
    pub start: PageIndex,
    /// How many, at least 1.
    pub count: u64,
}

impl PageRun {
    /// A run of `count` pages from `start`; `None` when it is empty or passes the end of the
    /// address space.
    #[must_use]
    pub fn new(start: PageIndex, count: u64) -> Option<Self> {
        let end = start.0.checked_add(count)?;
        PageIndex(end).gpa()?;
        (count > 0).then_some(Self { start, count })
    }

    /// The page after the last.
    #[must_use]
    pub fn end(&self) -> PageIndex {
        PageIndex(self.start.0 + self.count)
    }

    /// Bytes in the run.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count * PAGE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_are_empty_or_wrap_do_not_exist() {
        let last = u64::MAX / PAGE_BYTES;
        assert!(PageRun::new(PageIndex(0), 0).is_none());
        assert!(PageRun::new(PageIndex(u64::MAX), 1).is_none());
        assert!(PageRun::new(PageIndex(last), 2).is_none());
        let run = PageRun::new(PageIndex(2), 3).unwrap();
        assert_eq!((run.end(), run.bytes()), (PageIndex(5), 12_288));
    }
}
