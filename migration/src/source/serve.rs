//! Post-copy: pages that the destination's guest waits for.

use std::sync::atomic::{AtomicBool, Ordering};

use super::frames::{Outgoing, read_runs};
use super::options::SourceError;
use super::stream::Shared;
use crate::bitmap::DirtyBitmap;
use crate::codec::{Encoder, Encoding};
use crate::page::{PAGE_BYTES, PageIndex, PageRun};
use crate::ports::Channel;
use crate::wire::batch::BATCH_PAGES;
use crate::wire::message::Fetch;
use crate::wire::{FrameError, FrameReader, Message};

/// The connection for pages that are needed at once.
pub(super) struct Server<'a> {
    shared: &'a Shared<'a>,
    channel: Box<dyn Channel>,
    encoder: Encoder,
    buffer: Vec<u8>,
    out: Vec<u8>,
}

impl<'a> Server<'a> {
    pub(super) fn new(shared: &'a Shared<'a>, channel: Box<dyn Channel>) -> Self {
        Self {
            shared,
            channel,
            encoder: Encoder::new(0),
            buffer: Vec::new(),
            out: Vec::new(),
        }
    }

    /// Answers until the connection ends; `failed` says afterwards that it did not by `stopped`.
    pub(super) fn run(mut self, stopped: &AtomicBool, failed: &AtomicBool) {
        let result = self.serve();
        if let Err(error) = result
            && !stopped.load(Ordering::SeqCst)
        {
            log::warn!(error:% = error; "pages that are needed at once can no longer be served");
            failed.store(true, Ordering::SeqCst);
        }
    }

    fn serve(&mut self) -> Result<(), SourceError> {
        let mut reader = FrameReader::default();
        loop {
            match Message::receive(&mut reader, &mut *self.channel) {
                Ok(Message::Fetch(fetch)) => self.answer(fetch)?,
                Ok(other) => return Err(super::connect::unexpected(&other)),
                // The guest may need nothing for long.
                Err(error) if error.is_timeout() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// One frame of pages for each request.
    fn answer(&mut self, fetch: Fetch) -> Result<(), SourceError> {
        let wanted = PageRun::new(PageIndex(fetch.page), u64::from(fetch.count));
        let wanted = wanted.filter(|run| run.count <= BATCH_PAGES);
        let wanted = wanted.ok_or_else(|| {
            let text = format!("Fetch of {} pages at {}", fetch.count, fetch.page);
            FrameError::Invalid(text)
        })?;
        let mut data = DirtyBitmap::new(wanted.start, wanted.count);
        let mut holes = data.clone();
        holes.insert(wanted);
        for run in self.shared.pages.data_runs(wanted)? {
            data.insert(run);
            holes.remove(run);
        }
        let runs: Vec<_> = data.runs().collect();
        let zeroes: Vec<_> = holes.runs().collect();
        let bytes = data.count() * PAGE_BYTES;
        self.buffer
            .resize(usize::try_from(bytes).unwrap_or(usize::MAX), 0);
        read_runs(self.shared.pages, &runs, &mut self.buffer)?;
        self.out.clear();
        let (counts, raw) = self.encoder.encode(
            wanted.start,
            (&runs, &self.buffer),
            &zeroes,
            Encoding::Raw,
            &mut self.out,
        );
        self.shared.totals.count(&counts);
        let outgoing = Outgoing::new(&self.out, &self.buffer, &raw);
        let sent = outgoing.bytes();
        outgoing.write(&mut *self.channel)?;
        self.channel.flush()?;
        let total = &self.shared.totals.wire_bytes;
        total.fetch_add(sent as u64, Ordering::Relaxed);
        Ok(())
    }
}
