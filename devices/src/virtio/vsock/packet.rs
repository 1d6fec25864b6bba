//! The header that precedes all data (section 5.10.6).

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The host's context id (section 5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;
/// Bytes of a header.
pub(super) const HEADER_BYTES: u32 = 44;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 1 << 1;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `VIRTIO_VSOCK_OP_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub(super) fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(super) struct Header {
    pub(super) src_cid: U64,
    pub(super) dst_cid: U64,
    pub(super) src_port: U32,
    pub(super) dst_port: U32,
    pub(super) len: U32,
    pub(super) kind: U16,
    pub(super) op: U16,
    pub(super) flags: U32,
    pub(super) buf_alloc: U32,
    pub(super) fwd_cnt: U32,
}

impl Header {
    /// The answer to a packet that belongs to no connection: a reset from where it was sent to.
    pub(super) fn reset_for(packet: &Self) -> Self {
        Self {
            src_cid: packet.dst_cid,
            dst_cid: packet.src_cid,
            src_port: packet.dst_port,
            dst_port: packet.src_port,
            kind: packet.kind,
            op: (Op::Reset as u16).into(),
            ..Self::default()
        }
    }
}

/// A connection's ports. Its context ids are always the guest's and the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

impl Key {
    /// The connection that a packet from the guest belongs to.
    pub(super) fn of(packet: &Header) -> Self {
        Self {
            guest_port: packet.src_port.get(),
            host_port: packet.dst_port.get(),
        }
    }

    /// A header with this connection's addresses, to the guest.
    pub(super) fn header(self, guest_cid: u64, op: Op) -> Header {
        Header {
            src_cid: HOST_CID.into(),
            dst_cid: guest_cid.into(),
            src_port: self.host_port.into(),
            dst_port: self.guest_port.into(),
            kind: TYPE_STREAM.into(),
            op: (op as u16).into(),
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_the_layout_of_the_specification() {
        let key = Key {
            guest_port: 0x0102_0304,
            host_port: 0x0506_0708,
        };
        let header = key.header(0x1a, Op::Data);
        let bytes = header.as_bytes();
        assert_eq!(bytes.len(), HEADER_BYTES as usize);
        assert_eq!(bytes[..9], [2, 0, 0, 0, 0, 0, 0, 0, 0x1a]);
        assert_eq!(bytes[16..24], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(Key::of(&Header::reset_for(&header)), key);
    }

    #[test]
    fn operations_have_the_numbers_of_the_specification() {
        for value in 0..=u16::MAX {
            let op = Op::from_wire(value);
            assert_eq!(
                op.map(|op| op as u16),
                (1..=7).contains(&value).then_some(value)
            );
        }
    }
}
