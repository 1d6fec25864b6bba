//! Post-copy: the destination runs the machine while its pages are served from here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};

use super::control::TICK;
use super::options::SourceError;
use super::relink::NewLink;
use super::rounds::{Rounds, micros};
use super::serve::Server;
use super::switchover::Switchover;
use super::workers::Workers;
use crate::bitmap::DirtyBitmap;
use crate::handoff::{self, Mode, SourceEvent};
use crate::ports::{Breaker, Channel};
use crate::progress::{Phase, Postcopy};
use crate::wire::message::Complete;
use crate::wire::{Message, missing};

/// Post-copy's part of a switchover.
#[derive(Default)]
pub(super) struct Later {
    /// Pages that the destination does not have.
    pub(super) missing: Vec<DirtyBitmap>,
    pub(super) report: Option<Postcopy>,
    pub(super) began: Option<Instant>,
    /// Pages that are pushed.
    pushing: u64,
    /// Streams that have sent all of theirs.
    pushed: usize,
    /// Whether the destination has, for all that is known, taken the machine over.
    pub(super) peer_has_it: bool,
    /// The connections of the link, but for the control connection.
    breakers: Vec<Arc<dyn Breaker>>,
    /// The thread that answers the destination's requests.
    server: ServerFlags,
    pub(super) reconnections: u32,
    /// Somebody no longer wanted to wait for a new link.
    pub(super) given_up: bool,
    /// A new link that is not in use yet.
    pub(super) link: Option<NewLink>,
}

#[derive(Clone, Default)]
struct ServerFlags {
    stopped: Arc<AtomicBool>,
    failed: Arc<AtomicBool>,
}

impl Later {
    /// Over these connections.
    pub(super) fn over(breakers: Vec<Arc<dyn Breaker>>) -> Self {
        Self {
            breakers,
            ..Self::default()
        }
    }
}

impl<'a> Switchover<'_, 'a, '_> {
    /// In a post-copy, what the destination does not have.
    pub(super) fn send_missing(&mut self) -> Result<(), SourceError> {
        if self.mode == Mode::Precopy {
            return Ok(());
        }
        for message in missing::messages(&self.later.missing) {
            self.control.send(&message)?;
        }
        Ok(())
    }

    /// Starts the thread that answers the destination's requests on `channel`.
    pub(super) fn start_server<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        channel: Box<dyn Channel>,
    ) -> std::io::Result<()>
    where
        'a: 'scope,
    {
        let server = Server::new(self.rounds.shared, channel);
        let flags = self.later.server.clone();
        let serve = move || server.run(&flags.stopped, &flags.failed);
        let thread = std::thread::Builder::new().name("mig-fetch".to_owned());
        thread.spawn_scoped(scope, serve).map(drop)
    }

    /// Breaks all connections for pages off.
    pub(super) fn stop_serving(&self) {
        self.later.server.stopped.store(true, Ordering::SeqCst);
        let breakers = self.later.breakers.iter();
        breakers.for_each(|breaker| breaker.break_off());
    }

    /// The destination has answered the commit that was sent at `begin`, or has connected again:
    /// pages are pushed and served until it has all of them.
    pub(super) fn serve(&mut self, begin: Instant) -> SourceEvent {
        let is_first = self.begin_serving(begin);
        let Some(link) = self.later.link.take() else {
            if is_first {
                let missing = std::mem::take(&mut self.later.missing);
                self.push(missing);
            }
            return self.watch();
        };
        log::info!("the destination is connected again and goes on fetching what is missing");
        std::thread::scope(|scope| {
            let NewLink {
                missing,
                data,
                priority,
            } = link;
            let channels = data.iter().chain(&priority);
            self.later.breakers = channels.map(|channel| channel.breaker()).collect();
            self.later.server = ServerFlags::default();
            let server = match priority {
                Some(channel) => self.start_server(scope, channel),
                None => Ok(()),
            };
            let workers = server.and_then(|()| self.start_workers(scope, data));
            let event = match workers {
                Ok(()) => {
                    self.push(missing);
                    self.watch()
                }
                Err(error) => {
                    log::error!(error:% = error; "no threads to serve pages with");
                    SourceEvent::LinkLost
                }
            };
            // The threads are awaited.
            self.stop_serving();
            self.rounds.replace_workers(Workers::none());
            event
        })
    }

    fn start_workers<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        data: Vec<Box<dyn Channel>>,
    ) -> std::io::Result<()>
    where
        'a: 'scope,
    {
        let (workers, _) = Workers::start(scope, self.rounds.shared, data)?;
        self.rounds.replace_workers(workers);
        Ok(())
    }

    /// Keeps an eye on everything while pages travel.
    fn watch(&mut self) -> SourceEvent {
        let pages = self.later.pushing;
        let mut heard = Instant::now();
        let mut moved = (self.sent_bytes(), Instant::now());
        loop {
            let sent = self.sent_bytes();
            if sent != moved.0 {
                moved = (sent, Instant::now());
            }
            // Whoever wants an end waits for pages that travel, not for a peer that only talks.
            if self.handle.is_abandoned() && moved.1.elapsed() > self.patience {
                return SourceEvent::LinkLost;
            }
            if self.later.server.failed.load(Ordering::SeqCst) {
                return SourceEvent::LinkLost;
            }
            let streams = self.rounds.streams_done(Duration::ZERO);
            let life = self.rounds.show_life(self.control, pages);
            let message = self.control.poll(TICK);
            match (streams, life, message) {
                (_, _, Ok(Some(Message::Complete(complete)))) => {
                    self.complete(complete);
                    // It goes on telling until it is heard; without this, for a while.
                    let _ = self.control.send(&Message::StreamEnd);
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

    fn sent_bytes(&self) -> u64 {
        self.rounds.shared.totals.wire_bytes.load(Ordering::Relaxed)
    }

    /// Notes that the machine is the destination's; whether that is news.
    fn begin_serving(&mut self, begin: Instant) -> bool {
        self.later.peer_has_it = true;
        if self.later.began.is_some() {
            return false;
        }
        self.blackout.commit_us = micros(begin.elapsed());
        self.blackout.total_us = micros(self.stopped.elapsed());
        self.later.began = Some(Instant::now());
        let pages = Rounds::bytes_of(&self.later.missing) / crate::PAGE_BYTES;
        self.later.report = Some(Postcopy {
            pages,
            ..Postcopy::default()
        });
        log::info!(pages; "the destination runs the VM and fetches what is missing");
        self.handle
            .update(|progress| progress.phase = Phase::Postcopy);
        true
    }

    fn push(&mut self, missing: Vec<DirtyBitmap>) {
        self.later.pushed = 0;
        self.later.pushing = Rounds::bytes_of(&missing) / crate::PAGE_BYTES;
        self.rounds.push(missing);
    }

    fn complete(&mut self, complete: Complete) {
        let total = self.later.began.map_or(Duration::ZERO, |at| at.elapsed());
        if let Some(report) = &mut self.later.report {
            report.total_us = micros(total);
            report.faults = complete.faults;
            report.mean_fault_us = complete.waited_us / complete.faults.max(1);
            report.longest_fault_us = complete.longest_us;
        }
    }
}
