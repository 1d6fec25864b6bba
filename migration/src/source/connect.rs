//! Handshake: versions, the machine's description, data connections.

use super::control::Control;
use super::migrate::Parts;
use super::options::{SourceError, SourceOptions};
use crate::ports::{Channel, Dial};
use crate::progress::MigrationHandle;
use crate::wire::message::{Attach, Hello, MAGIC, Offer};
use crate::wire::{Message, OLDEST_VERSION, VERSION};

/// Reasons that a destination may give.
const MAX_REASONS: usize = 64;

/// Introduces this side, describes the machine and opens the data connections.
pub(super) fn connect(
    control: &mut Control,
    dial: &mut dyn Dial,
    parts: &Parts<'_>,
    options: &SourceOptions,
    handle: &MigrationHandle,
) -> Result<Vec<Box<dyn Channel>>, SourceError> {
    let wait = |control: &mut Control| control.receive(options.patience, || handle.is_cancelled());
    control.send(&Message::Hello(Hello {
        magic: MAGIC.to_owned(),
        oldest: OLDEST_VERSION,
        newest: VERSION,
    }))?;
    let welcome = match wait(control)? {
        Message::Welcome(welcome) => welcome,
        Message::Refuse(refuse) => return Err(refused(refuse.reasons)),
        other => return Err(unexpected(&other)),
    };
    if !(OLDEST_VERSION..=VERSION).contains(&welcome.version) {
        return Err(SourceError::Version {
            found: welcome.version,
            oldest: OLDEST_VERSION,
            newest: VERSION,
        });
    }
    let regions = parts.pages.regions();
    control.send(&Message::Offer(Offer {
        skeleton: parts.machine.skeleton()?,
        regions: regions.iter().map(|run| (run.start.0, run.count)).collect(),
        streams: options.streams,
    }))?;
    match wait(control)? {
        Message::Accept => {}
        Message::Refuse(refuse) => return Err(refused(refuse.reasons)),
        other => return Err(unexpected(&other)),
    }
    (0..options.streams)
        .map(|index| {
            let failed = |source| SourceError::Dial { index, source };
            let mut channel = dial.dial(welcome.data_url.as_deref()).map_err(failed)?;
            channel.set_timeout(options.patience).map_err(failed)?;
            let attach = Message::Attach(Attach {
                token: welcome.token.clone(),
                index,
            });
            attach.send(&mut *channel).map_err(failed)?;
            Ok(channel)
        })
        .collect()
}

fn refused(mut reasons: Vec<String>) -> SourceError {
    reasons.truncate(MAX_REASONS);
    SourceError::Refused(reasons)
}

pub(super) fn unexpected(message: &Message) -> SourceError {
    SourceError::Unexpected(format!("{:?}", message.kind()))
}
