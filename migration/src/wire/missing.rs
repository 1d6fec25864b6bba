//! Lists of pages that the destination does not have: as messages, and back.

use super::frame::FrameError;
use super::message::{Message, Missing};
use crate::bitmap::DirtyBitmap;
use crate::page::{PageIndex, PageRun};

/// Runs in one message at most.
const MESSAGE_RUNS: usize = 32 << 10;

/// The list as messages, at least one.
pub(crate) fn messages(missing: &[DirtyBitmap]) -> impl Iterator<Item = Message> {
    let mut runs = missing.iter().flat_map(DirtyBitmap::runs).peekable();
    let mut is_first = true;
    std::iter::from_fn(move || {
        if runs.peek().is_none() && !is_first {
            return None;
        }
        is_first = false;
        let runs = runs.by_ref().take(MESSAGE_RUNS);
        let runs = runs.map(|run| (run.start.0, run.count)).collect();
        Some(Message::Missing(Missing { runs }))
    })
}

/// What ends a list whose end nothing else shows.
pub(crate) fn end() -> Message {
    Message::Missing(Missing { runs: Vec::new() })
}

/// Marks the pages of `runs`, each within one of the regions that the bitmaps are of; returns the
/// page after the last.
///
/// # Errors
/// [`FrameError::Invalid`] for a run that is not in ascending order from `at` on, or not in memory.
pub(crate) fn mark(
    missing: &mut [DirtyBitmap],
    runs: &[(u64, u64)],
    at: PageIndex,
) -> Result<PageIndex, FrameError> {
    let mut at = at;
    for (start, count) in runs {
        let run = PageRun::new(PageIndex(*start), *count).filter(|run| run.start >= at);
        let place = run.and_then(|run| {
            let holds = |bitmap: &&mut DirtyBitmap| {
                bitmap.base() <= run.start && run.end().0 <= bitmap.base().0 + bitmap.pages()
            };
            missing.iter_mut().find(holds).zip(Some(run))
        });
        let Some((bitmap, run)) = place else {
            let text = format!("{count} missing pages at {start} are out of order or no memory");
            return Err(FrameError::Invalid(text));
        };
        bitmap.insert(run);
        at = run.end();
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions() -> Vec<DirtyBitmap> {
        vec![
            DirtyBitmap::new(PageIndex(0), 100_000),
            DirtyBitmap::new(PageIndex(200_000), 64),
        ]
    }

    fn runs_of(message: &Message) -> &[(u64, u64)] {
        match message {
            Message::Missing(missing) => &missing.runs,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_list_comes_out_as_it_went_in_however_long_it_is() {
        let mut missing = regions();
        let pages = (0..100_000).step_by(2).chain([200_063]);
        let pages: Vec<_> = pages.collect();
        for page in &pages {
            let run = PageRun::new(PageIndex(*page), 1).unwrap();
            missing[usize::from(*page >= 200_000)].insert(run);
        }
        let sent: Vec<_> = messages(&missing).collect();
        assert_eq!(sent.len(), 2);
        let (mut found, mut at) = (regions(), PageIndex(0));
        for message in &sent {
            at = mark(&mut found, runs_of(message), at).unwrap();
        }
        assert_eq!(found.iter().map(DirtyBitmap::count).sum::<u64>(), 50_001);
        assert!(found[0].contains(PageIndex(99_998)) && !found[0].contains(PageIndex(1)));
        let none: Vec<_> = messages(&regions()).collect();
        assert_eq!(none, [end()]);
    }

    #[test]
    fn a_list_that_leaves_memory_or_comes_twice_is_refused() {
        let bad: [&[(u64, u64)]; 6] = [
            &[(100_000, 1)],
            &[(99_999, 2)],
            &[(5, 0)],
            &[(u64::MAX, 2)],
            &[(7, 1), (6, 1)],
            &[(7, 2), (8, 1)],
        ];
        for runs in bad {
            let marked = mark(&mut regions(), runs, PageIndex(0));
            assert!(matches!(marked, Err(FrameError::Invalid(_))), "{runs:?}");
        }
        let marked = mark(&mut regions(), &[(3, 1)], PageIndex(4));
        assert!(marked.is_err());
    }
}
