//! A data connection's share of device states that come as streams.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::devices::Part;
use super::frames::Outgoing;
use super::options::SourceError;
use super::stream::Stream;
use crate::wire::FrameError;

impl Stream<'_> {
    /// Sends parts until nothing more comes in this round.
    pub(super) fn send_devices(&mut self) -> Result<(), SourceError> {
        let devices = self.shared.devices;
        if devices.is_empty() {
            return Ok(());
        }
        // These pages do not wait for a device.
        self.write(&[])?;
        while let Some(part) = devices.take()? {
            self.send_part(part)?;
        }
        Ok(())
    }

    /// Sends what was collected, and a part.
    pub(super) fn send_part(&mut self, mut part: Part) -> Result<(), SourceError> {
        self.has_carried = true;
        let state_bytes = part.bytes();
        let frame = part.seal()?;
        let whole = 0..frame.len();
        let outgoing = Outgoing::new(&self.out, frame, std::slice::from_ref(&whole));
        let (bytes, begin) = (outgoing.bytes(), Instant::now());
        self.was_paced = self.shared.pacer.take(bytes);
        outgoing.write(&mut *self.channel)?;
        self.written(bytes, begin);
        let total = &self.shared.totals.device_bytes;
        total.fetch_add(state_bytes, Ordering::Relaxed);
        self.shared.devices.give_back(part);
        Ok(())
    }

    /// What a failure of this connection means.
    pub(super) fn as_lost(&self, error: SourceError) -> SourceError {
        match error {
            SourceError::Link(source @ (FrameError::Io(_) | FrameError::Closed))
                if self.has_carried =>
            {
                let index = self.index();
                SourceError::DeviceCut { index, source }
            }
            error => error,
        }
    }
}
