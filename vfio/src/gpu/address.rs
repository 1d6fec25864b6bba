//! Addresses of what VMs can be given.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::tree::SysfsTree;
use crate::Bdf;

/// Where a partition is, or a whole GPU.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Address {
    /// A PCI function.
    Pci(Bdf),
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
            Ok(address) => Self::Pci(address),
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
