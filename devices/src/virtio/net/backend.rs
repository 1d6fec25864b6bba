//! The port behind a network device.

use std::io;
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
};

use crate::GuestRam;
use crate::virtio::queue::Segment;

/// `struct virtio_net_hdr_v1` (virtio 1.2 section 5.1.6) before every packet, both ways.
pub const HEADER_BYTES: u64 = 12;

/// Largest packet with its header: an Ethernet header, a VLAN tag and the largest IPv6 packet
/// without a jumbo option, 40 + 65,535 bytes.
pub const MAX_PACKET_BYTES: u64 = HEADER_BYTES + 14 + 4 + 65_575;

/// Work on packets towards the guest that the guest takes over from the host: partial checksums
/// and unsegmented packets. A set of `VIRTIO_NET_F_GUEST_*` feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(u64);

impl Offloads {
    /// Complete checksums, no packet larger than the MTU.
    pub const NONE: Self = Self(0);
    /// Checksums of TCP and UDP are left to the guest.
    pub const CSUM: Self = Self(1 << VIRTIO_NET_F_GUEST_CSUM);
    /// Segmentation of TCP over IPv4.
    pub const TSO4: Self = Self(1 << VIRTIO_NET_F_GUEST_TSO4);
    /// Segmentation of TCP over IPv6.
    pub const TSO6: Self = Self(1 << VIRTIO_NET_F_GUEST_TSO6);
    /// Segmentation of TCP with explicit congestion notification.
    pub const ECN: Self = Self(1 << VIRTIO_NET_F_GUEST_ECN);
    /// Fragmentation of UDP.
    pub const UFO: Self = Self(1 << VIRTIO_NET_F_GUEST_UFO);
    /// Segmentation of UDP over IPv4.
    pub const USO4: Self = Self(1 << VIRTIO_NET_F_GUEST_USO4);
    /// Segmentation of UDP over IPv6.
    pub const USO6: Self = Self(1 << VIRTIO_NET_F_GUEST_USO6);
    /// Everything that virtio knows.
    pub const ALL: Self = Self::CSUM
        .with(Self::TSO4)
        .with(Self::TSO6)
        .with(Self::ECN)
        .with(Self::UFO)
        .with(Self::USO4)
        .with(Self::USO6);

    /// What is in either set.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The offloads among feature bits. Without partial checksums there are no others
    /// (section 5.1.3.1).
    #[must_use]
    pub fn from_features(features: u64) -> Self {
        let offloads = Self(features & Self::ALL.0);
        if offloads.contains(Self::CSUM) {
            offloads
        } else {
            Self::NONE
        }
    }

    /// As feature bits.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `other` is in the set.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in both sets.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self::from_features(self.0 & other.0)
    }
}

/// What a host end can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetInfo {
    /// Queue pairs, at least 1.
    pub queue_pairs: u16,
    /// Offloads that it can leave to the guest. The same are taken from the guest: partial
    /// checksums if there are any, and of segmentation what is in the set.
    pub offloads: Offloads,
}

/// The host end of a network device.
pub trait NetBackend: Send + Sync {
    /// Its abilities.
    fn info(&self) -> NetInfo;

    /// The queue of pair `pair`, below [`NetInfo::queue_pairs`]. Each is used by one thread.
    ///
    /// # Errors
    /// The host has no descriptor left.
    fn open_queue(&self, pair: u16) -> io::Result<Box<dyn NetQueue>>;

    /// Sets what packets towards the guest may leave undone.
    ///
    /// # Errors
    /// The host refuses; the former offloads remain.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Lets packets into the queue of pair `pair`, or no longer: what waits there is dropped.
    /// At first all queues are open. Packets can be sent through a closed queue.
    ///
    /// # Errors
    /// The host refuses.
    fn set_queue_open(&self, pair: u16, open: bool) -> io::Result<()>;

    /// Begins to tell the network behind the host end that `mac` is now here, without waiting and
    /// whether or not the guest does so itself; ends with the host end at the latest.
    ///
    /// # Errors
    /// The host has no means left for it.
    fn announce(&self, mac: [u8; 6]) -> io::Result<()>;
}

/// One queue of a host end. Its descriptor is readable when a packet waits, and writable when
/// one can be sent; it never blocks.
pub trait NetQueue: Send + AsRawFd {
    /// Takes one packet, header first: into `segments`, and what does not fit there into
    /// `overflow`. Returns its length. What fits into neither is lost.
    ///
    /// Written guest memory must be marked in its [`crate::memory::WriteLog`].
    ///
    /// # Errors
    /// `WouldBlock` when no packet waits; anything else is an error of the host.
    fn receive(
        &mut self,
        memory: &GuestRam,
        segments: &[Segment],
        overflow: &mut [u8],
    ) -> io::Result<usize>;

    /// Sends the packet in `segments`, header first.
    ///
    /// # Errors
    /// `WouldBlock` when the host end is full: the same packet is sent again later. Anything
    /// else: the packet is lost.
    fn send(&mut self, memory: &GuestRam, segments: &[Segment]) -> io::Result<()>;

    /// Whether `error` means that the host end itself is gone, not only this packet.
    fn is_gone(&self, error: &io::Error) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_need_checksums() {
        let tso = Offloads::TSO4;
        let both = tso.with(Offloads::CSUM);
        assert_eq!(Offloads::from_features(tso.bits()), Offloads::NONE);
        assert_eq!(Offloads::from_features(both.bits() | 1), both);
        assert_eq!(both.and(Offloads::CSUM), Offloads::CSUM);
        assert_eq!(both.and(tso), Offloads::NONE);
        assert!(Offloads::ALL.contains(both) && !both.contains(Offloads::ALL));
    }
}
