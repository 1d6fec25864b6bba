//! From configuration to device.

use std::path::Path;

use devices::events::Reporter;
use devices::virtio::DeviceType;
use devices::virtio::vhost_user::{
    UnfitPeer, VhostUser, VhostUserBlockOptions, VhostUserFsOptions, VhostUserNetOptions,
};

use super::error::VhostUserError;
use super::peer::{Limits, connect};
use crate::config::{DiskConfig, FsConfig, MacAddress, NetConfig};

/// The disk that the server at `socket` has.
///
/// # Errors
/// [`VhostUserError`] when the server cannot be reached or does not fit the configuration.
pub fn open_block(
    socket: &Path,
    config: &DiskConfig,
    reporter: Reporter,
) -> Result<VhostUser, VhostUserError> {
    let peer = connect(socket, DeviceType::Block, Limits::default())?;
    let options = VhostUserBlockOptions {
        queues: config.queues,
        queue_size: config.queue_size,
    };
    VhostUser::block(peer, options, reporter).map_err(unfit(socket))
}

/// The network interface behind the server at `socket`, with the address `mac`.
///
/// # Errors
/// [`VhostUserError`] when the server cannot be reached or does not fit the configuration.
pub fn open_net(
    socket: &Path,
    config: &NetConfig,
    mac: MacAddress,
    reporter: Reporter,
) -> Result<VhostUser, VhostUserError> {
    let peer = connect(socket, DeviceType::Net, Limits::default())?;
    let options = VhostUserNetOptions {
        mac: mac.0,
        mtu: config.mtu,
        offload: config.offload,
        queue_pairs: config.queues,
        queue_size: config.queue_size,
    };
    VhostUser::net(peer, options, reporter).map_err(unfit(socket))
}

/// The shared directory that `config` describes.
///
/// # Errors
/// [`VhostUserError`] when the server cannot be reached or does not fit the configuration.
pub fn open_fs(config: &FsConfig, reporter: Reporter) -> Result<VhostUser, VhostUserError> {
    let peer = connect(&config.socket, DeviceType::Fs, Limits::default())?;
    let options = VhostUserFsOptions {
        tag: config.tag.clone(),
        queues: config.queues,
        queue_size: config.queue_size,
    };
    VhostUser::fs(peer, &options, reporter).map_err(unfit(&config.socket))
}

fn unfit(socket: &Path) -> impl FnOnce(UnfitPeer) -> VhostUserError {
    move |source| VhostUserError::Unfit {
        path: socket.to_owned(),
        source,
    }
}
