//! Handshake: versions, the machine's description, data connections.

use std::time::{Duration, Instant};

use super::control::Control;
use super::migrate::Parts;
use super::options::{OnTimeout, SourceError, SourceOptions};
use crate::ports::{Channel, Dial};
use crate::progress::MigrationHandle;
use crate::wire::message::{Attach, Hello, MAGIC, Offer, Welcome};
use crate::wire::{DEVICES_VERSION, Message, Versions, device};

/// Connections to the destination.
pub(super) struct Links<'d> {
    /// For pages.
    pub(super) data: Vec<Box<dyn Channel>>,
    /// For pages that are needed at once, when there may be a post-copy.
    pub(super) priority: Option<Box<dyn Channel>>,
    /// How they are opened again.
    pub(super) further: Further<'d>,
    /// The link's delay, there and back.
    pub(super) round_trip: Duration,
}

/// Introduces this side, describes the machine and opens the data connections.
pub(super) fn connect<'d>(
    control: &mut Control,
    dial: &'d mut dyn Dial,
    (parts, devices): (&Parts<'_>, Vec<String>),
    options: &SourceOptions,
    handle: &MigrationHandle,
) -> Result<Links<'d>, SourceError> {
    let greeting = greet(control, &devices, options, handle)?;
    describe(control, (parts, devices), false, options, handle)?;
    greeting.open(dial, options, handle)
}

/// The destination's first answer.
pub(super) struct Greeting {
    pub(super) welcome: Welcome,
    /// How long it took.
    pub(super) round_trip: Duration,
}

impl Greeting {
    /// Opens the data connections of a machine that was accepted.
    pub(super) fn open<'d>(
        self,
        dial: &'d mut dyn Dial,
        options: &SourceOptions,
        handle: &MigrationHandle,
    ) -> Result<Links<'d>, SourceError> {
        let mut further = Further {
            dial,
            welcome: self.welcome,
            streams: options.streams,
            patience: options.patience,
            round_trip: self.round_trip,
        };
        let postcopy = options.on_timeout == OnTimeout::Postcopy;
        let (data, priority) = further.open_data(postcopy, &|| handle.is_cancelled())?;
        Ok(Links {
            data,
            priority,
            round_trip: further.round_trip,
            further,
        })
    }
}

/// Agrees on a version that suits these devices.
pub(super) fn greet(
    control: &mut Control,
    devices: &[String],
    options: &SourceOptions,
    handle: &MigrationHandle,
) -> Result<Greeting, SourceError> {
    if let Some(objection) = device::objection(devices.iter().map(String::as_str)) {
        return Err(SourceError::Blocked(vec![objection]));
    }
    let ours = Versions::OURS;
    let asked = Instant::now();
    control.tell(&Message::Hello(Hello {
        magic: MAGIC.to_owned(),
        oldest: ours.oldest,
        newest: ours.newest,
    }))?;
    let first = control.receive(options.patience, || handle.is_cancelled());
    let first = first.map_err(not_drover);
    let welcome = match first? {
        Message::Welcome(welcome) => welcome,
        Message::Refuse(refuse) => return Err(SourceError::Refused(refuse.reasons)),
        other => return Err(unexpected(&other)),
    };
    let round_trip = asked.elapsed();
    if !ours.contain(welcome.version) {
        return Err(SourceError::Version {
            found: welcome.version,
            oldest: ours.oldest,
            newest: ours.newest,
        });
    }
    if !devices.is_empty() && welcome.version < DEVICES_VERSION {
        return Err(SourceError::DevicesUnknown(devices.to_vec()));
    }
    Ok(Greeting {
        welcome,
        round_trip,
    })
}

/// Describes the machine, and waits until the destination has built it.
pub(super) fn describe(
    control: &mut Control,
    (parts, devices): (&Parts<'_>, Vec<String>),
    check: bool,
    options: &SourceOptions,
    handle: &MigrationHandle,
) -> Result<(), SourceError> {
    let postcopy = options.on_timeout == OnTimeout::Postcopy;
    let regions = parts.pages.regions();
    control.tell(&Message::Offer(Offer {
        skeleton: parts.machine.skeleton()?,
        regions: regions.iter().map(|run| (run.start.0, run.count)).collect(),
        streams: options.streams,
        postcopy,
        devices,
        check,
    }))?;
    let answer = control.receive(options.prepare_patience, || handle.is_cancelled());
    match answer? {
        Message::Accept if !postcopy => Ok(()),
        Message::AcceptPostcopy if postcopy => Ok(()),
        Message::Accept => {
            let text = "it does not know of post-copy".to_owned();
            Err(SourceError::Refused(vec![text]))
        }
        Message::Refuse(refuse) => Err(SourceError::Refused(refuse.reasons)),
        other => Err(unexpected(&other)),
    }
}

/// How further connections are opened.
pub(super) struct Further<'d> {
    dial: &'d mut dyn Dial,
    welcome: Welcome,
    streams: u16,
    patience: Duration,
    /// The shortest time that an answer has taken. One may be late because a host was busy; opening
    /// a connection takes at least as long as the way there and back.
    round_trip: Duration,
}

/// Connections for pages, and the one for pages that are needed at once.
pub(super) type DataLinks = (Vec<Box<dyn Channel>>, Option<Box<dyn Channel>>);

impl Further<'_> {
    /// All data connections.
    pub(super) fn open_data(
        &mut self,
        postcopy: bool,
        given_up: &dyn Fn() -> bool,
    ) -> Result<DataLinks, SourceError> {
        let count = self.streams + u16::from(postcopy);
        let data = (0..count).map(|index| self.open(index, given_up));
        let mut data = data.collect::<Result<Vec<_>, SourceError>>()?;
        // The last one.
        let priority = if postcopy { data.pop() } else { None };
        Ok((data, priority))
    }

    /// One in the place of another that broke.
    pub(super) fn reopen(
        &mut self,
        index: u64,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Box<dyn Channel>, SourceError> {
        let index = u16::try_from(index).unwrap_or(u16::MAX);
        self.open(index, given_up)
    }

    /// One that shows that it belongs to this migration.
    ///
    /// # Errors
    /// [`SourceError::Cancelled`] when it was given up.
    pub(super) fn open(
        &mut self,
        index: u16,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Box<dyn Channel>, SourceError> {
        let failed = |source| SourceError::Dial { index, source };
        let url = self.welcome.data_url.as_deref();
        let dialed = Instant::now();
        let mut channel = match self.dial.dial(url, given_up) {
            Err(_) if given_up() => return Err(SourceError::Cancelled),
            dialed => dialed.map_err(failed)?,
        };
        self.round_trip = self.round_trip.min(dialed.elapsed());
        channel.set_timeout(self.patience).map_err(failed)?;
        let attach = Message::Attach(Attach {
            token: self.welcome.token.clone(),
            index,
        });
        attach.send(&mut *channel).map_err(failed)?;
        Ok(channel)
    }
}

/// A first answer whose header is none, or that ends within it, comes from something else.
fn not_drover(error: SourceError) -> SourceError {
    match error {
        SourceError::Link(error) if error.is_foreign() => SourceError::NotDrover(error),
        other => other,
    }
}

pub(super) fn unexpected(message: &Message) -> SourceError {
    SourceError::Unexpected(format!("{:?}", message.kind()))
}
