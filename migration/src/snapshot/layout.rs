//! Where pages lie in the image: region behind region, in order, without gaps.

use super::checks::CHUNK_PAGES;
use crate::page::{PAGE_BYTES, PageIndex, PageRun};

/// Regions at most. Machines have two.
const MAX_REGIONS: usize = 64;

/// Regions are not what memory can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// None, or too many.
    #[error("{0} memory regions, 1 to {MAX_REGIONS} are possible")]
    Count(usize),
    /// Two overlap, or they are not in order.
    #[error("the memory region at page {0} is not behind the one before")]
    Order(u64),
}

/// Positions in the image, counted in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageLayout {
    /// Each with the position of its first page.
    regions: Vec<(PageRun, u64)>,
    pages: u64,
}

impl ImageLayout {
    /// The image of these regions.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn new(regions: &[PageRun]) -> Result<Self, LayoutError> {
        if !(1..=MAX_REGIONS).contains(&regions.len()) {
            return Err(LayoutError::Count(regions.len()));
        }
        let (mut end, mut pages) = (0, 0);
        let mut placed = Vec::with_capacity(regions.len());
        for region in regions {
            if region.start.0 < end {
                return Err(LayoutError::Order(region.start.0));
            }
            placed.push((*region, pages));
            end = region.end().0;
            // Regions do not overlap, so that this is no more than the last page's number.
            pages += region.count;
        }
        Ok(Self {
            regions: placed,
            pages,
        })
    }

    /// Pages in all.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of the image.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// Chunks of the image; the last may be shorter.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.pages.div_ceil(CHUNK_PAGES)
    }

    /// The regions.
    #[must_use]
    pub fn regions(&self) -> Vec<PageRun> {
        self.regions.iter().map(|(region, _)| *region).collect()
    }

    /// Position of a page; `None` when it is not memory.
    #[must_use]
    pub fn position(&self, page: PageIndex) -> Option<u64> {
        self.regions.iter().find_map(|(region, first)| {
            let offset = page.0.checked_sub(region.start.0)?;
            (offset < region.count).then(|| first + offset)
        })
    }

    /// The pages at positions `first..first + count`, in order; those past the end do not count.
    #[must_use]
    pub fn pages_at(&self, first: u64, count: u64) -> Vec<PageRun> {
        let end = first.saturating_add(count);
        let part = |(region, at): &(PageRun, u64)| {
            let from = first.max(*at);
            let to = end.min(at + region.count);
            let pages = to.checked_sub(from)?;
            PageRun::new(PageIndex(region.start.0 + (from - at)), pages)
        };
        self.regions.iter().filter_map(part).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, count: u64) -> PageRun {
        PageRun::new(PageIndex(start), count).unwrap()
    }

    #[test]
    fn regions_lie_behind_each_other() {
        let layout = ImageLayout::new(&[run(0, 100), run(1000, 50)]).unwrap();
        assert_eq!((layout.pages(), layout.chunks()), (150, 10));
        let positions = [0, 99, 100, 1000, 1049, 1050].map(|page| layout.position(PageIndex(page)));
        assert_eq!(
            positions,
            [Some(0), Some(99), None, Some(100), Some(149), None]
        );
        assert_eq!(layout.pages_at(96, 16), [run(96, 4), run(1000, 12)]);
        assert_eq!(layout.pages_at(144, 16), [run(1044, 6)]);
        assert_eq!(layout.pages_at(150, u64::MAX), []);
    }

    #[test]
    fn impossible_regions_are_refused() {
        assert_eq!(ImageLayout::new(&[]), Err(LayoutError::Count(0)));
        let many: Vec<_> = (0..65).map(|at| run(at, 1)).collect();
        assert_eq!(ImageLayout::new(&many), Err(LayoutError::Count(65)));
        let twice = [run(0, 100), run(99, 1)];
        assert_eq!(ImageLayout::new(&twice), Err(LayoutError::Order(99)));
    }
}
