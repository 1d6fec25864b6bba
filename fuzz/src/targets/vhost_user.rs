//! A vhost-user disk of which states are restored. Its server exists in name only, so nothing works on
//! its queues.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use devices::events::{DeviceEvent, EventSink, Reporter};
use devices::virtio::RING_FEATURES;
use devices::virtio::vhost_user::{
    PeerError, PeerLog, PeerOffer, PeerQueue, VhostUser, VhostUserBlockOptions, VhostUserPeer,
};
use devices::{DeviceId, GuestRam};

/// `VIRTIO_F_VERSION_1`, `VHOST_F_LOG_ALL`, and what QEMU's storage daemon has of a disk's.
const FEATURES: u64 = 1 << 32 | 1 << 26 | 0x7e46;

struct Peer;

impl EventSink for Peer {
    fn report(&self, _device: &DeviceId, _event: DeviceEvent) {}
}

impl VhostUserPeer for Peer {
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
        data.fill(1);
        Ok(())
    }
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

/// The disk.
pub fn disk() -> VhostUser {
    let id = DeviceId::new("subject").expect("a good name");
    let options = VhostUserBlockOptions {
        queues: 2,
        queue_size: 64,
    };
    let reporter = Reporter::new(id, Arc::new(Peer));
    VhostUser::block(Box::new(Peer), options, reporter).expect("it offers everything")
}
