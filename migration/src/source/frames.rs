//! Runs of pages, pages into a buffer, and frames with raw pages behind them onto a connection.

use std::io::{self, IoSlice};
use std::ops::Range;

use crate::page::{PageIndex, PageRun};
use crate::ports::{Channel, PageStore, PortError};

/// Reads pages one after the other into `buffer`, which has room for all of them.
pub(super) fn read_runs(
    pages: &dyn PageStore,
    runs: &[PageRun],
    buffer: &mut [u8],
) -> Result<(), PortError> {
    let mut rest = buffer;
    for run in runs {
        let length = usize::try_from(run.bytes()).unwrap_or(usize::MAX);
        let (target, after) = rest.split_at_mut_checked(length).unwrap_or_default();
        pages.read(*run, target)?;
        rest = after;
    }
    Ok(())
}

/// What goes onto a connection at once: frames, then the parts `raw` of `buffer`.
pub(super) struct Outgoing<'a>(Vec<IoSlice<'a>>);

impl<'a> Outgoing<'a> {
    pub(super) fn new(frames: &'a [u8], buffer: &'a [u8], raw: &[Range<usize>]) -> Self {
        let parts = raw.iter().filter_map(|range| buffer.get(range.clone()));
        let slices = std::iter::once(frames).chain(parts);
        Self(slices.map(IoSlice::new).collect())
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.iter().map(|slice| slice.len()).sum()
    }

    /// Writes all of it.
    pub(super) fn write(mut self, channel: &mut dyn Channel) -> io::Result<()> {
        let mut rest = self.0.as_mut_slice();
        while !rest.is_empty() {
            match channel.write_vectored(rest) {
                Ok(0) if rest.iter().all(|slice| slice.is_empty()) => break,
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => IoSlice::advance_slices(&mut rest, count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Runs of ones in a word whose bit 0 is page `base`.
pub(super) fn runs_of(base: PageIndex, word: u64) -> impl Iterator<Item = PageRun> {
    let mut at = 0_u32;
    std::iter::from_fn(move || {
        let rest = word.checked_shr(at)?;
        if rest == 0 {
            return None;
        }
        let start = at + rest.trailing_zeros();
        let count = (word >> start).trailing_ones();
        at = start + count;
        Some(PageRun {
            start: PageIndex(base.0 + u64::from(start)),
            count: u64::from(count),
        })
    })
}
