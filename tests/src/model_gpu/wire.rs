//! Messages of the protocol (QEMU's docs/interop/vfio-user.rst): a header, a body, descriptors.

use rustix::io::Errno;

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 16;
/// Bytes of a message that is a header alone.
const MESSAGE_MIN: u32 = 16;
/// Bytes that one message reads or writes of a region at most: the protocol's own default.
pub(super) const TRANSFER_MAX: u32 = 1 << 20;
/// Bytes of a whole message: such a transfer, and what stands before it.
pub(super) const MESSAGE_MAX: u32 = TRANSFER_MAX + 64;
/// Descriptors that come with one message.
pub(super) const DESCRIPTORS_MAX: usize = 8;

const TYPE_MASK: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

/// Commands, by their numbers.
pub(super) mod command {
    pub(crate) const VERSION: u16 = 1;
    pub(crate) const DMA_MAP: u16 = 2;
    pub(crate) const DMA_UNMAP: u16 = 3;
    pub(crate) const DEVICE_GET_INFO: u16 = 4;
    pub(crate) const DEVICE_GET_REGION_INFO: u16 = 5;
    pub(crate) const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub(crate) const DEVICE_SET_IRQS: u16 = 8;
    pub(crate) const REGION_READ: u16 = 9;
    pub(crate) const REGION_WRITE: u16 = 10;
    pub(crate) const DEVICE_RESET: u16 = 13;
    pub(crate) const DEVICE_FEATURE: u16 = 16;
    pub(crate) const MIG_DATA_READ: u16 = 17;
    pub(crate) const MIG_DATA_WRITE: u16 = 18;
}

/// What stands before every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    id: u16,
    /// Which command.
    pub(super) command: u16,
    /// Bytes of the whole message.
    len: u32,
    flags: u32,
}

impl Header {
    /// A client's header; `None` if no message can follow it.
    pub(super) fn parse(bytes: [u8; HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields::new(&bytes);
        let header = Self {
            id: fields.u16().ok()?,
            command: fields.u16().ok()?,
            len: fields.u32().ok()?,
            flags: fields.u32().ok()?,
        };
        let is_sized = (MESSAGE_MIN..=MESSAGE_MAX).contains(&header.len);
        (is_sized && header.flags & TYPE_MASK == TYPE_COMMAND).then_some(header)
    }

    /// Bytes that follow.
    pub(super) fn body_len(&self) -> usize {
        usize::try_from(self.len).map_or(0, |len| len.saturating_sub(HEADER_BYTES))
    }

    /// Whether an answer is waited for.
    pub(super) fn wants_reply(&self) -> bool {
        self.flags & FLAG_NO_REPLY == 0
    }

    /// What stands before an answer of so many bytes, or is all of it.
    pub(super) fn reply(&self, outcome: Result<usize, Errno>) -> Vec<u8> {
        let (body, flags, error) = match outcome {
            Ok(body) => (body, TYPE_REPLY, 0),
            Err(errno) => (0, TYPE_REPLY | FLAG_ERROR, errno.raw_os_error()),
        };
        let len = u32::try_from(HEADER_BYTES + body).unwrap_or(MESSAGE_MAX);
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(self.id.to_le_bytes());
        bytes.extend(self.command.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(error.to_le_bytes());
        bytes
    }
}

/// A body, read from its beginning.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (value, rest) = self.rest.split_first_chunk().ok_or(Errno::INVAL)?;
        self.rest = rest;
        Ok(*value)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Errno> {
        self.take().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        self.take().map(u64::from_le_bytes)
    }

    /// What is left.
    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }
}
