//! Pre-copy: data connections that break are opened again.

use std::time::Duration;

use super::control::Control;
use super::options::SourceError;
use super::rounds::{Rounds, listen};
use super::workers::Reopen;
use crate::bitmap::DirtyBitmap;
use crate::wire::{FrameError, REOPENED_MAX};
use crate::words;

impl Rounds<'_> {
    /// Opens a connection again that broke. What of its pages has come nobody knows: they are all
    /// to be sent once more.
    pub(super) fn reopen(
        &mut self,
        control: &mut Control,
        (index, error): (u64, SourceError),
        reopen: &mut Reopen<'_>,
    ) -> Result<(), SourceError> {
        let is_broken = matches!(error, SourceError::Link(FrameError::Io(_)));
        if !is_broken || self.reopened >= REOPENED_MAX * self.workers.count() {
            return Err(error);
        }
        // A peer that has given up breaks its connections off, too.
        match listen(control, Duration::ZERO) {
            Ok(()) => {}
            Err(words @ SourceError::Peer(_)) => return Err(words),
            Err(_) => return Err(error),
        }
        self.reopened += 1;
        match reopen(index) {
            Ok(order) => {
                log::warn!(index, error:% = words::chain(&error); "a data connection broke and was opened again");
                self.workers.replace(index, order);
                Ok(())
            }
            Err(SourceError::Cancelled) => Err(SourceError::Cancelled),
            Err(failed) => {
                log::warn!(index, error:% = words::chain(&failed); "a data connection broke and cannot be opened again");
                Err(error)
            }
        }
    }

    /// Marks all pages that travel on these connections.
    pub(super) fn mark_shares(&self, connections: &[u64], dirty: &mut [DirtyBitmap]) {
        for index in connections {
            for (region, chunk) in self.shared.share_of(*index, &self.regions) {
                if let Some(bitmap) = dirty.get_mut(region) {
                    bitmap.insert(chunk);
                }
            }
        }
    }
}
