//! Messages of vfio-user as plain data (QEMU's docs/interop/vfio-user.rst). Numbers are in the
//! host's byte order; both sides run on the same host.
//!
//! Nothing here knows of sockets. A message is a [`Header`], one of the structures below that the
//! header's [`Command`] tells, and data behind it.

mod capability;
mod version;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use capability::{decode_sparse_areas, encode_region_info};
pub use version::{Capabilities, Version};

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = 16;

/// Bytes of data in one read or write when a side says nothing else ("Version",
/// `max_data_xfer_size`).
pub const DEFAULT_DATA_BYTES: u32 = 1 << 20;

/// Bytes that no message has more of: the largest structure and the data behind it.
pub const MAX_MESSAGE_BYTES: u32 = DEFAULT_DATA_BYTES + 4096;

/// Bytes of what a server says about one region: its capabilities included.
pub const MAX_REGION_INFO_BYTES: u32 = 4096;

/// Bytes of the capabilities that sides exchange first.
pub const MAX_VERSION_BYTES: u32 = 4096;

/// Descriptors that the kernel lets through in one message (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: u64 = 253;

/// What the other side sent is no such message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends too early.
    #[error("it has {len} bytes, not {expected}")]
    Length {
        /// Bytes that came.
        len: usize,
        /// Bytes there should be.
        expected: usize,
    },
    /// The capabilities are no JSON, or not of the right form.
    #[error("its capabilities are invalid: {0}")]
    Json(String),
    /// A value that cannot be.
    #[error("{what} is {value:#x}")]
    Value {
        /// Of what.
        what: &'static str,
        /// The value.
        value: u64,
    },
}

macro_rules! commands {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        /// What a message asks for, or answers ("Commands").
        #[expect(missing_docs, reason = "the specification's names")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum Command { $($name = $number),* }

        impl Command {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// By its number.
            #[must_use]
            pub fn from_number(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The specification's name, after `VFIO_USER_`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// For [`BackendError::Refused`](crate::BackendError::Refused).
            pub(super) fn refused(self) -> &'static str {
                match self { $(Self::$name => concat!("the vfio-user server refuses ", $text)),* }
            }
        }
    };
}

commands! {
    Version = 1, "VERSION";
    DmaMap = 2, "DMA_MAP";
    DmaUnmap = 3, "DMA_UNMAP";
    DeviceGetInfo = 4, "DEVICE_GET_INFO";
    DeviceGetRegionInfo = 5, "DEVICE_GET_REGION_INFO";
    DeviceGetRegionIoFds = 6, "DEVICE_GET_REGION_IO_FDS";
    DeviceGetIrqInfo = 7, "DEVICE_GET_IRQ_INFO";
    DeviceSetIrqs = 8, "DEVICE_SET_IRQS";
    RegionRead = 9, "REGION_READ";
    RegionWrite = 10, "REGION_WRITE";
    DmaRead = 11, "DMA_READ";
    DmaWrite = 12, "DMA_WRITE";
    DeviceReset = 13, "DEVICE_RESET";
    RegionWriteMulti = 15, "REGION_WRITE_MULTI";
    DeviceFeature = 16, "DEVICE_FEATURE";
    MigDataRead = 17, "MIG_DATA_READ";
    MigDataWrite = 18, "MIG_DATA_WRITE";
}

/// Every structure here: plain numbers without gaps.
pub trait Payload: FromBytes + IntoBytes + Immutable + KnownLayout + Copy {
    /// Splits `bytes` into the structure and what is behind it.
    ///
    /// # Errors
    /// [`Malformed::Length`].
    fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        Self::read_from_prefix(bytes).map_err(|_| Malformed::Length {
            len: bytes.len(),
            expected: size_of::<Self>(),
        })
    }

    /// The structure with `data` behind it.
    fn encode(&self, data: &[u8]) -> Vec<u8> {
        [self.as_bytes(), data].concat()
    }
}

macro_rules! payloads {
    ($($(#[$docs:meta])* $name:ident { $($(#[$field_docs:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$docs])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        #[repr(C)]
        pub struct $name { $($(#[$field_docs])* pub $field: $type,)* }

        impl Payload for $name {}
    )*};
}

payloads! {
    /// What every message begins with ("Header").
    Header {
        /// Chosen by who asks, repeated by who answers.
        id: u16,
        /// A [`Command`].
        command: u16,
        /// Bytes of the whole message, this header included.
        size: u32,
        /// [`flags`].
        flags: u32,
        /// In a reply with [`flags::ERROR`] the `errno`, or 0.
        error: u32,
    }

    /// `VFIO_USER_DMA_MAP`.
    DmaMap {
        /// Bytes of this structure.
        argsz: u32,
        /// [`DMA_READABLE`], [`DMA_WRITABLE`].
        flags: u32,
        /// Where in the descriptor's file.
        offset: u64,
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
    }

    /// `VFIO_USER_DMA_UNMAP`, and its reply.
    DmaUnmap {
        /// Bytes of the reply.
        argsz: u32,
        /// None.
        flags: u32,
        /// First address.
        address: u64,
        /// Bytes.
        size: u64,
    }

    /// `VFIO_USER_DEVICE_GET_INFO`, and its reply.
    DeviceInfo {
        /// Bytes of the reply.
        argsz: u32,
        /// [`DEVICE_RESETS`], [`DEVICE_IS_PCI`].
        flags: u32,
        /// Regions.
        num_regions: u32,
        /// Interrupt kinds.
        num_irqs: u32,
    }

    /// `VFIO_USER_DEVICE_GET_REGION_INFO`, and its reply.
    RegionInfo {
        /// Bytes of the reply, capabilities included.
        argsz: u32,
        /// [`REGION_READS`], [`REGION_WRITES`], [`REGION_MAPS`], [`REGION_CAPABILITIES`].
        flags: u32,
        /// Which.
        index: u32,
        /// Where the first capability is, from the start of this structure.
        cap_offset: u32,
        /// Bytes of the region.
        size: u64,
        /// Where the region is in the descriptor's file.
        offset: u64,
    }

    /// `VFIO_USER_DEVICE_GET_IRQ_INFO`, and its reply.
    IrqInfo {
        /// Bytes of the reply.
        argsz: u32,
        /// [`IRQ_EVENTFD`], [`IRQ_AUTOMASKED`], [`IRQ_NO_RESIZE`].
        flags: u32,
        /// Which kind.
        index: u32,
        /// Vectors.
        count: u32,
    }

    /// `VFIO_USER_DEVICE_SET_IRQS`.
    IrqSet {
        /// Bytes of this structure and of data behind it.
        argsz: u32,
        /// One of `IRQ_DATA_*` and one of `IRQ_ACTION_*`.
        flags: u32,
        /// Which kind.
        index: u32,
        /// First vector.
        start: u32,
        /// Vectors.
        count: u32,
    }

    /// `VFIO_USER_REGION_READ` and `VFIO_USER_REGION_WRITE`, and their replies.
    RegionAccess {
        /// Where.
        offset: u64,
        /// In which region.
        region: u32,
        /// Bytes.
        count: u32,
    }

    /// `VFIO_USER_DEVICE_FEATURE` without data.
    Feature {
        /// Bytes of the reply.
        argsz: u32,
        /// [`FEATURE_GET`] or [`FEATURE_SET`], and one of the other `FEATURE_*`.
        flags: u32,
    }

    /// `VFIO_USER_DEVICE_FEATURE` with 8 bytes of data, and its reply.
    FeatureValue {
        /// Bytes of the reply.
        argsz: u32,
        /// As in [`Feature`].
        flags: u32,
        /// The data.
        value: u64,
    }

    /// `VFIO_USER_DEVICE_FEATURE` with [`FEATURE_DMA_LOGGING_START`], and its reply; as many [`LoggedRange`]s
    /// behind it.
    LoggingControl {
        /// Bytes of the reply.
        argsz: u32,
        /// As in [`Feature`].
        flags: u32,
        /// Bytes of the pages to log by; in the reply, of those that are logged by.
        page_size: u64,
        /// How many ranges.
        num_ranges: u32,
        /// Nothing.
        reserved: u32,
    }

    /// A range that writes are logged to.
    LoggedRange {
        /// First address.
        iova: u64,
        /// Bytes.
        length: u64,
    }

    /// `VFIO_USER_DEVICE_FEATURE` with [`FEATURE_DMA_LOGGING_REPORT`], and its reply, which has the bitmap
    /// behind it in words of 64 bits.
    LoggingReport {
        /// Bytes of the reply.
        argsz: u32,
        /// As in [`Feature`].
        flags: u32,
        /// First address.
        iova: u64,
        /// Bytes.
        length: u64,
        /// Bytes that a bit stands for.
        page_size: u64,
    }

    /// `VFIO_USER_MIG_DATA_READ`, its reply, and `VFIO_USER_MIG_DATA_WRITE`.
    MigData {
        /// Bytes of the reply.
        argsz: u32,
        /// Bytes of the state, behind this where there are any.
        size: u32,
    }

    /// `VFIO_USER_DMA_READ` and `VFIO_USER_DMA_WRITE`, and their replies.
    DmaAccess {
        /// Where, as the device sees it.
        address: u64,
        /// Bytes.
        count: u64,
    }
}

/// Bits of [`Header::flags`].
pub mod flags {
    /// The bits that tell a command from a reply.
    pub const TYPE: u32 = 0xf;
    /// A request.
    pub const COMMAND: u32 = 0;
    /// An answer.
    pub const REPLY: u32 = 1;
    /// The request wants no answer.
    pub const NO_REPLY: u32 = 1 << 4;
    /// The answer is a refusal.
    pub const ERROR: u32 = 1 << 5;
}

/// [`DmaMap::flags`]: the device may read.
pub const DMA_READABLE: u32 = 1 << 0;
/// [`DmaMap::flags`]: the device may write.
pub const DMA_WRITABLE: u32 = 1 << 1;

/// `VFIO_DEVICE_FLAGS_RESET`: the device can be reset.
pub const DEVICE_RESETS: u32 = 1 << 0;
/// `VFIO_DEVICE_FLAGS_PCI`: it is a PCI function.
pub const DEVICE_IS_PCI: u32 = 1 << 1;

/// `VFIO_DEVICE_FEATURE_GET`.
pub const FEATURE_GET: u32 = 1 << 16;
/// `VFIO_DEVICE_FEATURE_SET`.
pub const FEATURE_SET: u32 = 1 << 17;
/// `VFIO_DEVICE_FEATURE_PROBE`: whether there is the feature, and what else these flags say.
pub const FEATURE_PROBE: u32 = 1 << 18;
/// `VFIO_DEVICE_FEATURE_MIGRATION`: what the device can do, [`MIGRATION_STOP_COPY`] and
/// [`MIGRATION_PRE_COPY`].
pub const FEATURE_MIGRATION: u32 = 1;
/// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`: its migration state.
pub const FEATURE_MIG_DEVICE_STATE: u32 = 2;
/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`: logs what the device writes to memory.
pub const FEATURE_DMA_LOGGING_START: u32 = 6;
/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`: ends that; without data.
pub const FEATURE_DMA_LOGGING_STOP: u32 = 7;
/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`: tells what was written.
pub const FEATURE_DMA_LOGGING_REPORT: u32 = 8;
/// `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`: bytes of its state. The specification does not have it;
/// servers that do not either refuse it.
pub const FEATURE_MIG_DATA_SIZE: u32 = 9;

/// `VFIO_MIGRATION_STOP_COPY`.
pub const MIGRATION_STOP_COPY: u64 = 1 << 0;
/// `VFIO_MIGRATION_PRE_COPY`.
pub const MIGRATION_PRE_COPY: u64 = 1 << 2;

/// `VFIO_REGION_INFO_FLAG_READ`.
pub const REGION_READS: u32 = 1 << 0;
/// `VFIO_REGION_INFO_FLAG_WRITE`.
pub const REGION_WRITES: u32 = 1 << 1;
/// `VFIO_REGION_INFO_FLAG_MMAP`: a descriptor comes along.
pub const REGION_MAPS: u32 = 1 << 2;
/// `VFIO_REGION_INFO_FLAG_CAPS`.
pub const REGION_CAPABILITIES: u32 = 1 << 3;

/// `VFIO_IRQ_INFO_EVENTFD`: vectors can signal descriptors.
pub const IRQ_EVENTFD: u32 = 1 << 0;
/// `VFIO_IRQ_INFO_MASKABLE`: the client can mask and unmask.
pub const IRQ_MASKABLE: u32 = 1 << 1;
/// `VFIO_IRQ_INFO_AUTOMASKED`: masked when it fires.
pub const IRQ_AUTOMASKED: u32 = 1 << 2;
/// `VFIO_IRQ_INFO_NORESIZE`: another number of vectors needs all of them off first.
pub const IRQ_NO_RESIZE: u32 = 1 << 3;

/// `VFIO_IRQ_SET_DATA_NONE`.
pub const IRQ_DATA_NONE: u32 = 1 << 0;
/// `VFIO_IRQ_SET_DATA_EVENTFD`: descriptors come along.
pub const IRQ_DATA_EVENTFD: u32 = 1 << 2;
/// `VFIO_IRQ_SET_ACTION_UNMASK`.
pub const IRQ_ACTION_UNMASK: u32 = 1 << 4;
/// `VFIO_IRQ_SET_ACTION_TRIGGER`.
pub const IRQ_ACTION_TRIGGER: u32 = 1 << 5;

impl Header {
    /// Of a request with `payload` bytes behind it.
    #[must_use]
    pub fn request(id: u16, command: Command, payload: usize) -> Self {
        Self {
            id,
            command: command as u16,
            size: message_bytes(payload),
            flags: flags::COMMAND,
            error: 0,
        }
    }

    /// Of the answer to this request, with `payload` bytes behind it.
    #[must_use]
    pub fn reply(&self, payload: usize) -> Self {
        Self {
            size: message_bytes(payload),
            flags: flags::REPLY,
            error: 0,
            ..*self
        }
    }

    /// Of the refusal of this request.
    #[must_use]
    pub fn refusal(&self, errno: i32) -> Self {
        Self {
            flags: flags::REPLY | flags::ERROR,
            error: errno.unsigned_abs(),
            ..self.reply(0)
        }
    }

    /// It answers a request, rather than being one.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & flags::TYPE == flags::REPLY
    }

    /// Bytes that follow.
    ///
    /// # Errors
    /// [`Malformed::Value`] when the message would have fewer bytes than its header, or more than
    /// `limit`, or is neither request nor reply.
    pub fn payload_bytes(&self, limit: u32) -> Result<usize, Malformed> {
        let Self { size, flags, .. } = *self;
        if ![flags::COMMAND, flags::REPLY].contains(&(flags & flags::TYPE)) {
            return Err(invalid("a message's type", flags & flags::TYPE));
        }
        let size_is_valid = size <= limit && size as usize >= HEADER_BYTES;
        match size_is_valid {
            true => Ok(size as usize - HEADER_BYTES),
            false => Err(invalid("a message's size", size)),
        }
    }
}

/// `payload` comes from this process and fits: [`MAX_MESSAGE_BYTES`].
fn message_bytes(payload: usize) -> u32 {
    u32::try_from(payload.saturating_add(HEADER_BYTES)).unwrap_or(u32::MAX)
}

pub(super) fn invalid(what: &'static str, value: impl Into<u64>) -> Malformed {
    let value = value.into();
    Malformed::Value { what, value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_specification() {
        assert_eq!(size_of::<Header>(), HEADER_BYTES);
        assert_eq!(size_of::<DmaMap>(), 32);
        assert_eq!(size_of::<DmaUnmap>(), 24);
        assert_eq!(size_of::<DeviceInfo>(), 16);
        assert_eq!(size_of::<RegionInfo>(), 32);
        assert_eq!(size_of::<IrqInfo>(), 16);
        assert_eq!(size_of::<IrqSet>(), 20);
        assert_eq!(size_of::<RegionAccess>(), 16);
        assert_eq!(size_of::<DmaAccess>(), 16);
        assert_eq!(size_of::<LoggingControl>(), 8 + 16);
        assert_eq!(size_of::<LoggedRange>(), 16);
        assert_eq!(size_of::<LoggingReport>(), 8 + 24);
    }

    #[test]
    fn header_is_laid_out_as_in_the_specification() {
        let header = Header::request(0x1234, Command::RegionWrite, 20);
        let bytes = header.encode(&[9]);
        assert_eq!(
            bytes,
            [0x34, 0x12, 10, 0, 36, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]
        );
        assert_eq!(Header::decode(&bytes).unwrap(), (header, &[9][..]));
        let refusal = header.refusal(libc::EEXIST);
        assert!(refusal.is_reply() && !header.is_reply());
        assert_eq!((refusal.size, refusal.flags), (16, 0x21));
    }

    #[test]
    fn messages_of_impossible_sizes_and_types_are_refused() {
        let header = |size, flags| Header {
            size,
            flags,
            ..Header::default()
        };
        assert_eq!(header(16, 0).payload_bytes(100), Ok(0));
        assert_eq!(header(100, 1).payload_bytes(100), Ok(84));
        for (size, flags) in [(0, 0), (15, 0), (101, 0), (u32::MAX, 0), (16, 2), (16, 15)] {
            assert!(header(size, flags).payload_bytes(100).is_err(), "{size}");
        }
    }

    #[test]
    fn commands_are_known_by_their_numbers() {
        for command in Command::ALL {
            assert_eq!(Command::from_number(*command as u16), Some(*command));
        }
        for number in [0, 14, 19, u16::MAX] {
            assert_eq!(Command::from_number(number), None);
        }
    }
}
