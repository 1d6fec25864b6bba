//! Devices of the host, or of another process, that the VM has for itself.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vfio::Bdf;

use super::keyvalue::from_key_values;
use super::schema::text_schema;
use super::size::{ByteSize, InvalidSize};

/// An assigned device: exactly one of `vfio`, `vfio-user` and `gpu`.
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
    /// A part of a GPU, or a GPU, whichever is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuConfig>,
    /// Whether the kernel's iommufd is used, or its older groups and containers; when absent,
    /// what the host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommufd: Option<bool>,
    /// Take the function from the driver that it is bound to, and bind it to vfio-pci.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bind: bool,
    /// An open node of the function's that the VMM has inherited: its own or its group's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<u32>,
    /// An open `/dev/iommu`, for a function's own node, or `/dev/vfio/vfio` that the VMM has
    /// inherited. All of a VM's devices share it: it is given with the first of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_fd: Option<u32>,
    /// Let the VM's other devices reach its BARs directly. It takes a container of groups
    /// (`iommufd=off`); large BARs take a while each time the guest places them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub p2p: bool,
}

/// What is asked of a GPU, or of a part of one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct GpuConfig {
    /// Of this GPU, or this virtual function and no other; of the least loaded GPU when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub pci: Option<Bdf>,
    /// Its type, by name or number; `whole` for all of a GPU.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The least video memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vram: Option<AtLeast>,
    /// A copy of a host's /sys to look in; for models of GPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub sysfs_root: Option<PathBuf>,
}

/// A size that is the least wanted: `>=4G`, or `4G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AtLeast(pub ByteSize);

text_schema!(AtLeast, ">=4G");

impl TryFrom<String> for AtLeast {
    type Error = InvalidSize;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let size = text.strip_prefix(">=").unwrap_or(&text);
        size.parse().map(Self)
    }
}

impl From<AtLeast> for String {
    fn from(AtLeast(size): AtLeast) -> Self {
        format!(">={size}")
    }
}

/// `--gpu`: how many devices of one kind.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct GpuList {
    #[serde(default)]
    auto: bool,
    #[serde(default)]
    count: Option<u32>,
    #[serde(default)]
    id: Option<String>,
    pci: Option<Bdf>,
    #[serde(rename = "type")]
    kind: Option<String>,
    vram: Option<AtLeast>,
    sysfs_root: Option<PathBuf>,
    iommufd: Option<bool>,
}

/// Reads `auto[,count=][,type=][,vram=>=SIZE]` or `pci=BDF[,...]` into that many devices.
///
/// # Errors
/// What is wrong with it, in words.
pub fn gpus_from_key_values(text: &str) -> Result<Vec<DeviceConfig>, String> {
    let list: GpuList = from_key_values(text, None).map_err(|error| error.to_string())?;
    if list.auto == list.pci.is_some() {
        return Err("expected auto or pci=BDF".to_owned());
    }
    let count = list.count.unwrap_or(1);
    if !(1..=16).contains(&count) {
        return Err(format!("count is {count}, expected 1 to 16"));
    }
    let id = |number| match (&list.id, count) {
        (Some(id), 1) => Some(id.clone()),
        (Some(id), _) => Some(format!("{id}-{number}")),
        (None, _) => None,
    };
    let gpu = GpuConfig {
        pci: list.pci,
        kind: list.kind.clone(),
        vram: list.vram,
        sysfs_root: list.sysfs_root.clone(),
    };
    let device = |number| DeviceConfig {
        id: id(number),
        gpu: Some(gpu.clone()),
        iommufd: list.iommufd,
        ..DeviceConfig::default()
    };
    Ok((0..count).map(device).collect())
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
    fn gpus_are_read_from_a_list() {
        let gpus = gpus_from_key_values("auto,count=2,type=A10-6Q,vram=>=4G,id=g").unwrap();
        let ids: Vec<_> = gpus.iter().map(|gpu| gpu.id.as_deref().unwrap()).collect();
        assert_eq!(ids, ["g-0", "g-1"]);
        let gpu = gpus[1].gpu.clone().unwrap();
        assert_eq!(gpu.kind.as_deref(), Some("A10-6Q"));
        assert_eq!(gpu.vram, Some(AtLeast(ByteSize(4 << 30))));
        let one = gpus_from_key_values("pci=41:00.0").unwrap();
        assert_eq!(
            one[0].gpu.clone().unwrap().pci,
            Some("41:00.0".parse().unwrap())
        );
        for bad in [
            "",
            "count=2",
            "auto,pci=41:00.0",
            "auto,count=0",
            "auto,count=17",
            "auto,x=1",
        ] {
            assert!(gpus_from_key_values(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn device_is_read_from_a_list() {
        let config: DeviceConfig =
            from_key_values("vfio=41:00.4,iommufd=off,bind,id=gpu", None).unwrap();
        assert_eq!(config.id.as_deref(), Some("gpu"));
        assert_eq!(config.vfio, Some("0000:41:00.4".parse().unwrap()));
        assert_eq!((config.vfio_user, config.iommufd), (None, Some(false)));
        assert!(config.bind);
        let server: DeviceConfig = from_key_values("vfio-user=/run/nvme.sock", None).unwrap();
        assert_eq!(server.vfio_user, Some("/run/nvme.sock".into()));
    }
}
