//! Data connections: those that show the migration's token are its own.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use super::control::{Control, TICK};
use super::options::{DestinationError, DestinationOptions};
use super::stream::Stream;
use crate::ports::Accept;
use crate::wire::message::Offer;
use crate::wire::{FrameReader, Message};

/// How long a connection may take to show its token.
const ATTACH_TIME: Duration = Duration::from_secs(2);

/// Waits for the data connections. Strangers are turned away.
pub(super) fn attach(
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
