//! Configuration space and features (section 5.3.3, 5.3.4).

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::port::ConsoleSize;

/// `VIRTIO_CONSOLE_F_SIZE`: `cols` and `rows` are valid.
const F_SIZE: u32 = 0;
/// `VIRTIO_CONSOLE_F_EMERG_WRITE`: `emerg_wr` takes a character at any time.
const F_EMERG_WRITE: u32 = 2;

pub(super) const FEATURES: u64 = 1 << F_SIZE | 1 << F_EMERG_WRITE;

/// `emerg_wr` lies at this offset.
pub(super) const EMERG_WR_OFFSET: u64 = 8;

/// `struct virtio_console_config`.
#[derive(Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigSpace {
    cols: U16,
    rows: U16,
    max_nr_ports: U32,
    emerg_wr: U32,
}

impl ConfigSpace {
    pub(super) fn new(size: ConsoleSize) -> Self {
        Self {
            cols: size.columns.into(),
            rows: size.rows.into(),
            max_nr_ports: 1.into(),
            emerg_wr: 0.into(),
        }
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(self.as_bytes().iter().skip(start)) {
            *byte = *value;
        }
    }
}
