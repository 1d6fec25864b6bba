//! Post-copy: the destination runs the machine while its pages are served from here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::control::TICK;
use super::options::SourceError;
use super::rounds::{Rounds, micros};
use super::switchover::Switchover;
use crate::bitmap::DirtyBitmap;
use crate::handoff::{self, Mode, SourceEvent};
use crate::ports::Breaker;
use crate::progress::{Phase, Postcopy};
use crate::wire::Message;
use crate::wire::message::{Complete, Missing};

/// Runs of missing pages in one message at most.
const MISSING_RUNS: usize = 32 << 10;

/// Post-copy's part of a switchover.
#[derive(Default)]
pub(super) struct Later {
    /// Pages that the destination does not have.
    pub(super) missing: Vec<DirtyBitmap>,
    pub(super) report: Option<Postcopy>,
    pub(super) began: Option<Instant>,
    /// Streams that have sent all of theirs.
    pub(super) pushed: usize,
    /// Whether the destination has, for all that is known, taken the machine over.
    pub(super) peer_has_it: bool,
    pub(super) breaker: Option<Arc<dyn Breaker>>,
    /// The thread that answers the destination's requests.
    pub(super) server: ServerFlags,
}

#[derive(Clone, Default)]
pub(super) struct ServerFlags {
    pub(super) stopped: Arc<AtomicBool>,
    pub(super) failed: Arc<AtomicBool>,
}

impl Switchover<'_, '_> {
    /// In a post-copy, what the destination does not have.
    pub(super) fn send_missing(&mut self) -> Result<(), SourceError> {
        if self.mode == Mode::Precopy {
            return Ok(());
        }
        let runs = self.later.missing.iter().flat_map(DirtyBitmap::runs);
        let runs: Vec<_> = runs.map(|run| (run.start.0, run.count)).collect();
        let mut rest = runs.as_slice();
        loop {
            let (some, after) = rest.split_at(rest.len().min(MISSING_RUNS));
            let runs = some.to_vec();
            self.control.send(&Message::Missing(Missing { runs }))?;
            if after.is_empty() {
                return Ok(());
            }
            rest = after;
        }
    }

    /// The destination has answered the commit that was sent at `begin`: pages are pushed and served until it has
    /// all of them.
    pub(super) fn serve(&mut self, begin: Instant) -> SourceEvent {
        self.begin_serving(begin);
        let pages = self.later.report.map_or(0, |report| report.pages);
        let mut heard = Instant::now();
        loop {
            if self.later.server.failed.load(Ordering::SeqCst) {
                return SourceEvent::LinkLost;
            }
            let streams = self.rounds.streams_done(Duration::ZERO);
            let life = self.rounds.show_life(self.control, pages);
            let message = self.control.poll(TICK);
            match (streams, life, message) {
                (_, _, Ok(Some(Message::Complete(complete)))) => {
                    self.complete(complete);
                    return SourceEvent::Received(handoff::Message::Complete);
                }
                (_, _, Ok(Some(message))) => {
                    return SourceEvent::Received(self.understand(message));
                }
                (Ok(done), Ok(()), Ok(None)) => {
                    self.later.pushed += done;
                    if self.later.pushed < self.rounds.streams() || done > 0 {
                        // Streams have deadlines of their own.
                        heard = Instant::now();
                    }
                }
                (Err(error), _, _) | (_, Err(error), _) => {
                    log::warn!(error:% = error; "post-copy");
                    return SourceEvent::LinkLost;
                }
                (_, _, Err(error)) => {
                    log::warn!(error:% = error; "connection lost in post-copy");
                    return SourceEvent::LinkLost;
                }
            }
            self.rounds.show_push(pages);
            if heard.elapsed() > self.patience {
                return SourceEvent::DeadlinePassed;
            }
        }
    }

    pub(super) fn begin_serving(&mut self, begin: Instant) {
        self.later.peer_has_it = true;
        if self.later.began.is_some() {
            return;
        }
        self.blackout.commit_us = micros(begin.elapsed());
        self.blackout.total_us = micros(self.stopped.elapsed());
        self.later.began = Some(Instant::now());
        let missing = std::mem::take(&mut self.later.missing);
        let pages = Rounds::bytes_of(&missing) / crate::PAGE_BYTES;
        self.later.report = Some(Postcopy {
            pages,
            ..Postcopy::default()
        });
        log::info!(pages; "the destination runs the VM and fetches what is missing");
        self.handle
            .update(|progress| progress.phase = Phase::Postcopy);
        self.rounds.push(missing);
    }

    pub(super) fn complete(&mut self, complete: Complete) {
        let total = self.later.began.map_or(Duration::ZERO, |at| at.elapsed());
        if let Some(report) = &mut self.later.report {
            report.total_us = micros(total);
            report.faults = complete.faults;
            report.mean_fault_us = complete.waited_us / complete.faults.max(1);
            report.longest_fault_us = complete.longest_us;
        }
    }

    /// The machine's halves stand still on both sides until somebody gives up.
    pub(super) fn wait_for_link(&mut self) -> SourceEvent {
        self.control.channel.breaker().break_off();
        self.stop_server();
        log::error!(
            "the connection broke in post-copy: the VM stands still, with parts of its memory here"
        );
        self.handle
            .update(|progress| progress.phase = Phase::Unlinked);
        loop {
            let in_doubt = !self.later.peer_has_it;
            if self.handle.is_abandoned() || (in_doubt && self.handle.is_cancelled()) {
                return SourceEvent::GiveUp;
            }
            std::thread::sleep(TICK);
        }
    }
}
