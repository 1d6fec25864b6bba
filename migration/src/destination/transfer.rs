//! The data connections' threads.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;
use std::time::Duration;

use super::attach::Door;
use super::control::Control;
use super::devices::Devices;
use super::mend::Mender;
use super::missing::Missing;
use super::options::{DestinationError, Received, StreamError};
use super::pull::{Fetcher, Puller};
use super::receive::gather;
use super::relink::NewLinks;
use super::stream::Stream;
use super::takeover::{Later, Takeover};
use crate::codec::Decoder;
use crate::page::PageRun;
use crate::ports::{Incoming, PageStore};

pub(super) type StreamResult = (u16, Result<(), StreamError>);

/// Takes pages and sections, then the hand-off. In a post-copy, connections of a new link come
/// through `door`, as do those that take the place of others that broke.
pub(super) fn transfer(
    control: &mut Control<'_>,
    mut door: Door<'_>,
    (streams, priority): (Vec<Stream>, Option<Stream>),
    (machine, devices): (Box<dyn Incoming>, Devices),
) -> Result<Received, DestinationError> {
    let pages = machine.pages();
    let regions = &pages.regions();
    let channels = streams.iter().chain(&priority);
    let mut breakers: Vec<_> = channels.map(|stream| stream.channel.breaker()).collect();
    let expected = streams.len();
    let stopped = Arc::new(AtomicBool::new(false));
    let fetcher = priority.map(|stream| Fetcher::new(stream, stopped.clone(), control.patience));
    std::thread::scope(|scope| {
        let (results, inbox) = channel();
        let has_fetcher = fetcher.is_some();
        let devices = &devices;
        let break_off = || breakers.iter().for_each(|breaker| breaker.break_off());
        let threads = start(
            scope,
            (streams, fetcher),
            (regions, &*pages, devices),
            &results,
        );
        let Threads { mut orders, places } = threads.inspect_err(|_| {
            break_off();
            devices.end();
        })?;
        // The threads have theirs: once they have ended, nothing more comes.
        drop(results);
        let mut ended = Ended {
            inbox,
            running: expected,
        };
        let mender = Mender::new(&mut door, &mut breakers, places);
        let gathered = gather(control, (&mut ended, mender), regions, has_fetcher);
        let result = gathered.and_then(|(sections, later)| {
            devices.check_whole()?;
            let puller = later.map(|later| Puller {
                orders: std::mem::take(&mut orders),
                breakers: breakers.clone(),
                stopped: Arc::clone(&stopped),
                later,
            });
            ended.running = expected;
            // Threads without an order have nothing left to do.
            orders.clear();
            let later = puller.map(|puller| Later {
                puller,
                ended,
                linger: door.linger,
                link: NewLinks::new(door, expected),
            });
            Takeover::new(control, (machine, devices), sections, later).run()
        });
        if result.is_err() {
            breakers.iter().for_each(|breaker| breaker.break_off());
            devices.end();
        }
        result
    })
}

/// Ways to the threads.
#[derive(Default)]
struct Threads {
    /// To all: begin with the pages that come later.
    orders: Vec<Sender<Arc<Missing>>>,
    /// To those that carry pages: go on with another connection.
    places: Vec<Sender<Stream>>,
}

/// Where things go before the machine starts: memory with its regions, and devices.
type Target<'a> = (&'a [PageRun], &'a dyn PageStore, &'a Devices);

/// A thread per data connection.
fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    (streams, fetcher): (Vec<Stream>, Option<Fetcher>),
    target: Target<'scope>,
    results: &Sender<StreamResult>,
) -> std::io::Result<Threads> {
    let mut threads = Threads::default();
    let builder = |name: String| std::thread::Builder::new().name(name);
    for (stream, index) in streams.into_iter().zip(0..) {
        let ((order, later), (place, next)) = (channel(), channel());
        threads.orders.push(order);
        threads.places.push(place);
        let (line, results) = (Line { stream, next }, results.clone());
        builder(format!("mig-{index}")).spawn_scoped(scope, move || {
            carry(line, index, target, (&results, &later))
        })?;
    }
    if let Some(fetcher) = fetcher {
        let (order, later) = channel();
        threads.orders.push(order);
        let results = results.clone();
        builder("mig-fault".to_owned())
            .spawn_scoped(scope, move || fetch(fetcher, &results, &later))?;
    }
    Ok(threads)
}

/// Fetches pages that somebody waits for, once `later` says so.
fn fetch(fetcher: Fetcher, results: &Sender<StreamResult>, later: &Receiver<Arc<Missing>>) {
    if let Ok(missing) = later.recv() {
        // The one who asked may have given up.
        let _ = results.send((PRIORITY, fetcher.run(&missing).map_err(Into::into)));
    }
}

/// The number under which the connection for pages that are needed at once reports.
pub(super) const PRIORITY: u16 = u16::MAX;

/// A data connection, and those that take its place when it breaks.
struct Line {
    stream: Stream,
    next: Receiver<Stream>,
}

impl Line {
    /// Takes all pages that come before the machine starts. The decoder knows which pages were
    /// written, over whichever connection.
    fn drain(&mut self, (regions, pages, devices): Target<'_>) -> Result<(), StreamError> {
        let mut decoder = Decoder::new(regions);
        loop {
            match self.stream.drain(&mut decoder, pages, Some(devices)) {
                Err(error) if error.is_broken_link() => {
                    // The source may not have noticed.
                    self.stream.channel.breaker().break_off();
                    match self.next.recv() {
                        Ok(next) => self.stream = next,
                        // Too late for another.
                        Err(_) => return Err(error),
                    }
                }
                result => return result,
            }
        }
    }
}

/// Takes what comes on a data connection, before the machine starts and, if `later` says so,
/// afterwards.
fn carry(
    mut line: Line,
    index: u16,
    target: Target<'_>,
    (results, later): (&Sender<StreamResult>, &Receiver<Arc<Missing>>),
) {
    let result = line.drain(target);
    let ended_well = result.is_ok();
    // The one who asked may have given up.
    let _ = results.send((index, result));
    // Now it is known why, to others that cannot go on because of this.
    target.2.leave();
    if ended_well && let Ok(missing) = later.recv() {
        let mut decoder = Decoder::into_used(target.0);
        let result = line.stream.drain(&mut decoder, &*missing, None);
        let _ = results.send((index, result));
    }
}

/// Which data connections are still at work.
pub(super) struct Ended {
    inbox: Receiver<StreamResult>,
    /// Streams of pages that go on.
    pub(super) running: usize,
}

impl Ended {
    /// The threads of a new link; they all have the other end.
    pub(super) fn of(inbox: Receiver<StreamResult>, streams: usize) -> Self {
        Self {
            inbox,
            running: streams,
        }
    }

    /// Waits until no thread is left. Their connections are broken off.
    pub(super) fn wait_for_all(&mut self) {
        while self.inbox.recv().is_ok() {}
    }

    /// Notes those that have ended; the first failure is an error.
    pub(super) fn check(&mut self, wait: Duration) -> Result<(), DestinationError> {
        while self.running > 0 {
            let Ok((index, result)) = self.inbox.recv_timeout(wait) else {
                return Ok(());
            };
            result.map_err(|error| error.on(index))?;
            self.running -= usize::from(index != PRIORITY);
        }
        Ok(())
    }
}
