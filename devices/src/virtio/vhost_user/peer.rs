//! The port behind a vhost-user device.

use std::io;
use std::os::fd::OwnedFd;

use vmm_sys_util::eventfd::EventFd;

use super::handle::PeerLog;
use crate::GuestRam;

/// Why a peer could not do what it was asked. The words are for operators; to the device every
/// failure means that the connection can no longer be used.
pub type PeerError = Box<dyn std::error::Error + Send + Sync>;

/// What a peer has said about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerOffer {
    /// Virtio feature bits, those of the ring included.
    pub features: u64,
    /// Most queues that it works on.
    pub queues: u16,
    /// Whether it answers for the device's configuration space.
    pub config: bool,
    /// Whether it takes a log of its writes (`VHOST_USER_PROTOCOL_F_LOG_SHMFD`), which
    /// `VHOST_F_LOG_ALL` among its features switches on.
    pub log: bool,
}

/// One queue as a peer is given it.
#[derive(Clone, Copy, Debug)]
pub struct PeerQueue<'a> {
    /// Position among the device's queues.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table; all of it lies in RAM.
    pub desc_table: u64,
    /// Guest-physical address of the available ring; all of it lies in RAM.
    pub avail_ring: u64,
    /// Guest-physical address of the used ring; all of it lies in RAM.
    pub used_ring: u64,
    /// Where to go on in the available ring.
    pub next_avail: u16,
    /// Signalled when the driver has made buffers available.
    pub kick: &'a EventFd,
    /// To be signalled when buffers were used.
    pub call: &'a EventFd,
}

/// A process that works on virtqueues. Every call ends within a time that the implementation
/// sets, whatever the process does.
pub trait VhostUserPeer: Send {
    /// What it said when it was connected last.
    fn offer(&self) -> PeerOffer;

    /// Drops the connection, if there is one, and makes a new one.
    ///
    /// # Errors
    /// [`PeerError`]; there is no connection then.
    fn reconnect(&mut self) -> Result<(), PeerError>;

    /// Drops the connection: the process no longer has any business in guest memory.
    fn disconnect(&mut self);

    /// Reads the start of the configuration space.
    ///
    /// # Errors
    /// [`PeerError`], among other things when the peer has no configuration space or a shorter
    /// one.
    fn read_config(&mut self, data: &mut [u8]) -> Result<(), PeerError>;

    /// Writes to the configuration space at `offset`.
    ///
    /// # Errors
    /// [`PeerError`], among other things when the peer refuses the value.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), PeerError>;

    /// Hands over guest memory and queues; the peer works from now on. `features` are what the
    /// driver has negotiated, as far as the peer offers them.
    ///
    /// # Errors
    /// [`PeerError`].
    fn start(
        &mut self,
        memory: &GuestRam,
        features: u64,
        queues: &[PeerQueue<'_>],
    ) -> Result<(), PeerError>;

    /// Takes the queues back; the peer begins no new request. Returns for each of `queues` where
    /// it has got to in the available ring. Requests may still be in flight.
    ///
    /// # Errors
    /// [`PeerError`].
    fn stop(&mut self, queues: &[u16]) -> Result<Vec<u16>, PeerError>;

    /// Has the process mark what it writes in `log`, or no longer; at once if it works, and whenever
    /// it is started, also after a new connection.
    ///
    /// # Errors
    /// [`PeerError`], among other things when it has not offered that.
    fn set_log(&mut self, log: Option<&PeerLog>) -> Result<(), PeerError>;

    /// A descriptor that hangs up (`EPOLLRDHUP` or `EPOLLHUP`) when the process is gone.
    ///
    /// # Errors
    /// The host has no descriptor left, or there is no connection.
    fn connection(&self) -> io::Result<OwnedFd>;
}
