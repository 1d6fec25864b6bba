//! Pre-copy: data connections that break are opened again.

use std::time::{Duration, Instant};

use super::control::Control;
use super::options::SourceError;
use super::plan::Task;
use super::rounds::{Rounds, listen};

use super::workers::Reopen;
use crate::bitmap::DirtyBitmap;
use crate::handoff::Mode;
use crate::wire::{FrameError, REOPENED_MAX};
use crate::words;

/// Which part of the time that the guest may stand still it may go on writing for, at most, after
/// the round by which its stop was decided.
const SETTLE_SHARE: u32 = 10;

impl Rounds<'_> {
    /// Waits until all connections have done what they were told; returns those that broke and were
    /// opened again.
    pub(super) fn await_or_reopen(
        &mut self,
        control: &mut Control,
        pages: u64,
        reopen: &mut Reopen<'_>,
        look: impl Fn(&Self),
    ) -> Result<Vec<u64>, SourceError> {
        let (mut left, mut lost) = (self.workers.count(), Vec::new());
        while left > 0 {
            match self.workers.next()? {
                Some((index, Err(error))) => {
                    self.check_wanted()?;
                    self.shared.devices.check()?;
                    // It may take a while.
                    self.tell_round(control, pages)?;
                    self.reopen(control, (index, error), reopen)?;
                    lost.push(index);
                    left -= 1;
                }
                Some((_, Ok(()))) => left -= 1,
                None => {
                    look(self);
                    self.watch(control, pages)?;
                }
            }
        }
        Ok(lost)
    }

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

    /// Marks all pages that travel on connections that broke.
    pub(super) fn send_again(&mut self, lost: &[u64], dirty: &mut [DirtyBitmap]) {
        if lost.is_empty() {
            return;
        }
        for index in lost {
            for (region, chunk) in self.shared.share_of(*index, &self.regions) {
                if let Some(bitmap) = dirty.get_mut(region) {
                    bitmap.insert(chunk);
                }
            }
        }
        // The guest is not to blame for pages that are sent once more.
        self.judged_from = self.reports.len();
    }

    /// Before the machine is stopped: whether all connections carry, and no more lies on the way
    /// than the last pages' time allows for. A connection with nothing to send would be found
    /// broken only when the guest stands still, where that ends the migration.
    ///
    /// Where it is false there is to be another round: pages of a connection that broke have to be
    /// sent again, or the guest has written for long meanwhile.
    pub(super) fn settle(
        &mut self,
        (control, reopen): (&mut Control, &mut Reopen<'_>),
        (dirty, mode): (&mut [DirtyBitmap], Mode),
    ) -> Result<bool, SourceError> {
        if std::mem::take(&mut self.is_settled) {
            return Ok(true);
        }
        let begin = Instant::now();
        let pages = dirty.iter().map(DirtyBitmap::count).sum();
        self.workers.order(&Task::Settle(self.options.patience));
        let lost = self.await_or_reopen(control, pages, reopen, |_| {})?;
        self.send_again(&lost, dirty);
        let is_quick = match mode {
            Mode::Precopy if !self.is_late() => {
                begin.elapsed() * SETTLE_SHARE <= self.handle.tuning().max_downtime
            }
            // Nobody counts on how much is left.
            Mode::Precopy | Mode::Postcopy => true,
        };
        // After one more round all is as well as it can be, however long the way.
        self.is_settled = lost.is_empty() && !is_quick;
        Ok(lost.is_empty() && is_quick)
    }
}
