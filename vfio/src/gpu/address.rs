//! Addresses of what VMs can be given.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::tree::SysfsTree;
use crate::Bdf;

/// Where a GPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GpuAddress {
    /// A PCI function.
    Pci(Bdf),
    /// A device that is no PCI function and makes mediated devices, by the name that it has among those
    /// that do: in `/sys/class/mdev_bus`.
    Parent(ParentName),
}

/// Longer names are none of a parent's.
const NAME_MAX: usize = 40;

/// A name of letters, digits, `-`, `_` and dots within.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParentName {
    letters: [u8; NAME_MAX],
    length: usize,
}

/// A text names no GPU.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not the address of a PCI function, such as 0000:41:00.0, nor the name of another device, such \
     as mbochs"
)]
pub struct InvalidGpuAddress(String);

impl ParentName {
    fn new(text: &str) -> Option<Self> {
        let is_plain =
            |byte: u8| byte.is_ascii_alphanumeric() || [b'-', b'_', b'.'].contains(&byte);
        let is_name = text.starts_with(|first: char| first.is_ascii_alphabetic());
        let mut letters = [0; NAME_MAX];
        letters
            .get_mut(..text.len())?
            .copy_from_slice(text.as_bytes());
        let length = text.len();
        (is_name && text.bytes().all(is_plain)).then_some(Self { letters, length })
    }

    /// Its text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let letters = self.letters.get(..self.length).unwrap_or_default();
        std::str::from_utf8(letters).unwrap_or_default()
    }
}

impl fmt::Debug for ParentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Bdf> for GpuAddress {
    fn from(address: Bdf) -> Self {
        Self::Pci(address)
    }
}

impl FromStr for GpuAddress {
    type Err = InvalidGpuAddress;

    fn from_str(text: &str) -> Result<Self, InvalidGpuAddress> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Pci(address));
        }
        let name = ParentName::new(text).map(Self::Parent);
        name.ok_or_else(|| InvalidGpuAddress(text.chars().take(64).collect()))
    }
}

impl fmt::Display for GpuAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Parent(name) => f.pad(name.as_str()),
        }
    }
}

impl Serialize for GpuAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GpuAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Where a partition is, or a whole GPU.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Address {
    /// A PCI function, or a parent of mediated devices: those have no claims of their own.
    Pci(GpuAddress),
    /// A mediated device, by its UUID.
    Mediated(Uuid),
}

/// A UUID as the kernel writes it: 36 characters, in small letters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Uuid(String);

impl Address {
    /// The folder of its VFIO device.
    pub(super) fn folder(&self, tree: &SysfsTree) -> PathBuf {
        match self {
            Self::Pci(address) => tree.function(*address).folder(),
            Self::Mediated(uuid) => tree.root().join("bus/mdev/devices").join(&uuid.0),
        }
    }
}

impl FromStr for Uuid {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let groups: Vec<&str> = text.split('-').collect();
        let is_hex = |group: &&str| group.bytes().all(|byte| byte.is_ascii_hexdigit());
        let lengths = groups.iter().map(|group| group.len());
        match lengths.eq([8, 4, 4, 4, 12]) && groups.iter().all(is_hex) {
            true => Ok(Self(text.to_ascii_lowercase())),
            false => Err(()),
        }
    }
}

impl Uuid {
    /// One that nobody else has; `None` where the kernel gives none.
    pub(super) fn random() -> Option<Self> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid").ok()?;
        text.trim().parse().ok()
    }
}

impl FromStr for Address {
    type Err = ();

    /// Only what its `Display` writes: two names of one address would be two claims.
    fn from_str(text: &str) -> Result<Self, ()> {
        let address = match text.parse() {
            Ok(address) => Self::Pci(GpuAddress::Pci(address)),
            Err(_) => Self::Mediated(text.parse()?),
        };
        (address.to_string() == text).then_some(address).ok_or(())
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Mediated(uuid) => uuid.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_has_an_address_or_a_name() {
        for (text, written) in [
            ("41:00.0", Some("0000:41:00.0")),
            ("mbochs", Some("mbochs")),
            ("i915-gvtg_V5.4", Some("i915-gvtg_V5.4")),
            ("a GPU", None),
            ("../mbochs", None),
            (".", None),
            ("41:00.8", None),
            ("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", None),
            (
                "a234567890123456789012345678901234567890",
                Some("a234567890123456789012345678901234567890"),
            ),
            ("a2345678901234567890123456789012345678901", None),
            ("", None),
        ] {
            let address = text.parse::<GpuAddress>().ok();
            assert_eq!(
                address.map(|address| address.to_string()).as_deref(),
                written,
                "{text}"
            );
        }
    }

    #[test]
    fn an_address_has_one_name() {
        for (text, is_one) in [
            ("0000:41:00.4", true),
            ("41:00.4", false),
            ("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", true),
            ("83B8F4F2-509f-382f-3c1e-e6bfe0fa1001", false),
            ("83b8f4f2-509f-382f-3c1e-e6bfe0fa100g", false),
            ("83b8f4f2509f-382f-3c1e-e6bfe0fa1001", false),
            ("../../etc/passwd", false),
            ("allocation.lock", false),
            ("", false),
        ] {
            assert_eq!(text.parse::<Address>().is_ok(), is_one, "{text}");
        }
    }
}
