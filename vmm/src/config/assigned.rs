//! Devices of the host, or of another process, that the VM has for itself.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vfio::Bdf;

use super::schema::text_schema;

/// An assigned device: exactly one of `vfio` and `vfio-user`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DeviceConfig {
    /// Device name; `deviceN` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// A function of the host's, bound to a VFIO driver, or a mediated device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vfio: Option<HostDevice>,
    /// Socket of a vfio-user server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vfio_user: Option<PathBuf>,
    /// Whether the kernel's iommufd is used, or its older groups and containers; when absent,
    /// what the host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommufd: Option<bool>,
}

/// A device of the host's, as VFIO knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HostDevice {
    /// A PCI function.
    Pci(Bdf),
    /// A mediated device, by its UUID.
    Mediated(String),
}

/// A text that names no device of the host's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a PCI function such as 0000:41:00.4 nor the UUID of a mediated device")]
pub struct InvalidHostDevice(String);

text_schema!(HostDevice, "0000:41:00.4");

impl HostDevice {
    /// Where sysfs has it.
    #[must_use]
    pub fn sysfs_path(&self) -> PathBuf {
        match self {
            Self::Pci(bdf) => format!("/sys/bus/pci/devices/{bdf}").into(),
            Self::Mediated(uuid) => format!("/sys/bus/mdev/devices/{uuid}").into(),
        }
    }
}

/// 8-4-4-4-12 hexadecimal digits (RFC 9562 section 4).
fn is_uuid(text: &str) -> bool {
    let lengths = text.split('-').map(str::len);
    let digits = |c: char| c.is_ascii_hexdigit() || c == '-';
    lengths.eq([8, 4, 4, 4, 12]) && text.chars().all(digits)
}

impl FromStr for HostDevice {
    type Err = InvalidHostDevice;

    fn from_str(text: &str) -> Result<Self, InvalidHostDevice> {
        if let Ok(bdf) = text.parse() {
            return Ok(Self::Pci(bdf));
        }
        match is_uuid(text) {
            true => Ok(Self::Mediated(text.to_ascii_lowercase())),
            false => Err(InvalidHostDevice(text.chars().take(64).collect())),
        }
    }
}

impl fmt::Display for HostDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(bdf) => bdf.fmt(f),
            Self::Mediated(uuid) => f.write_str(uuid),
        }
    }
}

impl TryFrom<String> for HostDevice {
    type Error = InvalidHostDevice;

    fn try_from(text: String) -> Result<Self, InvalidHostDevice> {
        text.parse()
    }
}

impl From<HostDevice> for String {
    fn from(device: HostDevice) -> Self {
        device.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_key_values;

    #[test]
    fn devices_are_functions_or_mediated_ones() {
        for text in ["0000:41:00.4", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"] {
            assert_eq!(text.parse::<HostDevice>().unwrap().to_string(), text);
        }
        assert_eq!(
            "41:00.4".parse::<HostDevice>().unwrap().to_string(),
            "0000:41:00.4"
        );
        for bad in ["", "../../etc", "83b8f4f2-509f-382f-3c1e", "41:00.8"] {
            assert!(bad.parse::<HostDevice>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn device_is_read_from_a_list() {
        let config: DeviceConfig =
            from_key_values("vfio=41:00.4,iommufd=off,id=gpu", None).unwrap();
        assert_eq!(config.id.as_deref(), Some("gpu"));
        assert_eq!(config.vfio, Some("0000:41:00.4".parse().unwrap()));
        assert_eq!((config.vfio_user, config.iommufd), (None, Some(false)));
        let server: DeviceConfig = from_key_values("vfio-user=/run/nvme.sock", None).unwrap();
        assert_eq!(server.vfio_user, Some("/run/nvme.sock".into()));
    }
}
