//! Post-copy: a new link after the first was cut.
//!
//! The source connects again. Its new control connection shows the token of the first and is told
//! which pages are missing; then the connections for pages come as they did at first.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::attach::{Door, Places};
use super::control::{Control, TICK};
use super::missing::Missing;
use super::options::DestinationError;
use super::pull::{Fetcher, Puller};
use super::receive::unexpected;
use super::stream::Stream;
use super::transfer::{Ended, PRIORITY};
use crate::bitmap::DirtyBitmap;
use crate::codec::Decoder;
use crate::ports::PageStore;
use crate::wire::message::CONTROL_INDEX;
use crate::wire::{Message, missing as list};

/// How long a look at the control connection takes.
const GLANCE: Duration = Duration::from_millis(1);

/// Where the connections of a new link come in.
pub(super) struct NewLinks<'a> {
    door: Door<'a>,
    /// Data connections, without the one for pages that are needed at once.
    streams: usize,
}

/// What became of an attempt to connect again.
enum Attempt {
    Linked(Puller, Ended),
    /// The source has given it up and begun another.
    Replaced(Stream),
    /// Nobody wants it any more.
    Over,
}

impl<'a> NewLinks<'a> {
    pub(super) fn new(door: Door<'a>, streams: usize) -> Self {
        Self { door, streams }
    }

    /// Waits until the source has connected again; `None` when `is_over` turns true. Afterwards
    /// `control` is the new control connection.
    pub(super) fn wait(
        &mut self,
        control: &mut Control<'_>,
        missing: &Arc<Missing>,
        is_over: &dyn Fn() -> bool,
    ) -> Option<(Puller, Ended)> {
        let mut next = None;
        loop {
            if is_over() {
                return None;
            }
            let Some(stream) = next.take().or_else(|| self.caller()) else {
                continue;
            };
            control.replace(stream);
            match self.attempt(control, missing, is_over) {
                Ok(Attempt::Linked(puller, ended)) => return Some((puller, ended)),
                Ok(Attempt::Replaced(stream)) => next = Some(stream),
                Ok(Attempt::Over) => return None,
                Err(error) => {
                    control.break_off();
                    log::warn!(error:% = error.chain(); "the source has connected again, but not stayed");
                }
            }
        }
    }

    /// A new control connection, if one comes within a moment.
    fn caller(&mut self) -> Option<Stream> {
        match self.door.next(TICK) {
            Ok(Some((CONTROL_INDEX, stream))) => Some(stream),
            // It belongs to an attempt that is over.
            Ok(Some((index, _))) => {
                log::debug!(index; "a data connection came without its control connection");
                None
            }
            Ok(None) => None,
            Err(error) => {
                self.door.complain(&error.to_string());
                std::thread::sleep(TICK);
                None
            }
        }
    }

    /// Tells the source what is missing, and waits for the other connections.
    fn attempt(
        &mut self,
        control: &mut Control<'_>,
        missing: &Arc<Missing>,
        is_over: &dyn Fn() -> bool,
    ) -> Result<Attempt, DestinationError> {
        let pages = missing.list();
        let count: u64 = pages.iter().map(DirtyBitmap::count).sum();
        log::info!(missing_pages = count; "the source has connected again");
        if count > 0 {
            for message in list::messages(&pages) {
                control.send(&message)?;
            }
        }
        control.send(&list::end())?;
        drop(pages);
        let expected = match count {
            0 => 0,
            _ => self.streams + 1,
        };
        let mut places = Places::new(u16::try_from(expected).unwrap_or(u16::MAX));
        let deadline = Instant::now() + control.patience;
        while !places.is_full() {
            if is_over() {
                return Ok(Attempt::Over);
            }
            if Instant::now() > deadline {
                return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
            }
            match self.door.next(TICK)? {
                Some((CONTROL_INDEX, stream)) => return Ok(Attempt::Replaced(stream)),
                Some((index, stream)) => {
                    let is_taken = places.take(index, stream);
                    if !is_taken {
                        self.door.complain("its number is taken, or too high");
                    }
                }
                None => {}
            }
            match control.poll_within(GLANCE)? {
                None | Some(Message::Round(_)) => {}
                Some(other) => return Err(unexpected(&other)),
            }
        }
        let (puller, ended) = pull(places.into_streams(), missing, control.patience)?;
        Ok(Attempt::Linked(puller, ended))
    }
}

/// Starts the threads of a new link; the last stream is for pages that are needed at once.
fn pull(
    mut streams: Vec<Stream>,
    missing: &Arc<Missing>,
    patience: Duration,
) -> std::io::Result<(Puller, Ended)> {
    let stopped = Arc::new(AtomicBool::new(false));
    let channels = streams.iter().map(|stream| &stream.channel);
    // Dropped on the way out of an error, it ends the threads that there are.
    let puller = Puller {
        breakers: channels.map(|channel| channel.breaker()).collect(),
        stopped: Arc::clone(&stopped),
        orders: Vec::new(),
        later: Vec::new(),
    };
    let (results, inbox) = channel();
    let priority = streams.pop();
    let ended = Ended::of(inbox, streams.len());
    for (mut stream, index) in streams.into_iter().zip(0..) {
        let (results, missing) = (results.clone(), Arc::clone(missing));
        let thread = std::thread::Builder::new().name(format!("mig-{index}"));
        thread.spawn(move || {
            let mut decoder = Decoder::into_used(&missing.regions());
            // The one who asked may have given up.
            let _ = results.send((index, stream.drain(&mut decoder, &*missing, None)));
        })?;
    }
    if let Some(stream) = priority {
        let missing = Arc::clone(missing);
        let fetcher = Fetcher::new(stream, stopped, patience);
        let thread = std::thread::Builder::new().name("mig-fault".to_owned());
        thread.spawn(move || {
            let _ = results.send((PRIORITY, fetcher.run(&missing).map_err(Into::into)));
        })?;
    }
    Ok((puller, ended))
}
