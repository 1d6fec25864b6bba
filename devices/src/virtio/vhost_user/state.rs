//! Wire structure of a vhost-user device, and whether a peer can take one over.

use serde::{Deserialize, Serialize};

use super::{block, net};
use crate::state::{RestoreError, StateFormat};
use crate::virtio::device::DeviceType;

pub(super) const KIND: &str = "virtio-vhost-user";
pub(crate) const FORMAT: StateFormat = StateFormat::first(KIND);

/// What a driver knows of a vhost-user device beyond its queues: the next peer must be like the
/// one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUserStateV1 {
    /// Type of device: 1 is a network interface, 2 a disk.
    pub device_type: u8,
    /// Features that it offers, its type's and its rings'.
    pub features: u64,
    /// Its configuration space, as the driver has set it.
    pub config: Vec<u8>,
}

/// Whether a device that is as `ours` can go on as `theirs`, which is not trusted.
///
/// # Errors
/// [`RestoreError`] names what differs.
pub(super) fn check(
    ours: &VhostUserStateV1,
    theirs: &VhostUserStateV1,
) -> Result<(), RestoreError> {
    let refuse =
        |field, value: String, why: String| Err(RestoreError::field(KIND, field, value, why));
    if theirs.device_type != ours.device_type {
        let why = format!("this device is of type {}", ours.device_type);
        return refuse("device_type", theirs.device_type.to_string(), why);
    }
    let missing = theirs.features & !ours.features;
    if missing != 0 {
        let why = format!("the vhost-user server here does not offer {missing:#x} of them");
        return refuse("features", format!("{:#x}", theirs.features), why);
    }
    if theirs.config.len() != ours.config.len() {
        let why = format!("it has {} bytes here", ours.config.len());
        return refuse("config", format!("{} bytes", theirs.config.len()), why);
    }
    if ours.device_type == DeviceType::Block as u8 {
        block::check_config(&ours.config, &theirs.config)
    } else {
        net::check_config(&ours.config, &theirs.config)
    }
}

/// Refuses bytes that differ outside of `free`, which is what may.
pub(super) fn check_bytes(
    ours: &[u8],
    theirs: &[u8],
    free: std::ops::Range<usize>,
) -> Result<(), RestoreError> {
    let mut pairs = ours.iter().zip(theirs).enumerate();
    let differs = pairs.find(|(at, (our, their))| our != their && !free.contains(at));
    match differs {
        None => Ok(()),
        Some((at, (our, their))) => {
            let why = format!("the vhost-user server here has {our:#x} there");
            Err(RestoreError::field(
                KIND,
                "config",
                format!("{their:#x} at offset {at}"),
                why,
            ))
        }
    }
}
