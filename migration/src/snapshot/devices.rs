//! Devices whose states come as streams, as a snapshot takes them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::image::Image;
use super::take::TakeError;
use crate::ports::{DeviceSource, PortError};

/// Bytes that are read at once.
const PART_BYTES: usize = 1 << 20;

/// What the image has of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its name within the VM.
    pub id: String,
    /// Bytes of its state.
    pub bytes: u64,
    /// Their CRC-32 (IEEE 802.3).
    pub check: u32,
}

/// A device, and what was read of it.
struct Stream {
    /// Of its record.
    number: usize,
    device: Arc<dyn DeviceSource>,
    /// Whether it can be read while the machine runs.
    is_early: bool,
    bytes: u64,
    check: crc32fast::Hasher,
    buffer: Vec<u8>,
}

/// All of them.
pub(super) struct Streams {
    streams: Vec<Stream>,
    /// How many have begun, and have not ended.
    open: usize,
}

impl Streams {
    /// Nothing is read of them yet.
    pub(super) fn new(devices: Vec<Arc<dyn DeviceSource>>) -> Self {
        let stream = |(number, device)| Stream {
            number,
            device,
            is_early: false,
            bytes: 0,
            check: crc32fast::Hasher::new(),
            buffer: Vec::new(),
        };
        Self {
            streams: devices.into_iter().enumerate().map(stream).collect(),
            open: 0,
        }
    }

    /// Begins, while the machine runs.
    pub(super) fn begin(&mut self) -> Result<(), TakeError> {
        for stream in &mut self.streams {
            // Also one that fails has to be ended.
            self.open += 1;
            stream.is_early = stream.device.begin().map_err(stream.failed())?;
        }
        Ok(())
    }

    /// Reads what there is while the machine runs, but not what comes while it is read; returns its
    /// length.
    pub(super) fn read_early(
        &mut self,
        image: &mut dyn Image,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<u64, TakeError> {
        let mut total = 0;
        for stream in self.streams.iter_mut().filter(|stream| stream.is_early) {
            let left = stream.device.left().map_err(stream.failed())?.at_stop;
            total += stream.read(image, left, cancelled)?;
        }
        Ok(total)
    }

    /// Stops them all.
    pub(super) fn stop(&self) -> Result<(), TakeError> {
        let mut streams = self.streams.iter();
        streams.try_for_each(|stream| stream.device.stop().map_err(stream.failed()))
    }

    /// Reads the rest of what is stopped; returns its length.
    pub(super) fn read_rest(
        &mut self,
        image: &mut dyn Image,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<u64, TakeError> {
        let mut total = 0;
        for stream in &mut self.streams {
            total += stream.read(image, u64::MAX, cancelled)?;
        }
        Ok(total)
    }

    /// Lets them go. Nothing the second time.
    pub(super) fn end(&mut self) {
        for stream in self.streams.iter().take(std::mem::take(&mut self.open)) {
            stream.device.end();
        }
    }

    /// What was read.
    pub(super) fn records(self) -> Vec<DeviceRecord> {
        let record = |stream: Stream| DeviceRecord {
            id: stream.device.id().to_owned(),
            bytes: stream.bytes,
            check: stream.check.finalize(),
        };
        self.streams.into_iter().map(record).collect()
    }
}

impl Stream {
    fn failed(&self) -> impl FnOnce(PortError) -> TakeError + use<> {
        let device = self.device.id().to_owned();
        |source| TakeError::Device { device, source }
    }

    /// Copies until nothing comes, or about `most` bytes have.
    fn read(
        &mut self,
        image: &mut dyn Image,
        most: u64,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<u64, TakeError> {
        self.buffer.resize(PART_BYTES, 0);
        let mut total = 0;
        while total < most {
            if cancelled() {
                return Err(TakeError::Cancelled);
            }
            let count = self.device.read(&mut self.buffer);
            let count = count.map_err(self.failed())?;
            if count == 0 {
                break;
            }
            let part = self.buffer.get(..count).unwrap_or_default();
            image.append(self.number, part).map_err(|source| {
                let device = self.device.id().to_owned();
                TakeError::DeviceImage { device, source }
            })?;
            self.check.update(part);
            total += part.len() as u64;
        }
        self.bytes += total;
        Ok(total)
    }
}
