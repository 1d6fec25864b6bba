//! A migration from beginning to end, as the destination sees it.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::options::{DestinationError, DestinationOptions, Received};
use super::pull::{Fetcher, Missing, Puller};
use super::stream::Stream;
use super::takeover::Takeover;
use crate::bitmap::DirtyBitmap;
use crate::codec::{DecodeError, Decoder};
use crate::page::{PageIndex, PageRun};
use crate::ports::{Accept, Channel, Host, Incoming, PageStore};
use crate::section::Section;
use crate::wire::message::{Hello, MAGIC, Offer, Reasons, Welcome};
use crate::wire::{FrameError, FrameReader, Message, Versions};

/// How often a wait looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(20);

/// How long a connection may take to show its token.
const ATTACH_TIME: Duration = Duration::from_secs(2);

/// How long a source whose data connection failed may take to say why.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Sections and their bytes at most; a machine with hundreds of devices stays far below.
const MAX_SECTIONS: usize = 4096;
const MAX_SECTION_BYTES: usize = 256 << 20;

/// The control connection.
pub(super) struct Control<'a> {
    channel: Box<dyn Channel>,
    reader: FrameReader,
    pub(super) patience: Duration,
    cancelled: &'a AtomicBool,
}

impl Control<'_> {
    pub(super) fn send(&mut self, message: &Message) -> Result<(), FrameError> {
        self.channel.set_timeout(self.patience)?;
        Ok(message.send(&mut *self.channel)?)
    }

    pub(super) fn break_off(&self) {
        self.channel.breaker().break_off();
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// A message that has come within a moment, if any.
    pub(super) fn poll(&mut self) -> Result<Option<Message>, FrameError> {
        self.channel.set_timeout(TICK)?;
        match Message::receive(&mut self.reader, &mut *self.channel) {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.is_timeout() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The next message; meanwhile `check` is called now and then.
    pub(super) fn receive(
        &mut self,
        mut check: impl FnMut() -> Result<(), DestinationError>,
    ) -> Result<Message, DestinationError> {
        let deadline = Instant::now() + self.patience;
        loop {
            match self.poll()? {
                Some(Message::Abort(reasons)) => {
                    return Err(DestinationError::Peer(reasons.reasons.join("; ")));
                }
                Some(message) => return Ok(message),
                None => {}
            }
            check()?;
            if self.is_cancelled() {
                return Err(DestinationError::Cancelled);
            }
            if Instant::now() > deadline {
                let silent = std::io::Error::from(std::io::ErrorKind::TimedOut);
                return Err(silent.into());
            }
        }
    }
}

/// Takes a machine over that comes on `channel`, the control connection; data connections come
/// through `accept`.
///
/// # Errors
/// [`DestinationError`]: no machine has come, and nothing of it is left here.
pub fn receive(
    channel: Box<dyn Channel>,
    accept: &mut dyn Accept,
    host: &mut dyn Host,
    options: &DestinationOptions,
    cancelled: &AtomicBool,
) -> Result<Received, DestinationError> {
    let breaker = channel.breaker();
    let mut control = Control {
        channel,
        reader: FrameReader::default(),
        patience: options.patience,
        cancelled,
    };
    let result = take(&mut control, accept, host, options);
    if let Err(error) = &result {
        let reasons = Reasons::one(error.cause(), error.chain());
        let told = match error {
            // It knows, or does not listen.
            DestinationError::Peer(_) | DestinationError::Handoff(_) => return result,
            DestinationError::Claim(_) => return result,
            DestinationError::Refused(all) => Message::Refuse(Reasons {
                reasons: all.clone(),
                ..reasons
            }),
            _ => Message::Abort(reasons),
        };
        let _ = control.send(&told);
        breaker.break_off();
    }
    result
}

fn take(
    control: &mut Control<'_>,
    accept: &mut dyn Accept,
    host: &mut dyn Host,
    options: &DestinationOptions,
) -> Result<Received, DestinationError> {
    greet(control, accept, options)?;
    let offer = match control.receive(|| Ok(()))? {
        Message::Offer(offer) => offer,
        other => return Err(unexpected(&other)),
    };
    let machine = prepare(&offer, host, options)?;
    control.send(match offer.postcopy {
        true => &Message::AcceptPostcopy,
        false => &Message::Accept,
    })?;
    let mut streams = attach(control, accept, &offer, options)?;
    // The last one.
    let priority = if offer.postcopy { streams.pop() } else { None };
    transfer(control, (streams, priority), machine)
}

fn greet(
    control: &mut Control<'_>,
    accept: &dyn Accept,
    options: &DestinationOptions,
) -> Result<(), DestinationError> {
    let Hello {
        magic,
        oldest,
        newest,
    } = match control.receive(|| Ok(()))? {
        Message::Hello(hello) => hello,
        other => return Err(unexpected(&other)),
    };
    if magic != MAGIC {
        let text = format!("it introduces itself as {magic:?}");
        return Err(DestinationError::Protocol(text));
    }
    let version = Versions::OURS.choose(Versions { oldest, newest });
    let version = version.map_err(|error| DestinationError::Refused(vec![error.to_string()]))?;
    control.send(&Message::Welcome(Welcome {
        version,
        token: options.token.clone(),
        data_url: accept.url(),
    }))?;
    Ok(())
}

/// Has the machine built, and compares its memory with the source's.
fn prepare(
    offer: &Offer,
    host: &mut dyn Host,
    options: &DestinationOptions,
) -> Result<Box<dyn Incoming>, DestinationError> {
    if offer.streams == 0 || offer.streams > options.max_streams {
        let (found, limit) = (offer.streams, options.max_streams);
        let text = format!("{found} data connections are asked for, 1 to {limit} are possible");
        return Err(DestinationError::Refused(vec![text]));
    }
    let machine = host
        .prepare(&offer.skeleton)
        .map_err(DestinationError::Refused)?;
    let offered = offer.regions.iter();
    let offered: Option<Vec<_>> = offered
        .map(|(start, count)| PageRun::new(PageIndex(*start), *count))
        .collect();
    if offered.as_ref() != Some(&machine.pages().regions()) {
        let text = "memory is laid out differently here".to_owned();
        return Err(DestinationError::Refused(vec![text]));
    }
    if offer.postcopy
        && let Some(obstacle) = machine.postcopy_obstacle()
    {
        let text = format!("post-copy is not possible: {obstacle}");
        return Err(DestinationError::Refused(vec![text]));
    }
    Ok(machine)
}

/// Waits for the data connections. Strangers are turned away.
fn attach(
    control: &Control<'_>,
    accept: &mut dyn Accept,
    offer: &Offer,
    options: &DestinationOptions,
) -> Result<Vec<Stream>, DestinationError> {
    let deadline = Instant::now() + options.patience;
    let expected = offer.streams + u16::from(offer.postcopy);
    let mut streams: Vec<Option<Stream>> = (0..expected).map(|_| None).collect();
    let mut found = 0;
    while found < expected {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut channel = match accept.accept(left.min(TICK)) {
            Ok(channel) => channel,
            Err(_) if control.is_cancelled() => return Err(DestinationError::Cancelled),
            Err(error) if error.kind() == ErrorKind::TimedOut && !left.is_zero() => continue,
            Err(source) => {
                return Err(DestinationError::Attach {
                    found,
                    expected,
                    source,
                });
            }
        };
        channel.set_timeout(ATTACH_TIME.min(options.patience))?;
        let mut reader = FrameReader::default();
        let shown = Message::receive(&mut reader, &mut *channel);
        let Ok(Message::Attach(attach)) = shown else {
            log::warn!("a connection did not attach itself as one of this migration");
            continue;
        };
        let place = streams.get_mut(usize::from(attach.index));
        match place {
            Some(place @ None) if same(&attach.token, &options.token) => {
                channel.set_timeout(options.patience)?;
                *place = Some(Stream { channel, reader });
                found += 1;
            }
            _ => log::warn!("a connection did not show this migration's token"),
        }
    }
    Ok(streams.into_iter().flatten().collect())
}

/// Compares without telling by the time it takes how much was right.
fn same(shown: &[u8], token: &[u8]) -> bool {
    let difference = shown.iter().zip(token).fold(0, |all, (a, b)| all | (a ^ b));
    shown.len() == token.len() && difference == 0
}

type StreamResult = (u16, Result<(), DecodeError>);

/// Takes pages and sections, then the hand-off.
fn transfer(
    control: &mut Control<'_>,
    (streams, priority): (Vec<Stream>, Option<Stream>),
    machine: Box<dyn Incoming>,
) -> Result<Received, DestinationError> {
    let pages = machine.pages();
    let regions = &pages.regions();
    let channels = streams.iter().chain(&priority);
    let breakers: Vec<_> = channels.map(|stream| stream.channel.breaker()).collect();
    let expected = streams.len();
    let stopped = Arc::new(AtomicBool::new(false));
    let fetcher = priority.map(|stream| Fetcher::new(stream, stopped.clone(), control.patience));
    std::thread::scope(|scope| {
        let (results, inbox) = channel();
        let mut orders = Vec::new();
        let spawn = |name: String, work, later| {
            let thread = std::thread::Builder::new().name(name);
            let results = results.clone();
            let spawned = thread.spawn_scoped(scope, move || match work {
                Work::Carry(stream, index, pages) => {
                    carry(stream, index, (regions, pages), (&results, &later));
                }
                Work::Fetch(fetcher) => fetch(fetcher, &results, &later),
            });
            spawned.map(drop).inspect_err(|_| {
                breakers.iter().for_each(|breaker| breaker.break_off());
            })
        };
        for (stream, index) in streams.into_iter().zip(0..) {
            let (order, later) = channel();
            orders.push(order);
            let work = Work::Carry(stream, index, &*pages);
            spawn(format!("mig-{index}"), work, later)?;
        }
        if let Some(fetcher) = fetcher {
            let (order, later) = channel();
            orders.push(order);
            spawn("mig-fault".to_owned(), Work::Fetch(fetcher), later)?;
        }
        let mut ended = Ended {
            inbox,
            missing: expected,
        };
        let gathered = gather(control, &mut ended, regions);
        let gathered = gathered.map_err(|error| explain(control, error));
        let result = gathered.and_then(|(sections, later)| {
            let puller = later.map(|later| Puller {
                orders: std::mem::take(&mut orders),
                breakers: breakers.clone(),
                stopped: Arc::clone(&stopped),
                later,
            });
            ended.missing = expected;
            // Threads without an order have nothing left to do.
            orders.clear();
            Takeover::new(control, machine, sections, puller.map(|p| (p, ended))).run()
        });
        if result.is_err() {
            breakers.iter().for_each(|breaker| breaker.break_off());
        }
        result
    })
}

/// What a thread does.
enum Work<'a> {
    Carry(Stream, u16, &'a dyn PageStore),
    Fetch(Fetcher),
}

/// Fetches pages that somebody waits for, once `later` says so.
fn fetch(fetcher: Fetcher, results: &Sender<StreamResult>, later: &Receiver<Arc<Missing>>) {
    if let Ok(missing) = later.recv() {
        // The one who asked may have given up.
        let _ = results.send((PRIORITY, fetcher.run(&missing)));
    }
}

/// The number under which the connection for pages that are needed at once reports.
const PRIORITY: u16 = u16::MAX;

/// Takes what comes on a data connection, before the machine starts and, if `later` says so,
/// afterwards.
fn carry(
    mut stream: Stream,
    index: u16,
    (regions, pages): (&[PageRun], &dyn PageStore),
    (results, later): (&Sender<StreamResult>, &Receiver<Arc<Missing>>),
) {
    let result = stream.drain(Decoder::new(regions), pages);
    let ended_well = result.is_ok();
    // The one who asked may have given up.
    let _ = results.send((index, result));
    if ended_well && let Ok(missing) = later.recv() {
        let result = stream.drain(Decoder::into_used(regions), &*missing);
        let _ = results.send((index, result));
    }
}

/// Which data connections are still at work.
pub(super) struct Ended {
    inbox: Receiver<StreamResult>,
    pub(super) missing: usize,
}

impl Ended {
    /// Notes those that have ended; the first failure is an error.
    pub(super) fn check(&mut self, wait: Duration) -> Result<(), DestinationError> {
        while self.missing > 0 {
            let Ok((index, result)) = self.inbox.recv_timeout(wait) else {
                return Ok(());
            };
            result.map_err(|source| DestinationError::Stream { index, source })?;
            self.missing -= usize::from(index != PRIORITY);
        }
        Ok(())
    }
}

/// Device states and, in a post-copy, the pages that come later.
type Gathered = (Vec<Section>, Option<Vec<DirtyBitmap>>);

/// Everything until [`Message::Prepare`], and all pages that come before it.
fn gather(
    control: &mut Control<'_>,
    ended: &mut Ended,
    regions: &[PageRun],
) -> Result<Gathered, DestinationError> {
    let mut sections: Vec<Section> = Vec::new();
    let mut later = None;
    let mut bytes = 0;
    let expected = loop {
        match control.receive(|| ended.check(Duration::ZERO))? {
            Message::Round(round) => {
                log::debug!(round = round.number, pages = round.pages; "round of pre-copy");
            }
            Message::Section(section) => {
                bytes += section.bytes.len();
                sections.push(section);
                if sections.len() > MAX_SECTIONS || bytes > MAX_SECTION_BYTES {
                    let count = sections.len();
                    let text = format!("{count} device states with {bytes} bytes are too many");
                    return Err(DestinationError::Protocol(text));
                }
            }
            Message::Missing(missing) => note_missing(&mut later, &missing.runs, regions)?,
            Message::Prepare(prepare) => break prepare.sections,
            other => return Err(unexpected(&other)),
        }
    };
    if usize::try_from(expected) != Ok(sections.len()) {
        let found = sections.len();
        let text = format!("{found} device states have come, {expected} were sent");
        return Err(DestinationError::Protocol(text));
    }
    let deadline = Instant::now() + control.patience;
    while ended.missing > 0 {
        ended.check(TICK)?;
        if Instant::now() > deadline {
            let silent = std::io::Error::from(std::io::ErrorKind::TimedOut);
            return Err(silent.into());
        }
    }
    Ok((sections, later))
}

/// Marks pages that come later.
fn note_missing(
    later: &mut Option<Vec<DirtyBitmap>>,
    runs: &[(u64, u64)],
    regions: &[PageRun],
) -> Result<(), DestinationError> {
    let bitmap = |region: &PageRun| DirtyBitmap::new(region.start, region.count);
    let later = later.get_or_insert_with(|| regions.iter().map(bitmap).collect());
    for (start, count) in runs {
        let run = PageRun::new(PageIndex(*start), *count);
        let place = run.and_then(|run| {
            let holds = |region: &&PageRun| region.start <= run.start && run.end() <= region.end();
            let index = regions.iter().position(|region| holds(&region))?;
            later.get_mut(index).zip(Some(run))
        });
        let Some((bitmap, run)) = place else {
            let text = format!("{count} missing pages at {start} are not guest memory");
            return Err(DestinationError::Protocol(text));
        };
        bitmap.insert(run);
    }
    Ok(())
}

/// A source that gives up breaks its data connections off and says why on the control connection:
/// its word counts, not what the breaking looked like.
fn explain(control: &mut Control<'_>, error: DestinationError) -> DestinationError {
    let deadline = Instant::now() + LAST_WORDS;
    while matches!(error, DestinationError::Stream { .. }) && Instant::now() < deadline {
        match control.poll() {
            Ok(Some(Message::Abort(reasons))) => {
                return DestinationError::Peer(reasons.reasons.join("; "));
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    error
}

pub(super) fn unexpected(message: &Message) -> DestinationError {
    DestinationError::Protocol(format!("{:?} has no place here", message.kind()))
}
