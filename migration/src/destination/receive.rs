//! A migration from beginning to end, as the destination sees it.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::attach::{Door, attach};
use super::control::Control;
use super::devices::Devices;
use super::mend::Mender;
use super::options::{DestinationError, DestinationOptions, Received};
use super::transfer::{Ended, transfer};
use crate::bitmap::DirtyBitmap;
use crate::handoff::Cause;
use crate::page::{PageIndex, PageRun};
use crate::ports::{Accept, Channel, Host, Incoming};
use crate::section::Section;
use crate::wire::message::{Hello, MAGIC, Offer, Reasons, Welcome};
use crate::wire::{FrameReader, Message, Versions, device, missing};

/// How long a connection that was opened again right before [`Message::Prepare`] may be on its way.
const LATE_CONNECTION: Duration = Duration::from_millis(100);

/// How long a look at the data connections takes then.
const GLANCE: Duration = Duration::from_millis(5);

/// How long a source whose data connection failed may take to say why.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Sections and their bytes at most; a machine with hundreds of devices stays far below.
const MAX_SECTIONS: usize = 4096;
const MAX_SECTION_BYTES: usize = 256 << 20;

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
        early: None,
        is_check: false,
    };
    let result = take(&mut control, accept, host, options).map_err(tidy);
    if let Err(error) = &result {
        let reasons = Reasons::one(error.cause(), error.chain());
        let told = match error {
            // It knows, or does not listen.
            DestinationError::Peer(_) | DestinationError::Handoff(_) => None,
            DestinationError::Claim(_) => None,
            DestinationError::Refused(all) => Some(Message::Refuse(Reasons {
                reasons: all.clone(),
                ..reasons
            })),
            _ => Some(Message::Abort(reasons)),
        };
        if let Some(told) = told {
            let _ = control.send(&told);
            breaker.break_off();
        }
    }
    result.map_err(|error| match control.is_check {
        true => DestinationError::Checked(Box::new(error)),
        false => error,
    })
}

/// Reasons may quote what a stranger has sent.
fn tidy(error: DestinationError) -> DestinationError {
    match error {
        DestinationError::Refused(reasons) => {
            let cause = Cause::RestoreFailed;
            DestinationError::Refused(Reasons { cause, reasons }.tidy().reasons)
        }
        error => error,
    }
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
    control.is_check = offer.check;
    let machine = prepare(&offer, host, options)?;
    control.send(match offer.postcopy {
        true => &Message::AcceptPostcopy,
        false => &Message::Accept,
    })?;
    let mut door = Door::new(accept, options);
    let mut streams = attach(control, &mut door, &offer)?;
    // The last one.
    let priority = if offer.postcopy { streams.pop() } else { None };
    transfer(control, door, (streams, priority), machine)
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
        let text = "it does not introduce itself as a migration's source".to_owned();
        return Err(DestinationError::Protocol(text));
    }
    let version = options.versions.choose(Versions { oldest, newest });
    let version = version.map_err(|error| DestinationError::Refused(vec![error.to_string()]))?;
    control.send(&Message::Welcome(Welcome {
        version,
        token: options.token.clone(),
        data_url: accept.url(),
        checks: true,
    }))?;
    Ok(())
}

/// Has the machine built, and compares its memory and its devices with the source's.
fn prepare(
    offer: &Offer,
    host: &mut dyn Host,
    options: &DestinationOptions,
) -> Result<(Box<dyn Incoming>, Devices), DestinationError> {
    let mut reasons = Vec::new();
    if offer.streams == 0 || offer.streams > options.max_streams {
        let (found, limit) = (offer.streams, options.max_streams);
        reasons.push(format!(
            "{found} data connections are asked for, 1 to {limit} are possible"
        ));
    }
    reasons.extend(device::objection(offer.devices.iter().map(String::as_str)));
    if offer.devices.len() > device::MAX_DEVICES {
        return Err(DestinationError::Refused(reasons));
    }
    let machine = match host.prepare(&offer.skeleton) {
        Ok(machine) => machine,
        Err(more) => {
            reasons.extend(more);
            return Err(DestinationError::Refused(reasons));
        }
    };
    let offered = offer.regions.iter();
    let offered: Option<Vec<_>> = offered
        .map(|(start, count)| PageRun::new(PageIndex(*start), *count))
        .collect();
    if offered.as_ref() != Some(&machine.pages().regions()) {
        reasons.push("memory is laid out differently here".to_owned());
    }
    if offer.postcopy {
        let obstacle = machine.postcopy_obstacle();
        reasons.extend(obstacle.map(|why| format!("post-copy is not possible: {why}")));
    }
    let devices = Devices::matching(&offer.devices, &machine.device_sinks(), offer.streams);
    match devices {
        Ok(devices) if reasons.is_empty() => Ok((machine, devices)),
        devices => {
            reasons.extend(devices.err().unwrap_or_default());
            Err(DestinationError::Refused(reasons))
        }
    }
}

/// Device states and, in a post-copy, the pages that come later.
pub(super) type Gathered = (Vec<Section>, Option<Vec<DirtyBitmap>>);

/// Everything until [`Message::Prepare`], and all pages that come before it.
pub(super) fn gather(
    control: &mut Control<'_>,
    (ended, mut mender): (&mut Ended, Mender<'_, '_>),
    regions: &[PageRun],
    postcopy: bool,
) -> Result<Gathered, DestinationError> {
    let mut sections: Vec<Section> = Vec::new();
    let mut later = None;
    let mut bytes = 0;
    let expected = loop {
        let check = || {
            mender.look();
            ended.check(Duration::ZERO)
        };
        let received = control.receive(check);
        match received.map_err(|error| explain(control, error))? {
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
            Message::Missing(missing) if postcopy => {
                note_missing(&mut later, &missing.runs, regions)?
            }
            // Whatever else is said in a check, the machine does not come.
            Message::Prepare(prepare) if !control.is_check => break prepare.sections,
            other => return Err(unexpected(&other)),
        }
    };
    if usize::try_from(expected) != Ok(sections.len()) {
        let found = sections.len();
        let text = format!("{found} device states have come, {expected} were sent");
        return Err(DestinationError::Protocol(text));
    }
    let prepared = Instant::now();
    let deadline = prepared + control.patience;
    let mut mender = Some(mender);
    while ended.running > 0 {
        ended.check(GLANCE)?;
        // The VM stands still: after this a thread that waits for another connection gives up.
        mender = mender.filter(|_| prepared.elapsed() < LATE_CONNECTION);
        if let Some(mender) = &mut mender
            && ended.running > 0
        {
            mender.look();
        }
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
    let marked = missing::mark(later, runs, PageIndex(0));
    marked.map_err(|error| DestinationError::Protocol(error.to_string()))?;
    Ok(())
}

/// A source that gives up breaks its data connections off and says why on the control connection:
/// its word counts, not what the breaking looked like.
pub(super) fn explain(control: &mut Control<'_>, error: DestinationError) -> DestinationError {
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
