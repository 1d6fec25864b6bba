//! A server of a vhost-user disk that exists in name only.

use std::io;
use std::os::fd::OwnedFd;

use crate::GuestRam;
use crate::virtio::RING_FEATURES;
use crate::virtio::vhost_user::{PeerError, PeerLog, PeerOffer, PeerQueue, VhostUserPeer};

/// `VIRTIO_F_VERSION_1`, `VHOST_F_LOG_ALL`, and what QEMU's storage daemon has of a disk's.
const FEATURES: u64 = 1 << 32 | 1 << 26 | 0x7e46;

/// Offset of `writeback` in a disk's configuration (virtio 1.2, 5.2.4).
const WRITEBACK: u8 = 32;

/// Offers a disk of two queues on which nothing ever works.
pub struct FakePeer;

impl FakePeer {
    /// The disk's configuration: each byte is its own offset, but for the cache mode.
    #[must_use]
    pub fn config() -> Vec<u8> {
        let byte = |at| if at == WRITEBACK { 1 } else { at };
        (0..60).map(byte).collect()
    }
}

impl VhostUserPeer for FakePeer {
    fn offer(&self) -> PeerOffer {
        PeerOffer {
            features: FEATURES | RING_FEATURES,
            queues: 2,
            config: true,
            log: true,
        }
    }

    fn reconnect(&mut self) -> Result<(), PeerError> {
        Err("there is no server".into())
    }

    fn disconnect(&mut self) {}

    fn read_config(&mut self, data: &mut [u8]) -> Result<(), PeerError> {
        for (to, from) in data.iter_mut().zip(Self::config()) {
            *to = from;
        }
        Ok(())
    }

    /// Takes a cache mode and nothing else.
    fn write_config(&mut self, _offset: u32, data: &[u8]) -> Result<(), PeerError> {
        match data {
            [0 | 1] => Ok(()),
            _ => Err("no such mode".into()),
        }
    }

    fn start(
        &mut self,
        _memory: &GuestRam,
        _features: u64,
        _queues: &[PeerQueue<'_>],
    ) -> Result<(), PeerError> {
        Err("there is no server".into())
    }

    fn stop(&mut self, queues: &[u16]) -> Result<Vec<u16>, PeerError> {
        Ok(vec![0; queues.len()])
    }

    fn set_log(&mut self, _log: Option<&PeerLog>) -> Result<(), PeerError> {
        Ok(())
    }

    fn connection(&self) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::NotConnected.into())
    }
}
