//! A data connection: takes pages and parts of device states until the source says that it is done.

use super::devices::Devices;
use super::options::StreamError;
use crate::codec::Decoder;
use crate::ports::{Channel, PageStore};
use crate::wire::frame::{FrameError, FrameKind, FrameReader};

/// A data connection that has shown the token.
pub(super) struct Stream {
    pub(super) channel: Box<dyn Channel>,
    pub(super) reader: FrameReader,
}

impl Stream {
    /// Writes what comes to memory and to `devices`, where these may still come.
    pub(super) fn drain(
        &mut self,
        decoder: &mut Decoder,
        pages: &dyn PageStore,
        devices: Option<&Devices>,
    ) -> Result<(), StreamError> {
        let prefers = pages
            .direct()
            .is_some_and(|direct| direct.prefers_receive());
        if prefers && self.channel.socket().is_some() {
            self.reader.read_exactly();
        }
        let mut payload = Vec::new();
        loop {
            let kind = match self.reader.read(&mut *self.channel, &mut payload) {
                // Nothing may have changed in this stream's memory for long. A source that is gone
                // is noticed by its silence on the control connection, which breaks this one off.
                Err(error) if error.is_timeout() => continue,
                kind => kind?,
            };
            match kind {
                FrameKind::Pages => {
                    let from = (&mut self.reader, &mut *self.channel);
                    decoder.decode_from(&payload, from, pages)?;
                }
                FrameKind::DeviceData if let Some(devices) = devices => devices.take(&payload)?,
                FrameKind::StreamEnd => return Ok(()),
                other => {
                    let text = format!("{other:?} on a data connection");
                    return Err(FrameError::Invalid(text).into());
                }
            }
        }
    }
}
