//! Post-copy: pages that come after the machine has started, those first that somebody waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::control::TICK;
use super::missing::Missing;
use super::stream::Stream;
use crate::bitmap::DirtyBitmap;
use crate::codec::{DecodeError, Decoder};
use crate::page::PageIndex;
use crate::ports::{Breaker, LazyMemory, PageStore};
use crate::wire::message::Fetch;
use crate::wire::{FrameError, FrameKind, Message};

/// The threads that bring pages, as the one who drives the hand-off sees them. Dropping it ends
/// them.
pub(super) struct Puller {
    /// They wait for this to begin.
    pub(super) orders: Vec<Sender<Arc<Missing>>>,
    pub(super) breakers: Vec<Arc<dyn Breaker>>,
    pub(super) stopped: Arc<AtomicBool>,
    /// Pages that come later, by region.
    pub(super) later: Vec<DirtyBitmap>,
}

impl Puller {
    /// Pages are placed from now on.
    pub(super) fn begin(&mut self, lazy: Arc<dyn LazyMemory>) -> Arc<Missing> {
        let missing = Arc::new(Missing::new(std::mem::take(&mut self.later), lazy));
        for order in self.orders.drain(..) {
            // A thread that has ended has said why.
            let _ = order.send(Arc::clone(&missing));
        }
        missing
    }

    /// Breaks every connection for pages off.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.breakers.iter().for_each(|breaker| breaker.break_off());
    }
}

impl Drop for Puller {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The connection for pages that are needed at once.
pub(super) struct Fetcher {
    stream: Stream,
    stopped: Arc<AtomicBool>,
    patience: Duration,
    /// Answers that are on their way.
    expected: usize,
}

impl Fetcher {
    pub(super) fn new(stream: Stream, stopped: Arc<AtomicBool>, patience: Duration) -> Self {
        Self {
            stream,
            stopped,
            patience,
            expected: 0,
        }
    }

    /// Fetches what somebody waits for, until it is stopped.
    pub(super) fn run(mut self, missing: &Missing) -> Result<(), DecodeError> {
        let result = self.serve(missing);
        match self.stopped.load(Ordering::SeqCst) {
            true => Ok(()),
            false => result,
        }
    }

    fn serve(&mut self, missing: &Missing) -> Result<(), DecodeError> {
        let mut decoder = Decoder::into_used(&missing.regions());
        let mut payload = Vec::new();
        // What was asked for on a connection that broke is asked for again.
        self.request(missing, &missing.asked())?;
        while !self.stopped.load(Ordering::SeqCst) {
            let wait = if self.expected > 0 {
                Duration::ZERO
            } else {
                TICK
            };
            let pages = Self::new_faults(missing, wait)?;
            self.request(missing, &pages)?;
            if self.expected > 0 {
                self.take(missing, &mut decoder, &mut payload)?;
            }
        }
        Ok(())
    }

    /// Everything that somebody waits for by now and that was not asked for yet.
    fn new_faults(missing: &Missing, wait: Duration) -> Result<Vec<PageIndex>, DecodeError> {
        let (mut pages, mut wait) = (Vec::new(), wait);
        while let Some(page) = missing.lazy.next_fault(wait)? {
            wait = Duration::ZERO;
            // Before anything can fail.
            if missing.note_asked(page) {
                pages.push(page);
            } else if !missing.is_to_be_fetched(page)? {
                // It has come, was given back, and was touched again before its answer is here.
                missing.forget_asked(page);
            }
        }
        Ok(pages)
    }

    fn request(&mut self, missing: &Missing, pages: &[PageIndex]) -> Result<(), DecodeError> {
        let mut frames = Vec::new();
        for page in pages {
            if !missing.is_to_be_fetched(*page)? {
                missing.forget_asked(*page);
                continue;
            }
            self.expected += 1;
            let fetch = Fetch {
                page: page.0,
                count: 1,
            };
            let frame = Message::Fetch(fetch).encode().map_err(FrameError::from)?;
            frames.extend_from_slice(&frame);
        }
        if frames.is_empty() {
            return Ok(());
        }
        let channel = &mut self.stream.channel;
        let sent = channel.write_all(&frames).and_then(|()| channel.flush());
        Ok(sent.map_err(FrameError::from)?)
    }

    /// Takes one answer.
    fn take(
        &mut self,
        missing: &Missing,
        decoder: &mut Decoder,
        payload: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        let Stream { channel, reader } = &mut self.stream;
        let channel = &mut **channel;
        channel
            .set_timeout(self.patience)
            .map_err(FrameError::from)?;
        match reader.read(channel, payload)? {
            FrameKind::Pages => {
                decoder.decode(payload, (reader, channel), missing)?;
            }
            other => {
                let text = format!("{other:?} as an answer to Fetch");
                return Err(FrameError::Invalid(text).into());
            }
        }
        self.expected -= 1;
        missing.note_answers();
        Ok(())
    }
}
