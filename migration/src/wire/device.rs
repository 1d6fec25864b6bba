//! The table of a frame of device state, and what devices may be called.
//!
//! Parts are numbered in the order in which they entered the source's queue, over all devices and
//! connections. A connection carries them in ascending order: the next one that the destination
//! waits for is never behind another on its connection.

use std::collections::BTreeSet;

use super::frame::{self, FrameError, FrameHeader, FrameKind};

/// Bytes of a part's table.
pub const HEADER_BYTES: usize = 16;

/// Bytes of state in one frame at most.
pub const CHUNK_BYTES: usize = 256 << 10;

/// Devices of a machine whose state comes as a stream, at most.
pub const MAX_DEVICES: usize = 256;

/// Bytes of a device's id at most.
pub const MAX_ID_BYTES: usize = 255;

/// Set on the last part of a device's state.
const LAST: u16 = 1;

/// What stands before a part of a device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceHeader {
    /// Number of the part, from 0, over all devices.
    pub sequence: u64,
    /// The device: its place in [`Offer::devices`](super::message::Offer::devices).
    pub device: u16,
    /// Whether nothing follows of this device.
    pub is_last: bool,
}

impl DeviceHeader {
    /// As sent: number, device, flags, four zeroes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let flags = if self.is_last { LAST } else { 0 };
        let fields = self.sequence.to_le_bytes().into_iter();
        let fields = fields.chain(self.device.to_le_bytes());
        let fields = fields.chain(flags.to_le_bytes());
        for (byte, value) in bytes.iter_mut().zip(fields) {
            *byte = value;
        }
        bytes
    }

    /// Reads a frame's payload: the table, and the state behind it.
    ///
    /// # Errors
    /// [`FrameError::Invalid`].
    pub fn split(payload: &[u8]) -> Result<(Self, &[u8]), FrameError> {
        let invalid = |text: &str| FrameError::Invalid(format!("DeviceData: {text}"));
        let Some((table, data)) = payload.split_first_chunk::<HEADER_BYTES>() else {
            return Err(invalid("its table is cut short"));
        };
        let [s0, s1, s2, s3, s4, s5, s6, s7, d0, d1, f0, f1, rest @ ..] = *table;
        let flags = u16::from_le_bytes([f0, f1]);
        if flags & !LAST != 0 || rest != [0; 4] {
            return Err(invalid("unknown flags, or reserved bytes that are not 0"));
        }
        let header = Self {
            sequence: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            device: u16::from_le_bytes([d0, d1]),
            is_last: flags & LAST != 0,
        };
        Ok((header, data))
    }
}

/// Bytes before a part's state in its frame.
pub const FRAME_HEAD_BYTES: usize = frame::HEADER_BYTES + HEADER_BYTES;

/// Completes `frame`, which has [`FRAME_HEAD_BYTES`] of anything before the part's state.
///
/// # Errors
/// [`FrameError::Invalid`] for a part that is too long, or has no room for what stands before it.
pub fn seal(frame: &mut [u8], header: &DeviceHeader) -> Result<(), FrameError> {
    let bytes = frame.len();
    let invalid = || FrameError::Invalid(format!("a frame of device state of {bytes} bytes"));
    let (head, payload) = frame
        .split_first_chunk_mut::<{ frame::HEADER_BYTES }>()
        .ok_or_else(invalid)?;
    let table = payload.first_chunk_mut().ok_or_else(invalid)?;
    *table = header.encode();
    let framed = FrameHeader::of(FrameKind::DeviceData, payload).ok_or_else(invalid)?;
    *head = framed.encode();
    Ok(())
}

/// Why these are no devices' ids, if so: too many, twice the same, or nothing that can be shown.
#[must_use]
pub fn objection<'a>(ids: impl ExactSizeIterator<Item = &'a str>) -> Option<String> {
    let count = ids.len();
    if count > MAX_DEVICES {
        return Some(format!(
            "{count} devices have states that come as streams, at most {MAX_DEVICES} are possible"
        ));
    }
    let mut seen = BTreeSet::new();
    for id in ids {
        if id.is_empty() || id.len() > MAX_ID_BYTES || id.contains(char::is_control) {
            return Some(format!("{id:?} is no device's id"));
        }
        if !seen.insert(id) {
            return Some(format!("two devices are called {id}"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::FrameReader;

    #[test]
    fn a_part_comes_out_as_it_went_in() {
        for (sequence, device, is_last, bytes) in [
            (0, 0, false, 1),
            (u64::MAX, u16::MAX, true, 0),
            (1 << 40, 300, false, CHUNK_BYTES),
        ] {
            let header = DeviceHeader {
                sequence,
                device,
                is_last,
            };
            let mut frame = vec![0x5a; FRAME_HEAD_BYTES + bytes];
            seal(&mut frame, &header).unwrap();
            let mut payload = Vec::new();
            let mut reader = FrameReader::default();
            let kind = reader.read(&mut frame.as_slice(), &mut payload).unwrap();
            assert_eq!(kind, FrameKind::DeviceData);
            let (found, data) = DeviceHeader::split(&payload).unwrap();
            assert_eq!(found, header);
            assert!(data.len() == bytes && data.iter().all(|byte| *byte == 0x5a));
        }
    }

    #[test]
    fn a_frame_has_room_for_a_part_and_its_table() {
        let bytes = u32::try_from(HEADER_BYTES + CHUNK_BYTES);
        assert_eq!(bytes, Ok(frame::MAX_DEVICE_BYTES));
    }

    #[test]
    fn what_is_too_long_or_too_short_is_not_sealed() {
        let header = DeviceHeader {
            sequence: 0,
            device: 0,
            is_last: false,
        };
        for bytes in [0, FRAME_HEAD_BYTES - 1, FRAME_HEAD_BYTES + CHUNK_BYTES + 1] {
            assert!(seal(&mut vec![0; bytes], &header).is_err(), "{bytes}");
        }
    }

    #[test]
    fn a_table_that_is_not_as_it_should_be_is_refused() {
        let good = DeviceHeader {
            sequence: 5,
            device: 1,
            is_last: true,
        };
        let good = good.encode();
        assert!(DeviceHeader::split(&good).is_ok());
        assert!(DeviceHeader::split(&good[..15]).is_err());
        for at in [10, 11, 12, 15] {
            let mut bad = good;
            bad[at] |= 2;
            assert!(DeviceHeader::split(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn ids_are_few_and_text_and_each_its_own() {
        let check = |ids: &[&str]| objection(ids.iter().copied());
        assert_eq!(check(&[]), None);
        assert_eq!(check(&["gpu0", "gpu1"]), None);
        assert!(check(&["gpu0", "gpu1", "gpu0"]).is_some());
        let long = "g".repeat(256);
        for bad in ["", "a\nb", &long] {
            assert!(check(&[bad]).is_some(), "{bad:?}");
        }
        let many: Vec<_> = (0..257).map(|number| format!("gpu{number}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert!(check(&many).is_some() && check(&many[..256]).is_none());
    }
}
