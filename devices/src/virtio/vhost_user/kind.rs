//! What differs between the kinds of device: features, queues, configuration space.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::block::BlockKind;
use super::fs::FsKind;
use super::net::NetKind;
use super::peer::{PeerError, PeerOffer, VhostUserPeer};
use super::state::VhostUserStateV1;
use crate::virtio::device::{DeviceIdentity, DeviceType, RING_FEATURES};

/// A peer cannot serve the device that it was meant for.
#[derive(Debug, thiserror::Error)]
pub enum UnfitPeer {
    /// It lacks something that the device cannot do without.
    #[error("the vhost-user server does not offer {0}")]
    MissingFeature(&'static str),
    /// It works on fewer queues than were asked for.
    #[error("the vhost-user server works on {offered} queues, {wanted} are needed")]
    TooFewQueues {
        /// Queues that the device has.
        wanted: u32,
        /// Queues that the peer works on.
        offered: u16,
    },
    /// Network devices have one pair of queues here.
    #[error("a vhost-user network device has 1 queue pair, not {0}")]
    QueuePairs(u16),
    /// The tag of a file system is empty or too long.
    #[error("tag {0:?} is not usable: 1 to 36 bytes")]
    Tag(String),
    /// The configuration space could not be read.
    #[error("the vhost-user server does not tell the device's configuration")]
    Config(#[source] PeerError),
    /// After a new connection it offers less than the guest was told.
    #[error("the vhost-user server no longer offers features {0:#x}")]
    FewerFeatures(u64),
}

/// A kind of device with what its configuration asks for.
pub(super) enum Kind {
    Block(BlockKind),
    Net(NetKind),
    Fs(FsKind),
}

impl Kind {
    /// What the device is when `offer` comes from its peer.
    pub(super) fn identity(&self, offer: &PeerOffer) -> Result<DeviceIdentity, UnfitPeer> {
        if !has(offer.features, VIRTIO_F_VERSION_1) {
            return Err(UnfitPeer::MissingFeature("VIRTIO_F_VERSION_1"));
        }
        let (device_type, features, queue_sizes) = match self {
            Self::Block(block) => (
                DeviceType::Block,
                block.features(offer)?,
                block.queue_sizes(),
            ),
            Self::Net(net) => (DeviceType::Net, net.features(offer), net.queue_sizes()),
            Self::Fs(fs) => (DeviceType::Fs, 0, fs.queue_sizes()),
        };
        if queue_sizes.len() > usize::from(offer.queues) {
            return Err(UnfitPeer::TooFewQueues {
                wanted: u32::try_from(queue_sizes.len()).unwrap_or(u32::MAX),
                offered: offer.queues,
            });
        }
        Ok(DeviceIdentity {
            device_type,
            features,
            ring_features: offer.features & RING_FEATURES,
            queue_sizes,
        })
    }

    /// The configuration space as the driver first sees it.
    pub(super) fn config(&self, peer: &mut dyn VhostUserPeer) -> Result<Vec<u8>, UnfitPeer> {
        match self {
            Self::Block(block) => block.config(peer).map_err(UnfitPeer::Config),
            Self::Net(net) => Ok(net.config()),
            Self::Fs(fs) => Ok(fs.config()),
        }
    }

    /// Why a device of this kind never moves, whatever its peer offers.
    pub(super) fn stays(&self) -> Option<&'static str> {
        match self {
            Self::Block(_) | Self::Net(_) => None,
            Self::Fs(_) => Some(
                "its vhost-user server keeps state of its own: moving it takes \
                 VHOST_USER_PROTOCOL_F_DEVICE_STATE, which Drover does not use",
            ),
        }
    }

    /// Takes over what a state, which was checked, says beyond what the peer decides.
    pub(super) fn take_over(&mut self, state: &VhostUserStateV1) {
        match self {
            Self::Net(net) => net.take_address(&state.config),
            Self::Block(_) | Self::Fs(_) => {}
        }
    }

    /// Whether every buffer that a driver offers comes back without anything happening elsewhere:
    /// a network's receive buffers wait for frames.
    pub(super) fn answers_every_request(&self) -> bool {
        match self {
            Self::Block(_) | Self::Fs(_) => true,
            Self::Net(_) => false,
        }
    }

    /// Whether a driver may write `data` at `offset`, and the peer is to hear of it.
    pub(super) fn is_writable(&self, offset: u64, data: &[u8]) -> bool {
        match self {
            Self::Block(block) => block.is_writable(offset, data),
            Self::Net(_) | Self::Fs(_) => false,
        }
    }

    /// The configuration space while the peer is gone.
    pub(super) fn without_peer(&self, config: &[u8]) -> Vec<u8> {
        match self {
            Self::Net(net) => net.without_link(),
            Self::Block(_) | Self::Fs(_) => config.to_vec(),
        }
    }
}

/// Whether feature bit number `bit` is in `features`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// The set of feature bits numbered `bits`.
pub(super) fn mask(bits: &[u32]) -> u64 {
    bits.iter().fold(0, |mask, bit| mask | 1 << bit)
}
